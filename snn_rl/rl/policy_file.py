"""`policy.safetensors`: a policy to share and run. Weights, and as JSON all that is needed to rebuild the network.

Loading runs no code from the file: names in it select from the classes listed here, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn

from snn_rl.base.progress import one_line
from snn_rl.base.weights_file import MAX_TIMESTEPS, check_fits, read_weights, write_weights
from snn_rl.rl.actor import actor_of
from snn_rl.rl.features import ConvExtractor
from snn_rl.rl.heads import HEADS, head_of, kind_of
from snn_rl.rl.network import ActorNetwork, NumpyState, normalizer_of
from snn_rl.rl.policy import AgentPolicy, SpikingDQNPolicy, check_forwards, no_schedule
from snn_rl.rl.spaces import check_observation_space, in_one_line
from snn_rl.rl.statistics import Statistics
from snn_rl.rl.teacher import statistics_of

FORMAT = "snn_rl-policy-3"
EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {
    "FlattenExtractor": FlattenExtractor,
    "NatureCNN": NatureCNN,
    "ConvExtractor": ConvExtractor,
    "CombinedExtractor": CombinedExtractor,
}


# What a file may ask for before its weights can be compared with it.
MAX_OBSERVATION = 2**24  # entries
MAX_ACTIONS = 2**16
MAX_LAYERS = 128


@dataclass(frozen=True)
class LoadedPolicy:
    """A greedy policy from a file; `predict` is SB3's, so ``evaluate_policy`` takes it.

    ``timesteps`` is None for an ANN, whose state is always empty. ``metadata["provenance"]`` says where it comes from.
    Observations are taken as the environment gives them: a policy that was trained on normalised ones normalises them.
    """

    policy: AgentPolicy
    metadata: dict[str, Any]

    @property
    def timesteps(self) -> int | None:
        return self.policy.net.timesteps

    @property
    def network(self) -> nn.Module:
        """The `SpikingNetwork`, or the ANN."""
        return self.policy.net.network

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
    ) -> tuple[np.ndarray, NumpyState]:
        """Greedy actions and the membranes afterwards; see `AgentPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic)


def save_policy(agent: BaseAlgorithm | BasePolicy | LoadedPolicy, path: Path | str, provenance: dict[str, Any]) -> None:
    """Write the actor of an agent to ``path``, atomically: a spiking one, or one of SB3 with a network of ReLUs.

    The statistics of a ``VecNormalize`` that the agent was trained in become part of the file. ``provenance`` says
    where it comes from, in whatever JSON holds. The scripts that play a file look for ``recipe``, a name in `RECIPES`
    of ``agents``, and ``env_kwargs``, of its environment.

    Raises:
        ValueError: a features extractor, an activation, a space, a network or a provenance that the format cannot
            hold. Nothing is written then.
    """
    if not isinstance(provenance, dict):
        raise ValueError(f"provenance must be a dict, got {provenance!r}")
    net, description = _described(agent)
    metadata = {**description, "provenance": provenance}
    try:
        metadata = json.loads(json.dumps(metadata, default=_number))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must hold what JSON does: {error}") from error
    write_weights(Path(path), net, FORMAT, metadata)


def check_storable(agent: BaseAlgorithm | BasePolicy | LoadedPolicy) -> None:
    """Raises ValueError for an agent that a policy file cannot hold: what `save_policy` would refuse."""
    _described(agent)


def check_space(space: spaces.Space) -> None:
    """Raises ValueError for an observation or action space that a policy file cannot hold."""
    if _space_from_json(_space_to_json(space)) != space:
        raise ValueError(
            f"a policy file cannot give {in_one_line(space)} of {space.dtype} back; take the default dtype"
        )


def _described(agent: BaseAlgorithm | BasePolicy | LoadedPolicy) -> tuple[nn.Module, dict[str, Any]]:
    """What a file holds of an agent: the module of its weights, and what it says of them.

    Checked by reading it back. ValueError where it would not come back as it is.
    """
    policy: BasePolicy = agent if isinstance(agent, BasePolicy) else agent.policy
    net = nn.Module()  # of an `ActorNetwork`, by the names of its parts
    spiking: dict[str, Any] | None = None
    statistics: Statistics | None = None
    if isinstance(policy, AgentPolicy):
        net = policy.net
        kwargs: dict[str, Any] = policy.agent_kwargs
        kind, net_arch, statistics = kwargs["head"], policy.net_arch, policy.statistics
        if policy.net.timesteps is not None:
            spiking = {name: kwargs[name] for name in ("timesteps", "leak", "leak_reset", "persistent")}
        extractor_class, extractor_kwargs = policy.features_extractor_class, policy.features_extractor_kwargs
    else:
        if isinstance(policy, DQNPolicy):
            check_forwards(policy)
            if policy.activation_fn is not nn.ReLU:
                raise _unknown_activation(policy.activation_fn)
        extractor_class, extractor_kwargs = policy.features_extractor_class, policy.features_extractor_kwargs
        if isinstance(policy, SpikingDQNPolicy):
            kind, net_arch, spiking = "values", policy.net_arch, policy.spiking_kwargs
            net.network = policy.q_net.network
        else:
            _check_extractor(extractor_class)
            actor = actor_of(policy)
            for between in list(actor.mlp)[1::2]:
                if type(between) is not nn.ReLU:
                    raise _unknown_activation(type(between))
            if len(actor.mlp) % 2 == 0:
                last = type(actor.mlp[-1]).__name__
                raise ValueError(f"an actor that ends in a {last} cannot be stored in a policy file; keep model.zip")
            kind, net_arch = kind_of(actor.head), list(actor.net_arch)
            net.network = actor.network
        statistics = statistics_of(agent)
        if statistics is not None:
            net.normalizer = normalizer_of(statistics)
    _check_extractor(extractor_class)
    description = {
        "observation_space": _space_to_json(policy.observation_space),
        "action_space": _space_to_json(policy.action_space),
        "head": kind,
        "net_arch": list(net_arch),
        "features_extractor": extractor_class.__name__,
        "features_extractor_kwargs": extractor_kwargs,
        "normalize_images": policy.normalize_images,
        "spiking": spiking,
        "statistics": None if statistics is None else _statistics_to_json(statistics),
    }
    try:
        description = json.loads(json.dumps(description, default=_number))
        check_fits(_Description({**description, "provenance": {}}).net, net.state_dict())
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the policy cannot be stored in a policy file: {one_line(error)}; keep model.zip") from error
    return net, description


def _check_extractor(extractor: type[BaseFeaturesExtractor]) -> None:
    name = extractor.__name__
    if EXTRACTORS.get(name) is not extractor:
        raise ValueError(
            f"features extractor {name!r} cannot be stored in a policy file, which knows {sorted(EXTRACTORS)}; "
            "keep model.zip"
        )


def _unknown_activation(activation: Any) -> ValueError:
    return ValueError(
        f"activation {activation.__name__} cannot be stored in a policy file, which knows ReLU; train "
        "with ReLU, or keep model.zip"
    )


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
        check_fits(description.net, weights)
        policy = description.policy()
        policy.net.load_state_dict(weights)
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
        sizes = [*self.net_arch, *(self.extractor_kwargs.get(key, 1) for key in ("features_dim", "cnn_output_dim"))]
        sizes += [size for layer in self.extractor_kwargs.get("convolutions", ()) for size in layer]
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"the sizes of layers must be integers >= 1, got {sizes}")
        self.normalize_images = bool(metadata["normalize_images"])
        self.observation_space = _space_from_json(metadata["observation_space"])
        self.action_space = _space_from_json(metadata["action_space"])
        if metadata["head"] not in HEADS:
            raise ValueError(f"unknown head {metadata['head']!r}, known are {', '.join(HEADS)}")
        self.head = metadata["head"]
        self.statistics = None  # placeholders: their values are among the weights
        if metadata["statistics"] is not None:
            self.statistics = _placeholders(metadata["statistics"], self.observation_space)
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

    def net(self) -> ActorNetwork:
        """The network alone, as `policy` builds it."""
        return ActorNetwork(
            self.observation_space,
            head_of(self.head, self.action_space),
            self.extractor(self.observation_space, **self.extractor_kwargs),
            self.net_arch,
            self.normalize_images,
            normalizer=None if self.statistics is None else normalizer_of(self.statistics),
            **(self.spiking or {}),
        )

    def policy(self) -> AgentPolicy:
        return AgentPolicy(
            self.observation_space,
            self.action_space,
            no_schedule,
            head=self.head,
            net_arch=self.net_arch,
            features_extractor_class=self.extractor,
            features_extractor_kwargs=self.extractor_kwargs,
            normalize_images=self.normalize_images,
            statistics=self.statistics,
            **(self.spiking or {}),
        )


def _statistics_to_json(statistics: Statistics) -> dict[str, Any]:
    described: dict[str, Any] = {"clip": statistics.clip, "epsilon": statistics.epsilon}
    return {**described, "keys": list(statistics.mean)} if isinstance(statistics.mean, dict) else described


def _placeholders(value: dict[str, Any], space: spaces.Space) -> Statistics:
    """Statistics of the shapes that a file's have."""
    for name in ("clip", "epsilon"):
        number = value[name]
        if not isinstance(number, int | float) or not 0 <= number < math.inf:
            raise ValueError(f"{name} of the statistics must be a finite number >= 0, got {number!r}")
    options = value["clip"], value["epsilon"]
    if isinstance(space, spaces.Dict):
        shapes = {str(key): space[key].shape or () for key in value["keys"]}
        mean, var = ({key: of(shape) for key, shape in shapes.items()} for of in (np.zeros, np.ones))
        statistics = Statistics(mean, var, *options)
    else:
        statistics = Statistics(np.zeros(space.shape or ()), np.ones(space.shape or ()), *options)
    statistics.check_space(space)
    return statistics


def _space_to_json(space: spaces.Space) -> dict[str, Any]:
    if isinstance(space, spaces.Discrete):
        if space.start != 0:
            raise ValueError(f"a policy file knows Discrete spaces from 0 on, not {space}; subtract the start")
        return {"type": "Discrete", "n": int(space.n)}
    if isinstance(space, spaces.MultiDiscrete):
        if np.any(space.start) or space.nvec.ndim != 1:
            raise ValueError(f"a policy file knows MultiDiscrete spaces of one axis, from 0 on, not {space}")
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.MultiBinary):
        # of 4 bits and of shape (4,) are not equal to gymnasium
        return {"type": "MultiBinary", "shape": space.n if isinstance(space.n, int) else list(space.shape)}
    if isinstance(space, spaces.Box):
        low, high = (
            bound.flat[0].item() if bound.size and (bound == bound.flat[0]).all() else bound.tolist()
            for bound in (space.low, space.high)
        )
        return {"type": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Dict):
        if nested := [key for key, part in space.spaces.items() if isinstance(part, spaces.Dict)]:
            raise ValueError(f"a policy file knows no Dict in a Dict, got {nested}; flatten it")
        return {"type": "Dict", "spaces": [[key, _space_to_json(part)] for key, part in space.spaces.items()]}
    raise ValueError(
        "a policy file knows Box, Discrete, MultiDiscrete, MultiBinary and Dict spaces, not "
        f"{' '.join(str(space).split())}; keep model.zip"
    )


def _space_from_json(value: dict[str, Any]) -> spaces.Space:
    kind = value["type"]
    if kind == "Discrete":
        return spaces.Discrete(_choices(value["n"]))
    if kind == "MultiDiscrete":
        nvec = [_choices(n) for n in value["nvec"]]
        if not 1 <= len(nvec) <= MAX_ACTIONS:
            raise ValueError(f"the number of components must lie in [1, {MAX_ACTIONS}], got {len(nvec)}")
        return spaces.MultiDiscrete(nvec)
    if kind == "MultiBinary":
        n = value["shape"]
        return spaces.MultiBinary(*_shape({"shape": [n]}) if isinstance(n, int) else [_shape(value)])
    if kind == "Box":
        shape, dtype = _shape(value), np.dtype(str(value["dtype"]))
        if dtype.kind not in "uifb":
            raise ValueError(f"observations must be numbers or booleans, got {dtype}")
        with np.errstate(over="raise"):
            low, high = (np.broadcast_to(np.asarray(value[key], dtype=dtype), shape) for key in ("low", "high"))
        return spaces.Box(low, high, shape, dtype=dtype.type)
    if kind == "Dict":
        parts = {str(key): part for key, part in value["spaces"]}
        if not 1 <= len(parts) <= MAX_LAYERS or len(parts) < len(value["spaces"]):
            raise ValueError(f"a Dict must have 1 to {MAX_LAYERS} parts, each of its own key, got {len(parts)}")
        if nested := [key for key, part in parts.items() if part["type"] == "Dict"]:
            raise ValueError(f"a policy file knows no Dict in a Dict, got {nested}")
        space = spaces.Dict(OrderedDict((key, _space_from_json(part)) for key, part in parts.items()))  # in this order
        check_observation_space(space)
        if (entries := sum(math.prod(part.shape or ()) for part in space.spaces.values())) > MAX_OBSERVATION:
            raise ValueError(f"an observation must have 1 to {MAX_OBSERVATION:,} entries, got {entries:,}")
        return space
    raise ValueError(f"unknown space {kind!r}")


def _choices(value: Any) -> int:
    n = int(value)
    if not 1 <= n <= MAX_ACTIONS:
        raise ValueError(f"the number of actions must lie in [1, {MAX_ACTIONS}], got {n}")
    return n


def _shape(value: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(map(int, value["shape"]))
    if not shape:
        raise ValueError("an observation must have an axis, got shape (): make it (1,)")
    if not all(side >= 1 for side in shape) or math.prod(shape) > MAX_OBSERVATION:
        raise ValueError(f"an observation must have 1 to {MAX_OBSERVATION:,} entries, got shape {shape}")
    return shape
