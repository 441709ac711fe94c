"""The actor inside an agent of stable-baselines3 or sb3-contrib: its layers, and what their outputs mean.

This is the one module that knows the policy classes of both packages. sb3-contrib is never imported: a policy is
recognised by the names of its classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from snn_rl.core.convert import DEFAULT_LEAK
from snn_rl.core.graph import prepare
from snn_rl.core.plain import evaluation_copy
from snn_rl.rl.heads import Head, head_of
from snn_rl.rl.observations import flat_extractor
from snn_rl.rl.spaces import UnsupportedSpaceError, in_one_line

LSTMState = tuple[np.ndarray, np.ndarray]  # hidden and cell state, each (layers, n, hidden units)

# What `predict` calls, in whichever class it stands. A class of the user's own that overrides one computes its actions
# in another way than by the layers alone.
METHODS = (
    "forward",
    "forward_actor",
    "predict",
    "_predict",
    "obs_to_tensor",
    "extract_features",
    "get_distribution",
    "get_action_dist_params",
    "_get_action_dist_from_latent",
    "_process_sequence",
    "unscale_action",
    "squash_output",
)


@dataclass(frozen=True, eq=False)
class Actor:
    """The feed-forward network that chooses an agent's greedy actions.

    ``network`` maps preprocessed observations (batch, ...) to outputs (batch, head.size). Those of a ``Dict`` space it
    takes as a dict, or side by side in one tensor (`FlatExtractor`), in which form it can be converted. Its children
    are ``features``, the features extractor, and ``mlp``, a ``Sequential`` of what follows. It is a copy of the
    policy's layers in evaluation mode.
    """

    network: nn.Sequential
    head: Head
    features_extractor_class: type[BaseFeaturesExtractor]
    features_extractor_kwargs: dict[str, Any]
    normalize_images: (
        bool  # whether the observations of ``network`` are images divided by 255, see SB3's preprocess_obs
    )

    @property
    def mlp(self) -> nn.Sequential:
        """The layers behind the features extractor."""
        mlp = self.network.get_submodule("mlp")
        assert isinstance(mlp, nn.Sequential)
        return mlp

    @property
    def net_arch(self) -> tuple[int, ...]:
        """Units of the hidden layers of ``mlp``."""
        return tuple(layer.out_features for layer in self.mlp if isinstance(layer, nn.Linear))[:-1]

    @property
    def activation(self) -> type[nn.Module] | None:
        """The class of the first activation in ``mlp``; None where it has no hidden layer."""
        if not self.net_arch:
            return None
        return next(type(layer) for layer in self.mlp if not isinstance(layer, nn.Linear))

    @cached_property
    def converts(self) -> bool:
        """Whether `to_spiking` can convert ``network`` as it is.

        It cannot where an activation is not a ReLU, where there is no hidden layer, and where the agent clips its
        outputs (SAC and TQC with generalised state-dependent exploration end in a ``Hardtanh``).
        """
        try:
            prepare(self.network, leak=DEFAULT_LEAK, leak_reset=False)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, eq=False)
class RecurrentActor:
    """The network that chooses the greedy actions of a RecurrentPPO, with its LSTM.

    The layers are copies of the policy's in evaluation mode. ``policy`` only turns observations into tensors.
    """

    policy: BasePolicy
    head: Head
    features: nn.Module
    lstm: nn.LSTM
    mlp: nn.Sequential

    @torch.no_grad()
    def label(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: LSTMState | None = None,
        episode_start: np.ndarray | None = None,
    ) -> tuple[np.ndarray, LSTMState]:
        """One frame of n environments: outputs (n, head.size), and the state that the next frame needs.

        Args:
            observation: (n, ...), as the policy's ``predict`` takes it.
            state: what the call before returned; None at the first frame.
            episode_start: (n,), True where an episode begins: the LSTM forgets what came before.

        Raises:
            ValueError: a state of another number of environments.
        """
        obs, _ = self.policy.obs_to_tensor(observation)
        features = self.features(_preprocessed(self.policy, obs))
        n = len(features)
        shape = (self.lstm.num_layers, n, self.lstm.hidden_size)
        carries = [features.new_zeros(shape)] * 2
        if state is not None:
            carries = [torch.as_tensor(carry, dtype=features.dtype, device=features.device) for carry in state]
            if any(carry.shape != shape for carry in carries):
                got = ", ".join(str(tuple(carry.shape)) for carry in carries)
                raise ValueError(f"the state of {n} environments must be two arrays of shape {shape}, got {got}")
        if episode_start is not None:
            start = torch.as_tensor(episode_start, device=features.device).bool().reshape(1, n, 1)
            carries = [torch.where(start, torch.zeros_like(carry), carry) for carry in carries]
        hidden, (h, c) = self.lstm(features[None], (carries[0], carries[1]))
        return self.mlp(hidden[0]).cpu().numpy(), (h.cpu().numpy(), c.cpu().numpy())


def actor_of(policy: BasePolicy) -> Actor:
    """The actor of a policy of DQN, PPO, A2C, SAC, TD3, DDPG, QRDQN, TRPO, TQC or ARS.

    The mean over QR-DQN's quantiles is folded into its last layer. The tanh at the end of a squashed actor is the
    head's. The mean that SAC and TQC clip where they explore by gSDE is clipped by the network's last layer.

    Raises:
        ValueError: a policy of another algorithm; one with memory or spikes; or one that overrides how its actions are
            computed, by its class and method.
        UnsupportedSpaceError: actions that no head fits.
    """
    name, base = _known(policy, _ACTORS)
    _check("policy", policy, base)
    net, features, layers, kind = _ACTORS[name](policy)
    if kind == "squashed" and not _bounded(policy.action_space):
        raise UnsupportedSpaceError(
            f"squashed actions need finite bounds, got {in_one_line(policy.action_space)}; use "
            "gymnasium.wrappers.RescaleAction"
        )
    head = head_of(kind, policy.action_space)
    mlp = nn.Sequential(*layers)
    outputs = [layer.out_features for layer in mlp if isinstance(layer, nn.Linear)]
    if outputs[-1:] != [head.size]:
        raise ValueError(f"the last linear layer of the actor must have {head.size} units, got {outputs[-1:]}")
    network = evaluation_copy(nn.Sequential(OrderedDict(features=flat_extractor(features), mlp=mlp)))
    assert isinstance(network, nn.Sequential)
    return Actor(
        network, head, policy.features_extractor_class, dict(policy.features_extractor_kwargs), net.normalize_images
    )


def recurrent_actor_of(policy: BasePolicy) -> RecurrentActor:
    """The actor of a RecurrentPPO.

    Raises:
        ValueError: another policy, or one that overrides how its actions are computed.
    """
    base = next((cls for cls in type(policy).__mro__ if _full_name(cls) == _RECURRENT), None)
    if base is None:
        raise ValueError(f"recurrent_actor_of takes the policy of a RecurrentPPO, got a {type(policy).__name__}")
    _check("policy", policy, base)
    parts: Any = policy
    _, features, layers, kind = _actor_critic(policy)
    return RecurrentActor(
        policy=policy,
        head=head_of(kind, policy.action_space),
        features=evaluation_copy(features),
        lstm=evaluation_copy(parts.lstm_actor),  # type: ignore[arg-type]
        mlp=evaluation_copy(nn.Sequential(*layers)),  # type: ignore[arg-type]
    )


def is_recurrent(policy: BasePolicy) -> bool:
    """Whether `recurrent_actor_of` is the one to call."""
    return any(_full_name(cls) == _RECURRENT for cls in type(policy).__mro__)


# --- the policies -------------------------------------------------------------------------------------------------

# The module that holds the layers, its features extractor, the layers behind it, and the kind of head.
Parts = tuple[BaseModel, nn.Module, list[nn.Module], str]


def _dqn(policy: Any) -> Parts:
    net = policy.q_net
    _check("Q-network", net, _class_of(net, "stable_baselines3.dqn.policies.QNetwork"))
    return net, net.features_extractor, _layers(net.q_net), "values"


def _qrdqn(policy: Any) -> Parts:
    net = policy.quantile_net
    _check("quantile network", net, _class_of(net, "sb3_contrib.qrdqn.policies.QuantileNetwork"))
    *hidden, last = _layers(net.quantile_net)
    if not isinstance(last, nn.Linear):
        raise ValueError(f"the quantile network must end in a Linear, got a {type(last).__name__}")
    return net, net.features_extractor, [*hidden, _mean_of(last, net.n_quantiles)], "values"


def _mean_of(last: nn.Linear, quantiles: int) -> nn.Linear:
    """The layer whose outputs are the mean over ``quantiles`` of a layer's outputs (quantiles, actions)."""
    mean = nn.Linear(last.in_features, last.out_features // quantiles, bias=last.bias is not None)
    mean = mean.to(last.weight.device, last.weight.dtype)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            wide = last.get_parameter(name).double().unflatten(0, (quantiles, -1))
            parameter.copy_(wide.mean(0))
    return mean


def _actor_critic(policy: Any) -> Parts:
    extractor = policy.mlp_extractor
    _check("extractor", extractor, _class_of(extractor, "stable_baselines3.common.torch_layers.MlpExtractor"))
    layers = [*_layers(extractor.policy_net), *_layers(policy.action_net)]
    kind = "logits"
    if isinstance(policy.action_space, spaces.Box):
        kind = "squashed" if policy.squash_output else "mean"
    return policy, policy.pi_features_extractor, layers, kind


def _soft(package: str) -> Callable[[Any], Parts]:
    def parts(policy: Any) -> Parts:
        net = policy.actor
        _check("actor", net, _class_of(net, f"{package}.policies.Actor"))
        return net, net.features_extractor, [*_layers(net.latent_pi), *_layers(net.mu)], "squashed"

    return parts


def _td3(policy: Any) -> Parts:
    net = policy.actor
    _check("actor", net, _class_of(net, "stable_baselines3.td3.policies.Actor"))
    return net, net.features_extractor, _without_tanh(_layers(net.mu)), "squashed"


def _ars(policy: Any) -> Parts:
    layers, kind = _layers(policy.action_net), "logits"
    if isinstance(policy.action_space, spaces.Box):
        kind = "squashed" if policy.squash_output else "mean"
    if kind == "squashed":
        layers = _without_tanh(layers)
    return policy, policy.features_extractor, layers, kind


def _without_tanh(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers in front of the tanh at the end, which the head applies."""
    if not isinstance(layers[-1], nn.Tanh):
        raise ValueError(f"a squashed actor must end in a Tanh, got a {type(layers[-1]).__name__}")
    return layers[:-1]


_ACTORS: dict[str, Callable[[Any], Parts]] = {
    "stable_baselines3.dqn.policies.DQNPolicy": _dqn,
    "stable_baselines3.common.policies.ActorCriticPolicy": _actor_critic,
    "stable_baselines3.sac.policies.SACPolicy": _soft("stable_baselines3.sac"),
    "stable_baselines3.td3.policies.TD3Policy": _td3,  # DDPG's, too
    "sb3_contrib.qrdqn.policies.QRDQNPolicy": _qrdqn,
    "sb3_contrib.tqc.policies.TQCPolicy": _soft("sb3_contrib.tqc"),
    "sb3_contrib.ars.policies.ARSPolicy": _ars,
}
_RECURRENT = "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy"
# Policies that build on one of `_ACTORS`, but compute their actions with a state.
_WITH_STATE = {
    _RECURRENT: "remembers earlier frames in an LSTM and has no feed-forward actor; use recurrent_actor_of",
    "snn_rl.rl.policy.SpikingDQNPolicy": "spikes already; take the actor of the ANN that it came from",
}


def _known(policy: BasePolicy, known: dict[str, Any]) -> tuple[str, type]:
    """The name of the class that ``policy`` builds on, and that class."""
    for cls in type(policy).__mro__:
        name = _full_name(cls)
        if name in _WITH_STATE:
            raise ValueError(f"the policy, a {type(policy).__name__}, {_WITH_STATE[name]}")
        if name in known:
            return name, cls
    raise ValueError(
        f"the policy is a {_full_name(type(policy))}; known are those of DQN, PPO, A2C, SAC, TD3, DDPG "
        "(stable-baselines3), QRDQN, TRPO, TQC, ARS and RecurrentPPO (sb3-contrib)"
    )


def _class_of(module: nn.Module, name: str) -> type:
    """The class of that name which ``module`` is an instance of."""
    for cls in type(module).__mro__:
        if _full_name(cls) == name:
            return cls
    raise ValueError(f"the agent's {name.rpartition('.')[2]} is a {_full_name(type(module))}, whose layers are unknown")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check(what: str, module: nn.Module, base: type) -> None:
    """Refuse a module that computes its outputs in a way of its own, on top of its layers."""
    for method in METHODS:
        own = hasattr(base, method) and getattr(type(module), method) is not getattr(base, method)
        if own or method in vars(module):
            raise ValueError(
                f"the {what} is a {type(module).__name__}, whose {method} is its own and would be lost; only the "
                f"layers of SB3's {base.__name__} can be taken"
            )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"the {what}, a {type(module).__name__}, has a forward hook, which would be lost; remove it")


def _layers(module: nn.Module) -> list[nn.Module]:
    return list(module) if type(module) is nn.Sequential else [module]


def _bounded(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and bool(np.isfinite([space.low, space.high]).all())


def _preprocessed(policy: BasePolicy, obs: Any) -> Tensor | dict[str, Tensor]:
    return preprocess_obs(obs, policy.observation_space, normalize_images=policy.normalize_images)
