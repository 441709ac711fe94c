"""An actor's network with its state: observations and membranes in, outputs and membranes out."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn

from snn_rl.core.convert import DEFAULT_LEAK, spiking_architecture
from snn_rl.core.network import SpikingNetwork, State
from snn_rl.core.prune import prune_timesteps
from snn_rl.rl.heads import Head
from snn_rl.rl.observations import FlatDict, flat_dict, flat_extractor, side_by_side
from snn_rl.rl.statistics import Statistics

if TYPE_CHECKING:
    from snn_rl.core.events import EventDriven

NumpyState = tuple[np.ndarray, ...]  # what `predict` hands out and takes back: one (n_envs, ...) per LIF layer

# Environments times micro-steps up to which it is faster to follow the spikes than to multiply matrices.
EVENT_DRIVEN_STEPS = 6


def layers_of(extractor: nn.Module, mlp: nn.Module) -> nn.Sequential:
    """A features extractor and the layers behind it as one module, from preprocessed observations to outputs.

    An extractor of Dict observations becomes a `FlatExtractor`.
    """
    return nn.Sequential(OrderedDict(features=flat_extractor(extractor), mlp=mlp))


def actor_layers(
    extractor: BaseFeaturesExtractor, net_arch: list[int], outputs: int, activation_fn: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """An actor's layers with fresh weights."""
    return layers_of(extractor, nn.Sequential(*create_mlp(extractor.features_dim, outputs, net_arch, activation_fn)))


class Normalizer(nn.Module):
    """What SB3's ``VecNormalize`` does to an observation, with statistics that no longer change.

    Its ``mean`` and ``var`` (shape of an observation) are buffers, so they are stored with the weights.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.clip, self.epsilon = clip, epsilon

    @property
    def statistics(self) -> Statistics:
        """The statistics that it normalises by."""
        return Statistics(
            self.mean.numpy(force=True).copy(), self.var.numpy(force=True).copy(), self.clip, self.epsilon
        )

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (batch, ...) in float32, normalised in double precision as NumPy does it in SB3."""
        x = (obs.double() - self.mean) / torch.sqrt(self.var + self.epsilon)
        return x.clamp(-self.clip, self.clip).float()


class DictNormalizer(nn.Module):
    """A `Normalizer` for each of some ``keys`` of Dict observations; the other parts are left as they are."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], clip: float, epsilon: float) -> None:
        super().__init__()
        self.clip, self.epsilon = clip, epsilon
        self.parts = nn.ModuleDict({key: Normalizer(shape, clip, epsilon) for key, shape in shapes.items()})

    @property
    def statistics(self) -> Statistics:
        """The statistics that it normalises by."""
        each = {key: part.statistics for key, part in self.parts.items()}
        mean, var = ({key: getattr(one, name) for key, one in each.items()} for name in ("mean", "var"))
        return Statistics(mean, var, self.clip, self.epsilon)

    def forward(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self.parts[key](part) if key in self.parts else part for key, part in obs.items()}


AnyNormalizer = Normalizer | DictNormalizer


def normalizer_of(statistics: Statistics) -> AnyNormalizer:
    """The normaliser of these statistics."""
    mean, var, options = statistics.mean, statistics.var, (statistics.clip, statistics.epsilon)
    if isinstance(mean, dict):
        assert isinstance(var, dict)
        whole = DictNormalizer({key: value.shape for key, value in mean.items()}, *options)
        for key, part in whole.parts.items():
            part.load_state_dict(_tensors(mean[key], var[key]))
        return whole
    assert not isinstance(var, dict)
    normalizer = Normalizer(mean.shape, *options)
    normalizer.load_state_dict(_tensors(mean, var))
    return normalizer


def _tensors(mean: np.ndarray, var: np.ndarray) -> dict[str, Tensor]:
    return {"mean": torch.as_tensor(mean), "var": torch.as_tensor(var)}


def _event_driven(network: nn.Module) -> EventDriven | None:
    try:
        from snn_rl.core.events import EventDriven  # here, where it is needed: numba takes long to import

        return EventDriven(network) if isinstance(network, SpikingNetwork) else None
    except ImportError:  # no numba, of which `snn_rl.core.scan` warns
        return None
    except ValueError:  # not a chain: it runs layer by layer
        return None


class StatefulNetwork:
    """Runs ``network`` on observations, frame by frame or in sequence, with the state passed in and out.

    Dict observations are passed as the bytes (..., size) of a `FlatDict`, which `as_tensor` makes of them.

    A part of modules that have an ``observation_space`` (of one observation, as it comes from the environment) and
    ``normalize_images`` (divide pixels by 255, as in SB3).
    """

    observation_space: spaces.Space
    normalize_images: bool
    network: nn.Module  # a `SpikingNetwork`, or an ordinary one, whose state is empty
    persistent: bool  # carry the membranes from frame to frame; otherwise they are cleared before every frame
    normalizer: AnyNormalizer | None  # applied to each observation before the first synapse
    flat: FlatDict | None  # where observations are dicts

    def _hold(self, network: nn.Module, persistent: bool, normalizer: AnyNormalizer | None = None) -> None:
        self.network, self.persistent, self.normalizer = network, persistent, normalizer
        self.flat = flat_dict(self.observation_space)
        self._events = _event_driven(network)

    @property
    def timesteps(self) -> int | None:
        """Micro-steps per frame; None of an ordinary network."""
        return self.network.timesteps if isinstance(self.network, SpikingNetwork) else None

    def forward(
        self, obs: Tensor, state: State | None = None, episode_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One frame: ``obs`` (batch, ...), ``episode_start`` (batch,) -> outputs (batch, size), new state."""
        out, state = self.unroll(obs[None], state, None if episode_start is None else episode_start[None])
        return out[0], state

    def unroll(
        self, obs: Tensor, state: State | None = None, episode_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Frames in sequence: ``obs`` (frames, batch, ...) -> outputs (frames, batch, size), last state."""
        x, episode_start = self._sequence(obs, episode_start)
        if not isinstance(self.network, SpikingNetwork):
            return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2]), ()
        return self.network.unroll(x, state if self.persistent else None, episode_start)

    def pruned(self, timesteps: int, obs: Tensor, episode_start: Tensor) -> SpikingNetwork:
        """`prune_timesteps` of the network on play in sequence; ``obs`` and ``episode_start`` as in `unroll`."""
        assert isinstance(self.network, SpikingNetwork)
        return prune_timesteps(self.network, timesteps, *self._sequence(obs, episode_start))

    def _sequence(self, obs: Tensor, episode_start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network unrolls: preprocessed frames (frames, batch, ...), and where membranes are cleared."""
        frames, batch = obs.shape[:2]
        x = self.preprocess(obs.flatten(0, 1)).unflatten(0, (frames, batch))
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
            few = len(obs) * (self.timesteps or 1) <= EVENT_DRIVEN_STEPS
            if few and self._events is not None and self._events.ready():
                return self._events(self.preprocess(obs), state if self.persistent else None, episode_start)
            device = obs.device  # that of the network
            carries = None if state is None else tuple(torch.as_tensor(carry, device=device) for carry in state)
            starts = None
            if carries is not None and episode_start is not None:
                starts = torch.as_tensor(episode_start, dtype=torch.float32, device=device)
            out, new_state = self.forward(obs, carries, starts)
        return out.cpu().numpy(), tuple(carry.cpu().numpy() for carry in new_state)

    def as_tensor(self, obs: np.ndarray | dict[str, np.ndarray]) -> Tensor:
        """A batch of observations, as an environment gives them, as a tensor on the network's device."""
        array = obs if self.flat is None else self.flat.encode(obs)  # type: ignore[arg-type]
        return torch.as_tensor(array, device=next(self.network.parameters()).device)

    def preprocess(self, obs: Tensor) -> Tensor:
        """Observations (batch, ...) as the first synapse takes them."""
        if self.flat is not None:
            parts = self.flat.decode(obs)
            if self.normalizer is not None:
                parts = self.normalizer(parts)
            parts = preprocess_obs(parts, self.observation_space, normalize_images=self.normalize_images)  # type: ignore[assignment]
            return side_by_side(parts)
        if obs.dim() == 4:  # what convolutions here walk fastest; cheapest while a pixel is a byte
            obs = obs.contiguous(memory_format=torch.channels_last)
        if self.normalizer is not None:
            obs = self.normalizer(obs)
        x = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        assert isinstance(x, Tensor)
        return x


class ActorNetwork(StatefulNetwork, nn.Module):
    """The network of an `AgentPolicy`: a features extractor and linear layers with ReLUs, or LIF layers in their place.

    ``timesteps`` is None for the ordinary network. ``statistics`` are those that observations are normalised by.

    Raises:
        ValueError: a network that cannot be converted, timesteps or leak out of range.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        head: Head,
        extractor: BaseFeaturesExtractor,
        net_arch: list[int],
        normalize_images: bool = True,
        timesteps: int | None = None,
        leak: float = DEFAULT_LEAK,
        leak_reset: bool = False,
        persistent: bool = True,
        normalizer: AnyNormalizer | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.observation_space, self.normalize_images = observation_space, normalize_images
        layers: nn.Module = actor_layers(extractor, net_arch, head.size)
        if timesteps is not None:
            layers = spiking_architecture(layers, timesteps, leak=leak, leak_reset=leak_reset)
        self._hold(layers, persistent, normalizer)


def numpy_state(state: Any, batch: int) -> NumpyState | None:
    """A state that `predict` was given, checked to hold ``batch`` environments. Raises ValueError where it does not."""
    if state is not None and any(len(carry) != batch for carry in state):
        raise ValueError(
            f"state must hold {batch} environments, as the observation does, got {len(state[0])}; "
            "start again from state=None"
        )
    return state
