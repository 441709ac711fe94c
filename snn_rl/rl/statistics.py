"""The statistics by which an agent's observations were normalised: those of SB3's ``VecNormalize``.

Reading ``vecnormalize.pkl`` runs no code from the file: its classes are replaced by stand-ins that only keep what the
pickle says about them.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from snn_rl.core.plain import first_line
from snn_rl.rl.spaces import in_one_line

MAX_BYTES = 2**28  # of a file: statistics of images, and the last observations of many environments, take less


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and variance of observations, of the shape of one; of a ``Dict`` space, dicts of those of normalised keys.

    Raises:
        ValueError: values that are not finite, a negative variance, or a mean and a variance of different shapes.
    """

    mean: np.ndarray | dict[str, np.ndarray]
    var: np.ndarray | dict[str, np.ndarray]
    clip: float  # normalised observations lie in [-clip, clip]
    epsilon: float  # added to the variance

    def __post_init__(self) -> None:
        for name, value, least in (("clip", self.clip, "> 0"), ("epsilon", self.epsilon, ">= 0")):
            if not np.isfinite(value) or value < 0 or (value == 0 and least == "> 0"):
                raise ValueError(f"{name} must be finite and {least}, got {value}")
        mean, var = _by_key(self.mean), _by_key(self.var)
        if mean.keys() != var.keys():
            raise ValueError(f"mean and variance must be of the same keys, got {sorted(mean)} and {sorted(var)}")
        for key, m in mean.items():
            v, of = var[key], f" of {key!r}" if key else ""
            if m.shape != v.shape:
                raise ValueError(f"mean and variance{of} must have one shape, got {m.shape} and {v.shape}")
            if not (np.isfinite(m).all() and np.isfinite(v).all()):
                raise ValueError(f"mean and variance{of} must be finite")
            if (v < 0).any() or not (v + self.epsilon > 0).all():
                raise ValueError(f"the variance{of} must be >= 0, and > 0 with epsilon, got {v.min()}")

    @classmethod
    def of(cls, vec_normalize: VecNormalize) -> Statistics | None:
        """A copy of the present statistics of ``vec_normalize``; None where it leaves observations as they are."""
        if not vec_normalize.norm_obs:
            return None
        rms: Any = vec_normalize.obs_rms
        if isinstance(rms, dict):
            keys = vec_normalize.norm_obs_keys or list(rms)
            mean, var = ({key: getattr(rms[key], name).copy() for key in keys} for name in ("mean", "var"))
        else:
            mean, var = rms.mean.copy(), rms.var.copy()
        return cls(mean, var, vec_normalize.clip_obs, vec_normalize.epsilon)

    def around(self, env: VecEnv) -> VecNormalize:
        """``env`` in a ``VecNormalize`` of these statistics, which no longer change; rewards are as they are."""
        by_key = isinstance(self.mean, dict)
        keys = list(self.mean) if by_key else None
        options: dict[str, Any] = {"clip_obs": self.clip, "epsilon": self.epsilon, "norm_obs_keys": keys}
        made = VecNormalize(env, training=False, norm_reward=False, **options)
        all_rms = made.obs_rms if by_key else {"": made.obs_rms}
        for key, mean in _by_key(self.mean).items():
            rms: RunningMeanStd = all_rms[key]  # type: ignore[assignment]
            rms.mean, rms.var, rms.count = mean.copy(), _by_key(self.var)[key].copy(), 1.0
        return made

    def normalize(self, obs: Any) -> Any:
        """Observations (..., *shape) as ``VecNormalize.normalize_obs`` returns them, in float32, to the bit.

        Of a dict, the keys that have statistics are normalised.
        """
        if isinstance(self.mean, dict):
            assert isinstance(self.var, dict)
            return {**obs, **{key: self._scaled(obs[key], self.mean[key], self.var[key]) for key in self.mean}}
        assert isinstance(self.var, np.ndarray)
        return self._scaled(obs, self.mean, self.var)

    def _scaled(self, obs: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        return np.clip((obs - mean) / np.sqrt(var + self.epsilon), -self.clip, self.clip).astype(np.float32)

    def check_space(self, observation_space: spaces.Space) -> None:
        """Raise ValueError where these are not statistics of observations in ``observation_space``."""
        shapes = {key: value.shape for key, value in _by_key(self.mean).items()}
        if isinstance(self.mean, dict) != isinstance(observation_space, spaces.Dict):
            of = f"a Dict with {sorted(shapes)}" if isinstance(self.mean, dict) else f"shape {shapes['']}"
            raise ValueError(f"the statistics are of {of}, the observations are {in_one_line(observation_space)}")
        parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        if missing := sorted(shapes.keys() - parts.keys()):
            raise ValueError(f"the statistics are of {missing}, which the observations lack: they have {sorted(parts)}")
        for key, shape in shapes.items():
            if not isinstance(parts[key], spaces.Box) or parts[key].shape != shape:
                of = f" of {key!r}" if key else ""
                raise ValueError(
                    f"the statistics{of} are of shape {shape}, the observations of {parts[key].shape} "
                    f"({in_one_line(parts[key])})"
                )


def copy_statistics(source: VecNormalize, target: VecNormalize) -> None:
    """Give ``target`` the statistics of ``source``, of observations and of rewards, and their counts."""
    if source.norm_obs:
        target.obs_rms = deepcopy(source.obs_rms)
    target.ret_rms = deepcopy(source.ret_rms)


def frozen(source: VecNormalize, env: VecEnv) -> VecNormalize:
    """``env`` in a ``VecNormalize`` of the present statistics of ``source``; rewards are as they are."""
    options = {name: getattr(source, name) for name in ("norm_obs", "clip_obs", "epsilon", "norm_obs_keys")}
    made = VecNormalize(env, training=False, norm_reward=False, **options)
    copy_statistics(source, made)
    return made


def read_vecnormalize(path: Path | str, observation_space: spaces.Space) -> Statistics | None:
    """The statistics in a file that ``VecNormalize.save`` wrote; None where it leaves observations as they are.

    Raises:
        ValueError: a file that is missing, damaged or of another kind; one that names a class besides those of a
            ``VecNormalize``; or statistics that are invalid or do not fit ``observation_space``. One line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file of VecNormalize at {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a saved VecNormalize has up to {MAX_BYTES:,}")
    try:
        statistics = _statistics(_Unpickler(io.BytesIO(path.read_bytes())).load())
        if statistics is not None:
            statistics.check_space(observation_space)
    except Exception as error:  # a damaged pickle raises anything
        if type(error) is ValueError:  # said here, or by numpy of an array
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path} is not a VecNormalize that SB3 saved, or it is damaged ({reason})") from error
    return statistics


# --- reading ------------------------------------------------------------------------------------------------------


class _Inert:
    """Stands in for an object of a pickle: keeps the arguments and the state it was made from, and does nothing."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> _Inert:
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # an entry of a Dict space


_NAMES = {
    "stable_baselines3.common.vec_env.vec_normalize": {"VecNormalize"},
    "stable_baselines3.common.running_mean_std": {"RunningMeanStd"},
    "collections": {"OrderedDict"},
    "numpy": {"ndarray", "dtype", "bool_", "float32", "float64", "int8", "int32", "int64", "uint8"},
} | {
    f"numpy.{core}.{module}": names
    for core in ("core", "_core")
    for module, names in (("multiarray", {"_reconstruct", "scalar"}), ("numeric", {"_frombuffer"}))
}
# Spaces, and the random generators inside them, are left unread.
_UNREAD = re.compile(r"(gym|gymnasium)\.spaces(\.\w+)?|numpy\.random(\.\w+)?")


class _Unpickler(pickle._Unpickler):  # the one in Python: in C, a few bytes can claim gigabytes for the memo
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()) and not (_UNREAD.fullmatch(module) and name.isidentifier()):
            raise ValueError(f"it holds {ascii(f'{module}.{name}')[:200]}, which no VecNormalize does; it is not read")
        return type(name, (_Inert,), {"name": name})


def _statistics(saved: Any) -> Statistics | None:
    state = _state(saved, "VecNormalize")
    if not isinstance(state["norm_obs"], bool):
        raise ValueError("norm_obs must be True or False")
    if not state["norm_obs"]:
        return None
    rms = state["obs_rms"]
    if isinstance(rms, dict):
        keys = state.get("norm_obs_keys")  # older versions normalised all
        rms = {key: _state(rms[key], "RunningMeanStd") for key in (rms if keys is None else keys)}
        mean, var = ({key: _array(rms[key][name]) for key in rms} for name in ("mean", "var"))
        return Statistics(mean, var, _number(state["clip_obs"]), _number(state["epsilon"]))
    rms = _state(rms, "RunningMeanStd")
    return Statistics(_array(rms["mean"]), _array(rms["var"]), _number(state["clip_obs"]), _number(state["epsilon"]))


def _state(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, _Inert) or value.name != name or not isinstance(value.state, dict):
        raise ValueError(f"it should hold a {name}, and holds a {getattr(value, 'name', type(value).__name__)}")
    return value.state


def _array(value: Any) -> np.ndarray:
    """An array of numbers, from the parts that numpy pickles."""
    if isinstance(value, int | float):
        return np.asarray(value, dtype=np.float64)
    if not isinstance(value, _Inert):
        raise ValueError(f"it should hold an array, and holds a {type(value).__name__}")
    fortran = False
    if value.name == "_reconstruct":
        shape, dtype, fortran, raw = value.state[-4:]
    elif value.name == "_frombuffer":
        raw, dtype, shape, order = value.args
        fortran = order == "F"
    elif value.name == "scalar":
        dtype, raw = value.args
        shape = ()
    else:
        raise ValueError(f"it should hold an array, and holds a {value.name}")
    code, order = str(dtype.args[0]), dtype.state[1] if dtype.state else "="
    if order not in ("<", ">", "=", "|"):
        raise ValueError(f"the byte order of an array must be one of < > = |, got {order!r}")
    if not re.fullmatch(r"f[248]|[iu][1248]", code):
        raise ValueError(f"an array must hold numbers, got the type {code!r}")
    stored = np.frombuffer(raw, dtype=np.dtype(order + code))
    return stored.reshape(shape, order="F" if fortran else "C").astype(np.dtype(code))


def _number(value: Any) -> float:
    return float(_array(value).reshape(()))


def _by_key(value: np.ndarray | Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return value if isinstance(value, Mapping) else {"": value}
