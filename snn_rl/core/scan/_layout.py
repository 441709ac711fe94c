"""How the memory of a LIF layer's input is walked by the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Layout:
    """Steps of ``rows`` times ``width`` neurons: rows are samples where frames reset them, else there is one row.

    Channels-last currents stay channels-last: neurons are independent, so that their order does not matter.
    """

    def __init__(self, current: Tensor, keep: Tensor | None, hold: int) -> None:
        steps, *shape = current.shape
        self.shape = tuple(shape)
        neurons = math.prod(shape)
        self.device = current.device
        self.steps = steps * hold
        self.hold = hold
        self.frame = self.steps if keep is None else self.steps // keep.shape[0]
        self.rows = 1 if keep is None else shape[0]
        self.width = neurons // self.rows if neurons else 0
        self.strides = _contiguous(self.shape)
        if len(shape) == 4 and not current.is_contiguous():
            _, channels, height, width = shape
            channels_last = (channels * height * width, 1, width * channels, channels)
            if _has_strides(current, (neurons, *channels_last)):
                self.strides = channels_last

    def dense(self, x: Tensor) -> Tensor:
        """``x`` (steps, batch, ...) or (batch, ...) as memory that the kernels walk through."""
        strides = self.strides if x.dim() == len(self.shape) else (math.prod(self.shape), *self.strides)
        if _has_strides(x, strides):
            return x
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)

    def empty(self, dtype: torch.dtype, *steps: int) -> Tensor:
        """A new tensor (*steps, batch, ...) that is `dense`."""
        strides = (math.prod(self.shape), *self.strides) if steps else self.strides
        return torch.empty_strided((*steps, *self.shape), strides, dtype=dtype, device=self.device)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def _has_strides(x: Tensor, strides: tuple[int, ...]) -> bool:
    actual = x.stride()
    return actual == strides or all(
        size == 1 or mine == wanted for size, mine, wanted in zip(x.shape, actual, strides, strict=True)
    )
