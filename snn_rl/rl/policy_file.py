"""`policy.safetensors`: a policy to share and run. Weights, and as JSON all that is needed to rebuild the network.

Loading runs no code from the file: names in it select from the classes listed here, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from snn_rl.base.progress import one_line
from snn_rl.base.weights_file import MAX_TIMESTEPS, check_fits, read_weights, write_weights
from snn_rl.core.network import SpikingNetwork
from snn_rl.rl.features import ConvExtractor
from snn_rl.rl.policy import NumpyState, SpikingDQNPolicy, SpikingQNetwork, check_forwards

FORMAT = "snn_rl-policy-2"
EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {
    "FlattenExtractor": FlattenExtractor,
    "NatureCNN": NatureCNN,
    "ConvExtractor": ConvExtractor,
}


# What a file may ask for before its weights can be compared with it.
MAX_OBSERVATION = 2**24  # entries
MAX_ACTIONS = 2**16
MAX_LAYERS = 128


@dataclass(frozen=True)
class LoadedPolicy:
    """A greedy policy from a file; `predict` is SB3's, so ``evaluate_policy`` takes it.

    ``timesteps`` is None for an ANN, whose state is always None. ``metadata["provenance"]`` says where it comes from.
    """

    policy: DQNPolicy
    metadata: dict[str, Any]

    @property
    def timesteps(self) -> int | None:
        return self.network.timesteps if isinstance(self.network, SpikingNetwork) else None

    @property
    def network(self) -> nn.Module:
        """The `SpikingNetwork`, or the ANN's Q-network."""
        q_net = self.policy.q_net
        return q_net.network if isinstance(self.policy, SpikingDQNPolicy) else q_net  # type: ignore[return-value]

    @property
    def observation_space(self) -> spaces.Space:
        return self.policy.observation_space

    @property
    def action_space(self) -> spaces.Space:
        return self.policy.action_space

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, NumpyState | None]:
        """Greedy actions and the membranes afterwards; see `SpikingDQNPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic)


def save_policy(model: DQN, path: Path | str, provenance: dict[str, Any]) -> None:
    """Write the online network of an SB3 DQN or a `SpikingDQN` to ``path``, atomically.

    ``provenance`` says where it comes from, in whatever JSON holds. The scripts that play a file look for ``recipe``, a
    name in `RECIPES` of ``agents``, and ``env_kwargs``, of its environment.

    Raises:
        ValueError: a features extractor, an activation, a space, a Q-network or a provenance that the format cannot
            hold. Nothing is written then.
    """
    if not isinstance(provenance, dict):
        raise ValueError(f"provenance must be a dict, got {provenance!r}")
    policy = model.policy
    metadata = {**_description(policy), "provenance": provenance}
    try:
        metadata = json.loads(json.dumps(metadata, default=_number))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must hold what JSON does: {error}") from error
    write_weights(Path(path), policy.q_net, FORMAT, metadata)


def check_storable(policy: DQNPolicy) -> None:
    """Raises ValueError for a policy that a policy file cannot hold: what `save_policy` would refuse."""
    _description(policy)


def check_space(space: spaces.Space) -> None:
    """Raises ValueError for an observation or action space that a policy file cannot hold."""
    _space_from_json(_space_to_json(space))


def _description(policy: DQNPolicy) -> dict[str, Any]:
    """What a file says of a policy, checked by reading it back. ValueError where it would not come back as it is."""
    check_forwards(policy)
    extractor = policy.features_extractor_class.__name__
    if EXTRACTORS.get(extractor) is not policy.features_extractor_class:
        raise ValueError(
            f"features extractor {extractor!r} cannot be stored in a policy file, which knows {sorted(EXTRACTORS)}; "
            "keep model.zip"
        )
    if policy.activation_fn is not nn.ReLU:
        raise ValueError(
            f"activation {policy.activation_fn.__name__} cannot be stored in a policy file, which knows ReLU; train "
            "with ReLU, or keep model.zip"
        )
    description = {
        "observation_space": _space_to_json(policy.observation_space),
        "action_space": _space_to_json(policy.action_space),
        "net_arch": list(policy.net_arch),
        "features_extractor": extractor,
        "features_extractor_kwargs": policy.features_extractor_kwargs,
        "normalize_images": policy.normalize_images,
        "spiking": policy.spiking_kwargs if isinstance(policy, SpikingDQNPolicy) else None,
    }
    try:
        description = json.loads(json.dumps(description, default=_number))
        check_fits(_Description({**description, "provenance": {}}).q_net, policy.q_net.state_dict())
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the policy cannot be stored in a policy file: {one_line(error)}; keep model.zip") from error
    return description


def _number(value: object) -> object:
    """A number of numpy's as one of Python's, which JSON holds."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r}")


def load_policy(path: str | Path, device: str = "cpu") -> LoadedPolicy:
    """Load a policy file; runs no code from it.

    Raises:
        ValueError: a missing, truncated or foreign file, or weights that do not fit its description.
    """
    path = Path(path)
    metadata, weights = read_weights(path, FORMAT, "policy", "policy.safetensors")
    try:
        description = _Description(metadata)
        check_fits(description.q_net, weights)
        policy = description.policy()
        policy.q_net.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{path} describes no policy that can be built: {one_line(error)}") from error
    policy.set_training_mode(False)
    return LoadedPolicy(policy.to(device), metadata)


class _Description:
    """What a policy file says of its network, checked as far as it can be without building it."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        extractor = metadata["features_extractor"]
        if extractor not in EXTRACTORS:
            raise ValueError(f"unknown features extractor {extractor!r}, known are {sorted(EXTRACTORS)}")
        self.extractor = EXTRACTORS[extractor]
        self.extractor_kwargs = dict(metadata["features_extractor_kwargs"])
        if "convolutions" in self.extractor_kwargs:
            self.extractor_kwargs["convolutions"] = tuple(map(tuple, self.extractor_kwargs["convolutions"]))
        self.net_arch = list(metadata["net_arch"])
        layers = len(self.net_arch) + len(self.extractor_kwargs.get("convolutions", ()))
        if layers > MAX_LAYERS:
            raise ValueError(f"a policy may have at most {MAX_LAYERS} layers, got {layers}")
        sizes = [*self.net_arch, self.extractor_kwargs.get("features_dim", 1)]
        sizes += [size for layer in self.extractor_kwargs.get("convolutions", ()) for size in layer]
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"the sizes of layers must be integers >= 1, got {sizes}")
        self.normalize_images = bool(metadata["normalize_images"])
        self.observation_space = _space_from_json(metadata["observation_space"])
        action_space = _space_from_json(metadata["action_space"])
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"the action space must be Discrete, got {action_space}")
        self.action_space = action_space
        if not isinstance(metadata["provenance"], dict):
            raise ValueError(f"provenance must be an object, got {metadata['provenance']!r}")
        self.spiking = metadata["spiking"]
        if self.spiking is None:
            return
        if self.spiking.get("timesteps", 1) > MAX_TIMESTEPS:
            raise ValueError(f"timesteps must be <= {MAX_TIMESTEPS}, got {self.spiking['timesteps']}")
        for name in ("leak_reset", "persistent"):
            if not isinstance(self.spiking.get(name, False), bool):
                raise ValueError(f"{name} must be true or false, got {self.spiking[name]!r}")

    def q_net(self) -> nn.Module:
        """The network alone, as `policy` builds it."""
        extractor = self.extractor(self.observation_space, **self.extractor_kwargs)
        kwargs: dict[str, Any] = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "features_extractor": extractor,
            "features_dim": extractor.features_dim,
            "net_arch": self.net_arch,
            "normalize_images": self.normalize_images,
        }
        return QNetwork(**kwargs) if self.spiking is None else SpikingQNetwork(**kwargs, **self.spiking)

    def policy(self) -> DQNPolicy:
        kwargs: dict[str, Any] = {
            "net_arch": self.net_arch,
            "features_extractor_class": self.extractor,
            "features_extractor_kwargs": self.extractor_kwargs,
            "normalize_images": self.normalize_images,
        }
        if self.spiking is None:
            return DQNPolicy(self.observation_space, self.action_space, _no_schedule, **kwargs)
        return SpikingDQNPolicy(self.observation_space, self.action_space, _no_schedule, **kwargs, **self.spiking)


def _no_schedule(_: float) -> float:
    return 0.0  # a loaded policy is run, not trained


def _space_to_json(space: spaces.Space) -> dict[str, Any]:
    if isinstance(space, spaces.Discrete):
        if space.start != 0:
            raise ValueError(f"a policy file knows Discrete spaces from 0 on, not {space}; subtract the start")
        return {"type": "Discrete", "n": int(space.n)}
    if isinstance(space, spaces.Box):
        low, high = (
            bound.flat[0].item() if bound.size and (bound == bound.flat[0]).all() else bound.tolist()
            for bound in (space.low, space.high)
        )
        return {"type": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    raise ValueError(f"a policy file knows Box and Discrete spaces, not {' '.join(str(space).split())}; keep model.zip")


def _space_from_json(value: dict[str, Any]) -> spaces.Space:
    if value["type"] == "Discrete":
        n = int(value["n"])
        if not 1 <= n <= MAX_ACTIONS:
            raise ValueError(f"the number of actions must lie in [1, {MAX_ACTIONS}], got {n}")
        return spaces.Discrete(n)
    if value["type"] == "Box":
        shape, dtype = tuple(map(int, value["shape"])), np.dtype(str(value["dtype"]))
        if not shape:
            raise ValueError("an observation must have an axis, got shape (): make it (1,)")
        if not all(side >= 1 for side in shape) or math.prod(shape) > MAX_OBSERVATION:
            raise ValueError(f"an observation must have 1 to {MAX_OBSERVATION:,} entries, got shape {shape}")
        if dtype.kind not in "uifb":
            raise ValueError(f"observations must be numbers or booleans, got {dtype}")
        with np.errstate(over="raise"):
            low, high = (np.broadcast_to(np.asarray(value[key], dtype=dtype), shape) for key in ("low", "high"))
        return spaces.Box(low, high, shape, dtype=dtype.type)
    raise ValueError(f"unknown space {value['type']!r}")
