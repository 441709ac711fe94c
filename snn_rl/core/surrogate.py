"""The spike and its surrogate gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GAMMA = 0.3  # height of the surrogate gradient at the threshold (Bellec et al. 2018)


def surrogate_gradient(z: Tensor, gamma: float = GAMMA) -> Tensor:
    """``do/dz ~ gamma * max(0, 1 - |z|)``, the piecewise-linear stand-in for the derivative of the step."""
    return gamma * torch.clamp(1 - z.abs(), min=0)


class _PiecewiseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.gamma = gamma
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad_outputs[0] * surrogate_gradient(z, ctx.gamma), None


def spike(z: Tensor, gamma: float = GAMMA) -> Tensor:
    """1 where ``z > 0``, else 0; backward, `surrogate_gradient`.

    ``z = u / v - 1`` is the membrane potential's relative distance from the threshold, of any shape.
    Source: Bellec et al. 2018, equation 3; the form used by DIET-SNN and temporal pruning.
    """
    return _PiecewiseLinear.apply(z, gamma)
