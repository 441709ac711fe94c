"""The LIF scan in plain PyTorch: the oracle of the tests, and what runs where no kernel can."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from snn_rl.core.surrogate import surrogate_gradient

MIN_THRESHOLD = 1e-6


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient is dropped only where a descent step would lead further out of bounds.

    The gradient of `torch.clamp` is zero outside, so that a parameter once thrown out would stay there.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (value,), (low, high), (grad,) = ctx.saved_tensors, ctx.bounds, grad_outputs
        outward = ((value <= low) & (grad > 0)) | ((value >= high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


def bounded_threshold(raw: Tensor) -> Tensor:
    """``v``, at least `MIN_THRESHOLD`."""
    return _Bounded.apply(raw, MIN_THRESHOLD, math.inf)


def bounded_leak(raw: Tensor) -> Tensor:
    """``l``, in [0, 1]."""
    return _Bounded.apply(raw, 0.0, 1.0)


def reference_scan(
    current: Tensor,
    carry: Tensor | None,
    raw_threshold: Tensor,
    raw_leak: Tensor,
    keep: Tensor | None = None,
    hold: int = 1,
    leak_reset: bool = False,
    with_carry: bool = True,
) -> tuple[Tensor, Tensor]:
    """`snn_rl.core.scan.lif_scan` on any device; half precision is computed in single, the carry stays in single."""
    dtype = current.dtype
    compute = torch.float32 if dtype.itemsize < 4 else dtype
    current = current.to(compute)
    if hold > 1:
        current = current.repeat_interleave(hold, 0)
    carry = torch.zeros_like(current[0]) if carry is None else carry.to(compute)
    if keep is not None:
        keep = (keep != 0).reshape(*keep.shape, *[1] * (current.dim() - 2))
    v, leak = bounded_threshold(raw_threshold), bounded_leak(raw_leak)
    spikes, carry = _Scan.apply(current, carry, v, leak, keep, leak_reset)
    return spikes.to(dtype), carry if with_carry else carry.new_empty(0)


class _Scan(torch.autograd.Function):
    """The reference, with its backward pass written out.

    Backward keeps the membrane potential alone; the spikes of the reset are recomputed from it. With
    ``g[t] = dL/dcarry[t]`` and ``s`` the surrogate do/dz at ``z = u / v - 1``:

        dL/du[t] = dL/do[t] * s / v + leak * g[t]      g[t-1] = dL/du[t] (0 where a frame starts from silence)
        dL/dv    = -sum(dL/do * s * u / v^2) - sum(g * o)          dL/dleak = sum(g * u)
    """

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, carry: Tensor, v: Tensor, leak: Tensor, keep: Tensor | None, leak_reset: bool
    ) -> tuple[Tensor, Tensor]:
        steps = current.shape[0]
        frame = steps if keep is None else steps // keep.shape[0]  # micro-steps per frame
        u = torch.empty(current.shape, dtype=current.dtype, device=current.device)
        spikes = torch.empty_like(u)
        minus_reset = -v * leak if leak_reset else -v
        for t in range(steps):
            if keep is not None and t % frame == 0:
                carry = carry.where(keep[t // frame], 0)  # selected: 0 times NaN is NaN
            torch.add(carry, current[t], out=u[t])  # integrate
            torch.gt(u[t], v, out=spikes[t])  # fire
            carry = torch.addcmul(leak * u[t], spikes[t], minus_reset)  # reset
        ctx.save_for_backward(u, v, leak, *([] if keep is None else [keep]))
        ctx.leak_reset, ctx.spikes_again = leak_reset, _spikes_again
        return spikes, carry

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        grad_spikes, grad_carry = grad_outputs
        u, v, leak, *masks = ctx.saved_tensors
        keep = masks[0] if masks else None
        steps = u.shape[0]
        frame = steps if keep is None else steps // keep.shape[0]
        through_spike = grad_spikes * (surrogate_gradient((u - v) / v) / v)  # dL/do * do/du
        grad_u, grad_carries = torch.empty_like(u), torch.empty_like(u)
        for t in reversed(range(steps)):
            grad_carries[t] = grad_carry
            grad_carry = torch.addcmul(through_spike[t], grad_carry, leak, out=grad_u[t])
            if keep is not None and t % frame == 0:
                grad_carry = grad_carry.where(keep[t // frame], 0)
        reset = (grad_carries * (u > v)).sum()
        grad_v = -(through_spike * u).sum() / v - reset * (leak if ctx.leak_reset else 1)
        grad_leak = (grad_carries * u).sum() - (reset * v if ctx.leak_reset else 0)
        return grad_u, grad_carry, grad_v, grad_leak, None, None


def _spikes_again(ctx: Any) -> Tensor:
    u, v, *_ = ctx.saved_tensors
    return torch.gt(u, v, out=torch.empty_like(u))
