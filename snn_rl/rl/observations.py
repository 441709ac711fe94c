"""Dict observations as single arrays: bytes where they are stored, numbers side by side where a network takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space, maybe_transpose
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from stable_baselines3.common.utils import is_vectorized_observation
from torch import Tensor, nn

from snn_rl.rl.spaces import in_one_line


@dataclass(frozen=True)
class _Part:
    """Where a part of an observation lies, in bytes."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: np.dtype
    torch_dtype: torch.dtype


class FlatDict:
    """Observations of a ``Dict`` space as arrays (n, size) of bytes, and back.

    Each part keeps its own type, so that a pixel beside a vector of floats still takes one byte, and nothing is lost.
    """

    def __init__(self, space: spaces.Dict) -> None:
        """``space`` is one that `check_observation_space` lets through."""
        self.space = space
        self._parts: dict[str, _Part] = {}
        dtypes = {key: np.dtype(part.dtype) for key, part in space.spaces.items()}
        self.size = 0
        for key in sorted(dtypes, key=lambda key: -dtypes[key].itemsize):  # each begins at a multiple of its item
            dtype, shape = dtypes[key], space.spaces[key].shape
            assert shape is not None
            stop = self.size + math.prod(shape) * dtype.itemsize
            self._parts[key] = _Part(self.size, stop, shape, dtype, torch.from_numpy(np.empty(0, dtype)).dtype)
            self.size = stop
        whole = max(dtype.itemsize for dtype in dtypes.values())
        self.size = -(-self.size // whole) * whole  # so does each observation

    def batch(self, observation: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], bool]:
        """Observations (n, ...) by key, of a batch or of one bare observation, and whether it was a batch.

        Images may be channels last, as SB3's ``predict`` takes them. Raises ValueError for other keys or shapes than
        those of the space, and for parts of different numbers of observations.
        """
        self._check_keys(observation)
        arrays, is_batch = {}, False
        for key, part in self.space.spaces.items():
            array = np.asarray(observation[key])
            if is_image_space(part):
                array = maybe_transpose(array, part)
            try:
                is_batch = is_vectorized_observation(array, part) or is_batch
            except ValueError as error:
                raise ValueError(f"the observation {key!r} does not fit: {error}") from error
            arrays[key] = array.reshape(-1, *self._parts[key].shape)
        return arrays, is_batch

    def encode(self, observations: Mapping[str, Any]) -> np.ndarray:
        """Bytes (n, size) of observations (n, ...) by key.

        Raises ValueError for other keys, parts of different numbers of observations, or values that are no integers
        where the space has integers.
        """
        self._check_keys(observations)
        arrays = {key: np.asarray(observations[key]).reshape(-1, *part.shape) for key, part in self._parts.items()}
        sizes = {key: len(array) for key, array in arrays.items()}
        n = next(iter(sizes.values()))
        if set(sizes.values()) != {n}:
            raise ValueError(f"the parts of an observation must be of as many environments, got {sizes}")
        encoded = np.zeros((n, self.size), np.uint8)
        for key, part in self._parts.items():
            items = np.ascontiguousarray(self._cast(key, arrays[key], part.dtype)).reshape(n, -1)
            encoded[:, part.start : part.stop] = items.view(np.uint8)
        return encoded

    def decode(self, encoded: Tensor) -> dict[str, Tensor]:
        """The inverse of `encode`: tensors (n, ...) by key, in the order of the space, each of its part's own type."""
        encoded = encoded.contiguous()
        parts = {key: self._parts[key] for key in self.space.spaces}
        return {
            key: encoded[:, part.start : part.stop].view(part.torch_dtype).unflatten(1, part.shape)
            if part.shape
            else encoded[:, part.start : part.stop].view(part.torch_dtype).squeeze(1)
            for key, part in parts.items()
        }

    def _check_keys(self, observations: object) -> None:
        if not isinstance(observations, Mapping) or observations.keys() != self._parts.keys():
            got = sorted(observations) if isinstance(observations, Mapping) else type(observations).__name__
            raise ValueError(f"the observation must be a dict of {sorted(self._parts)}, got {got}")

    def _cast(self, key: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if dtype.kind == "f" or np.can_cast(array.dtype, dtype):
            return array.astype(dtype, copy=False)
        with np.errstate(invalid="ignore"):
            cast = array.astype(dtype)
        if not np.array_equal(cast, array):
            raise ValueError(
                f"the observation {key!r} holds {array.dtype} numbers that its space {in_one_line(self.space[key])} "
                "does not; give it a Box of float32, and where VecNormalize makes them, leave it out of norm_obs_keys"
            )
        return cast


def flat_dict(space: spaces.Space) -> FlatDict | None:
    """The `FlatDict` of a ``Dict`` space, and None of any other, whose observations are arrays as they are."""
    return FlatDict(space) if isinstance(space, spaces.Dict) else None


def side_by_side(parts: dict[str, Tensor]) -> Tensor:
    """Preprocessed parts (n, ...) of Dict observations as one tensor (n, features), as a `FlatExtractor` takes them."""
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


class FlatExtractor(nn.Module):
    """An SB3 features extractor of Dict observations that also takes what `side_by_side` makes of their parts.

    This is the form that `to_spiking` converts: one tensor in, of which the network takes slices.

    Raises:
        ValueError: an extractor that takes no dict.
    """

    def __init__(self, extractor: BaseFeaturesExtractor) -> None:
        super().__init__()
        if isinstance(extractor, FlattenExtractor):
            raise ValueError(
                f"Dict observations need a features extractor that takes a dict, such as SB3's CombinedExtractor, got "
                f"{type(extractor).__name__}"
            )
        self.extractor = extractor
        space = extractor._observation_space
        assert isinstance(space, spaces.Dict)
        self._shapes = {key: _preprocessed_shape(part) for key, part in space.spaces.items()}

    def forward(self, observations: Tensor | dict[str, Tensor]) -> Tensor:
        if isinstance(observations, dict):
            return self.extractor(observations)
        if type(self.extractor) is CombinedExtractor and all(
            type(part) is nn.Flatten for part in self.extractor.extractors.values()
        ):
            return observations  # vectors alone, which it concatenates
        parts, start = {}, 0
        for key, shape in self._shapes.items():
            stop = start + math.prod(shape)
            part = observations[:, start:stop]
            parts[key], start = part if len(shape) == 1 else part.unflatten(1, shape), stop
        return self.extractor(parts)


def _preprocessed_shape(space: spaces.Space) -> tuple[int, ...]:
    """Of one observation behind SB3's ``preprocess_obs``."""
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return tuple(map(int, space.shape))
    return (int(get_flattened_obs_dim(space)),)  # one-hot


def flat_extractor(extractor: nn.Module) -> nn.Module:
    """The `FlatExtractor` of an extractor of Dict observations; any other as it is."""
    if isinstance(extractor, BaseFeaturesExtractor) and isinstance(extractor._observation_space, spaces.Dict):
        return FlatExtractor(extractor)
    return extractor
