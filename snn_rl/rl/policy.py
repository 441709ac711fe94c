"""SB3 policies around a spiking Q-network."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

from snn_rl.core.convert import DEFAULT_LEAK, spiking_architecture
from snn_rl.core.network import SpikingNetwork, State
from snn_rl.core.prune import prune_timesteps

if TYPE_CHECKING:
    from snn_rl.core.events import EventDriven

NumpyState = tuple[np.ndarray, ...]  # what `predict` hands out and takes back: one (n_envs, ...) per LIF layer

# Environments times micro-steps up to which it is faster to follow the spikes than to multiply matrices.
EVENT_DRIVEN_STEPS = 6


def q_network_ann(q_net: QNetwork) -> nn.Sequential:
    """The layers of an SB3 Q-network as one module, from preprocessed observations to Q-values."""
    return nn.Sequential(OrderedDict(features=q_net.features_extractor, q=q_net.q_net))


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


def _event_driven(network: SpikingNetwork) -> EventDriven | None:
    try:
        from snn_rl.core.events import EventDriven  # here, where it is needed: numba takes long to import

        return EventDriven(network)
    except ImportError:  # no numba, of which `snn_rl.core.scan` warns
        return None
    except ValueError:  # not a chain: it runs layer by layer
        return None


class SpikingQNetwork(QNetwork):
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
        super().__init__(
            observation_space, action_space, features_extractor, features_dim, net_arch, activation_fn, normalize_images
        )
        # For `save`, so that `load` can build the network anew. Without weights, and in a list: no part of this module.
        self._extractor = [copy.deepcopy(features_extractor).to("meta")]
        self.network = spiking_architecture(q_network_ann(self), timesteps, leak=leak, leak_reset=leak_reset)
        self.persistent = persistent
        self._events = _event_driven(self.network)
        # Converted: keeping the ANN beside it would train and save dead weights.
        self.features_extractor = None  # type: ignore[assignment]
        del self.q_net

    def forward(  # type: ignore[override]
        self, obs: PyTorchObs, state: State | None = None, episode_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One frame: ``obs`` (batch, ...), ``episode_start`` (batch,) -> Q-values (batch, actions), new state."""
        assert isinstance(obs, Tensor)
        q_values, state = self.unroll(obs[None], state, None if episode_start is None else episode_start[None])
        return q_values[0], state

    def unroll(
        self, obs: Tensor, state: State | None = None, episode_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Frames in sequence: ``obs`` (frames, batch, ...) -> Q-values (frames, batch, actions), last state."""
        x, episode_start = self._sequence(obs, episode_start)
        return self.network.unroll(x, state if self.persistent else None, episode_start)

    def pruned(self, timesteps: int, obs: Tensor, episode_start: Tensor) -> SpikingNetwork:
        """`prune_timesteps` of the network on play in sequence; ``obs`` and ``episode_start`` as in `unroll`."""
        return prune_timesteps(self.network, timesteps, *self._sequence(obs, episode_start))

    def _sequence(self, obs: Tensor, episode_start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network unrolls: preprocessed frames (frames, batch, ...), and where membranes are cleared."""
        frames, batch = obs.shape[:2]
        x = self._preprocess(obs.flatten(0, 1)).unflatten(0, (frames, batch))
        return x, episode_start if self.persistent else torch.ones(frames, batch, device=x.device)

    def act(
        self, obs: Tensor, state: NumpyState | None, episode_start: np.ndarray | None
    ) -> tuple[np.ndarray, NumpyState]:
        """`forward` without gradient, on arrays; event-driven where it can be, which is faster for a few environments.

        ``episode_start`` (batch,) is True where membranes are cleared before the frame.
        """
        if state is not None and episode_start is not None and not episode_start.any():
            episode_start = None
        with torch.no_grad():
            few = len(obs) * self.network.timesteps <= EVENT_DRIVEN_STEPS
            if few and self._events is not None and self._events.ready():
                return self._events(self._preprocess(obs), state if self.persistent else None, episode_start)
            device = obs.device
            carries = None if state is None else tuple(torch.as_tensor(carry, device=device) for carry in state)
            starts = None
            if carries is not None and episode_start is not None:
                starts = torch.as_tensor(episode_start, dtype=torch.float32, device=device)
            q_values, new_state = self(obs, carries, starts)
        return q_values.cpu().numpy(), tuple(carry.cpu().numpy() for carry in new_state)

    def _preprocess(self, obs: Tensor) -> Tensor:
        """Observations (batch, ...) as the first synapse takes them."""
        if obs.dim() == 4:  # what convolutions here walk fastest; cheapest while a pixel is a byte
            obs = obs.contiguous(memory_format=torch.channels_last)
        x = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        assert isinstance(x, Tensor)
        return x

    def _get_constructor_parameters(self) -> dict[str, Any]:
        extractor = copy.deepcopy(self._extractor[0]).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*extractor.parameters(), *extractor.buffers()):
                tensor.zero_()
        return {
            **super()._get_constructor_parameters(),
            "features_extractor": extractor,
            "timesteps": self.network.timesteps,
            "leak_reset": next(iter(self.network.lif_layers.values())).leak_reset,
            "persistent": self.persistent,
        }  # thresholds and leaks are parameters

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        return self(observation)[0].argmax(dim=1)


class SpikingDQNPolicy(DQNPolicy):
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
        super().__init__(
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
        if self.training:  # looked at first, for walking through all modules takes as long as a small network's frame
            self.set_training_mode(False)
        obs, vectorized = self._to_tensor(observation, self.q_net.network.device)
        batch = obs.shape[0]
        if state is not None and any(len(carry) != batch for carry in state):
            raise ValueError(
                f"state must hold {batch} environments, as the observation does, got {len(state[0])}; "
                "start again from state=None"
            )
        starts = None
        if episode_start is not None:
            starts = np.asarray(episode_start, dtype=bool).reshape(-1)
            if len(starts) != batch:
                raise ValueError(f"episode_start must hold {batch} flags, one per environment, got {len(starts)}")
        q_values, new_state = self.q_net.act(obs, state, starts)
        actions = q_values.argmax(axis=1)
        return actions if vectorized else actions[0], new_state


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
