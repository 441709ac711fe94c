"""SB3 policies whose networks have a state: ``predict`` takes the membranes and hands them back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

from snn_rl.core.convert import DEFAULT_LEAK, spiking_architecture
from snn_rl.core.network import SpikingNetwork
from snn_rl.rl.heads import Head, head_of
from snn_rl.rl.network import ActorNetwork, NumpyState, StatefulNetwork, layers_of, normalizer_of, numpy_state
from snn_rl.rl.statistics import Statistics


def check_forwards(policy: DQNPolicy) -> None:
    """Refuse a policy that computes its Q-values or actions in a way of its own, on top of its layers.

    Conversion, policy files and `snn_rl.without_dead_units` take the features extractor and the layers behind it. What
    a dueling, negated or masked Q-network does with them would be lost.

    Raises:
        ValueError: a policy or Q-network that overrides how its outputs are computed, by its class and method.
    """
    spiking = isinstance(policy, SpikingDQNPolicy)
    policy_class, network_class = (SpikingDQNPolicy, SpikingQNetwork) if spiking else (DQNPolicy, QNetwork)
    checked: tuple[tuple[str, nn.Module, type[nn.Module], tuple[str, ...]], ...] = (
        ("policy", policy, policy_class, ("forward", "predict", "_predict", "obs_to_tensor")),
        ("Q-network", policy.q_net, network_class, ("forward", "_predict", "extract_features")),
    )
    for what, module, base, methods in checked:
        for method in methods:
            if getattr(type(module), method, None) is not getattr(base, method) or method in vars(module):
                raise ValueError(
                    f"the {what} is a {type(module).__name__}, whose {method} is its own and would be lost; only the "
                    f"layers of SB3's {base.__name__} can be taken. An agent of another kind can be the `teacher` of a "
                    "SpikingDQN that starts from new weights"
                )


def _encoded(net: StatefulNetwork, observation: PyTorchObs) -> Tensor:
    """A batch of observations, as SB3's policies take them, as ``net`` does."""
    if isinstance(observation, Tensor):
        return observation
    return net.as_tensor({key: part.cpu().numpy() for key, part in observation.items()})


def no_schedule(_: float) -> float:
    """The learning rate of a policy that is loaded to be run, not trained."""
    return 0.0


class StatefulPolicy(BasePolicy):
    """What policies with a `StatefulNetwork` share: acting with the state passed in and out."""

    net: StatefulNetwork
    head: Head

    def _to_tensor(self, observation: np.ndarray | dict[str, np.ndarray], device: torch.device) -> tuple[Tensor, bool]:
        """`obs_to_tensor`, which the plain case skips: arrays that fit the space need none of its questions."""
        space = self.observation_space
        if isinstance(space, spaces.Box) and isinstance(observation, np.ndarray):
            array = np.ascontiguousarray(observation)  # torch knows no negative strides
            if array.shape == space.shape:
                return torch.as_tensor(array[None], device=device), False
            if array.shape[1:] == space.shape:
                return torch.as_tensor(array, device=device), True
        if isinstance(observation, tuple):
            raise ValueError(
                "the observation is a tuple: a gymnasium environment's reset() returns (observation, info), "
                "pass the observation alone"
            )
        if self.net.flat is not None:
            batch, vectorized = self.net.flat.batch(observation)  # type: ignore[arg-type]
            return self.net.as_tensor(batch), vectorized
        obs, vectorized = self.obs_to_tensor(observation)
        assert isinstance(obs, Tensor)
        return obs, vectorized

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, NumpyState]:
        """Greedy actions of a batch of environments (or of one bare observation) and their membranes afterwards.

        ``state`` is what the previous call returned (None at first). Where ``episode_start`` is True, that
        environment's membranes are cleared first. An observation of NaN or infinity is not refused. It stays in that
        environment's membranes until its next ``episode_start``, which clears whatever they hold. ``deterministic``
        changes nothing here: exploration is the algorithm's.

        Raises:
            ValueError: a state of another batch size or network.
        """
        out, new_state, vectorized = self.outputs(observation, state, episode_start)
        actions = self.head.actions(out)
        return actions if vectorized else actions[0], new_state

    def outputs(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
    ) -> tuple[np.ndarray, NumpyState, bool]:
        """The network's outputs (batch, size) of an observation, the new state, and whether it was a batch.

        Raises ValueError as `predict` does.
        """
        if self.training:  # looked at first, for walking through all modules takes as long as a small network's frame
            self.set_training_mode(False)
        obs, vectorized = self._to_tensor(observation, self.device)
        batch = obs.shape[0]
        state = numpy_state(state, batch)
        starts = None
        if episode_start is not None:
            starts = np.asarray(episode_start, dtype=bool).reshape(-1)
            if len(starts) != batch:
                raise ValueError(f"episode_start must hold {batch} flags, one per environment, got {len(starts)}")
        out, new_state = self.net.act(obs, state, starts)
        return out, new_state, vectorized


class AgentPolicy(StatefulPolicy):
    """A policy of any kind of action space: one `ActorNetwork`, and a `Head` that turns its outputs into actions.

    Args:
        head: "values", "logits", "mean" or "squashed", see `head_of`.
        net_arch: units of each hidden layer behind the features extractor.
        timesteps: micro-steps per frame; None for the ordinary network, with ReLUs.
        leak, leak_reset: as in `snn_rl.to_spiking`.
        persistent: carry the membranes from frame to frame.
        statistics: by which observations are normalised before they reach the network; None for as they are.

    Raises:
        ValueError: a network that cannot be converted, a head that does not fit the action space, timesteps or leak out
            of range.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        head: str,
        net_arch: list[int],
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        timesteps: int | None = None,
        leak: float = DEFAULT_LEAK,
        leak_reset: bool = False,
        persistent: bool = True,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.head = head_of(head, action_space)
        self.net_arch = list(net_arch)
        self.agent_kwargs: dict[str, Any] = {
            "head": head,
            "net_arch": self.net_arch,
            "timesteps": timesteps,
            "leak": leak,
            "leak_reset": leak_reset,
            "persistent": persistent,
        }
        self.net: ActorNetwork = ActorNetwork(
            observation_space,
            self.head,
            self.make_features_extractor(),
            self.net_arch,
            normalize_images,
            timesteps,
            leak,
            leak_reset,
            persistent,
            None if statistics is None else normalizer_of(statistics),
        )
        self.optimizer = self.optimizer_class(self.net.network.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    @property
    def statistics(self) -> Statistics | None:
        """By which observations are normalised, None where they are not."""
        return None if self.net.normalizer is None else self.net.normalizer.statistics

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            **self.agent_kwargs,
            "statistics": self.statistics,
            "lr_schedule": no_schedule,
            "features_extractor_class": self.features_extractor_class,
            "features_extractor_kwargs": self.features_extractor_kwargs,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        out, _ = self.net(_encoded(self.net, observation))
        return torch.as_tensor(self.head.actions(out.detach().cpu().numpy()), device=self.device)


class SpikingQNetwork(StatefulNetwork, QNetwork):  # type: ignore[misc]
    """SB3's Q-network with its ReLUs turned into LIF layers: observations and state in, Q-values and state out.

    Takes what `QNetwork` takes, and ``timesteps``, ``leak``, ``leak_reset`` as `to_spiking` does. With
    ``persistent=False`` the membranes are cleared before every frame.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        timesteps: int = 5,
        leak: float = DEFAULT_LEAK,
        leak_reset: bool = False,
        persistent: bool = True,
    ) -> None:
        QNetwork.__init__(
            self,
            observation_space,
            action_space,
            features_extractor,
            features_dim,
            net_arch,
            activation_fn,
            normalize_images,
        )
        # For `save`, so that `load` can build the network anew. Without weights, and in a list: no part of this module.
        self._extractor = [copy.deepcopy(features_extractor).to("meta")]
        layers = layers_of(self.features_extractor, self.q_net)
        self._hold(spiking_architecture(layers, timesteps, leak=leak, leak_reset=leak_reset), persistent)
        # Converted: keeping the ANN beside it would train and save dead weights.
        self.features_extractor = None  # type: ignore[assignment]
        del self.q_net

    def _get_constructor_parameters(self) -> dict[str, Any]:
        network = self.network
        assert isinstance(network, SpikingNetwork)
        extractor = copy.deepcopy(self._extractor[0]).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*extractor.parameters(), *extractor.buffers()):
                tensor.zero_()
        return {
            **super()._get_constructor_parameters(),
            "features_extractor": extractor,
            "timesteps": network.timesteps,
            "leak_reset": next(iter(network.lif_layers.values())).leak_reset,
            "persistent": self.persistent,
        }  # thresholds and leaks are parameters

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        return StatefulNetwork.forward(self, _encoded(self, observation))[0].argmax(dim=1)


class SpikingDQNPolicy(StatefulPolicy, DQNPolicy):
    """`DQNPolicy` on a `SpikingQNetwork`; ``policy_kwargs`` gain ``timesteps, leak, leak_reset, persistent``.

    Raises:
        ValueError: a network that cannot be converted (activation, features extractor), timesteps or leak out of range.
    """

    q_net: SpikingQNetwork
    q_net_target: SpikingQNetwork

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        timesteps: int = 5,
        leak: float = DEFAULT_LEAK,
        leak_reset: bool = False,
        persistent: bool = True,
    ) -> None:
        self.spiking_kwargs = {
            "timesteps": timesteps,
            "leak": leak,
            "leak_reset": leak_reset,
            "persistent": persistent,
        }
        DQNPolicy.__init__(
            self,
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
        )
        self.head = head_of("values", action_space)

    @property
    def net(self) -> SpikingQNetwork:  # type: ignore[override]
        """The online network."""
        return self.q_net

    def make_q_net(self) -> SpikingQNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return SpikingQNetwork(**net_args, **self.spiking_kwargs).to(self.device)  # type: ignore[arg-type]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.spiking_kwargs}

    def parameters_to_vector(self) -> np.ndarray:
        """All parameters as one array, whatever order they are stored in (SB3's own takes contiguous ones alone)."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters()]).cpu().numpy()

    def load_from_vector(self, vector: np.ndarray) -> None:
        """The inverse of `parameters_to_vector`; parameters keep the order in which they are stored."""
        given, start = torch.as_tensor(vector), 0
        size = sum(p.numel() for p in self.parameters())
        if given.shape != (size,):
            raise ValueError(f"vector must have shape ({size},), one entry per parameter, got {tuple(given.shape)}")
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(given[start : start + p.numel()].view(p.shape))
                start += p.numel()


MlpPolicy = SpikingDQNPolicy


class CnnPolicy(SpikingDQNPolicy):
    """`SpikingDQNPolicy` for images: ``NatureCNN`` unless ``features_extractor_class`` says otherwise."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, features_extractor_class, **kwargs
        )


class MultiInputPolicy(SpikingDQNPolicy):
    """`SpikingDQNPolicy` for Dict observations: ``CombinedExtractor`` unless ``features_extractor_class`` differs."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, features_extractor_class, **kwargs
        )
