"""The leaky integrate-and-fire (LIF) layer.

Chowdhury, Rathi, Roy, "Towards Ultra Low Latency Spiking Neural Networks for Vision and Sequential Tasks Using
Temporal Pruning", equation 2, with leak ``l`` and threshold ``v``, one pair per layer:

    u[t] = l * u[t-1] + current[t] - v * o[t-1]
    o[t] = 1 if u[t] > v else 0

Between steps only ``carry[t] = l * u[t] - v * o[t]`` has to survive, so the carry is the layer's whole state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from snn_rl.surrogate import surrogate_gradient

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


class _Scan(torch.autograd.Function):
    """A LIF layer through all frames and micro-steps, with its backward pass written out.

    Backward keeps the membrane potential alone; the spikes of the reset are recomputed from it. With
    ``g[t] = dL/dcarry[t]`` and ``s`` the surrogate do/dz at ``z = u / v - 1``:

        dL/du[t] = dL/do[t] * s / v + leak * g[t]      g[t-1] = dL/du[t] (times keep, where a frame starts)
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
                carry = carry * keep[t // frame]
            torch.add(carry, current[t], out=u[t])  # integrate
            torch.gt(u[t], v, out=spikes[t])  # fire
            carry = torch.addcmul(leak * u[t], spikes[t], minus_reset)  # reset
        ctx.save_for_backward(u, v, leak, *([] if keep is None else [keep]))
        ctx.leak_reset = leak_reset
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
                grad_carry = grad_carry * keep[t // frame]
        reset = (grad_carries * (u > v)).sum()
        grad_v = -(through_spike * u).sum() / v - reset * (leak if ctx.leak_reset else 1)
        grad_leak = (grad_carries * u).sum() - (reset * v if ctx.leak_reset else 0)
        return grad_u, grad_carry, grad_v, grad_leak, None, None


class LIF(nn.Module):
    """A layer of LIF neurons with one trainable threshold and one trainable leak, and soft reset.

    Args:
        threshold: initial ``v`` > 0, in the units of the current.
        leak: initial ``l`` in [0, 1]; the fraction of the membrane potential kept from step to step.
        leak_reset: False for the paper's ``carry = l * u - v * o``, True for DIET-SNN's ``carry = l * (u - v * o)``.

    ``threshold`` and ``leak`` are read through bounds, so they stay legal whatever an optimiser does to the
    parameters ``raw_threshold`` and ``raw_leak`` behind them. As in DIET-SNN the spike inside the reset term is a
    constant for the gradient; the threshold beside it is not.

    Raises:
        ValueError: threshold or leak out of range.
    """

    def __init__(self, threshold: float = 1.0, leak: float = 0.9, *, leak_reset: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(threshold) and threshold >= MIN_THRESHOLD):
            raise ValueError(f"threshold must be >= {MIN_THRESHOLD} and finite, got {threshold}")
        if not 0.0 <= leak <= 1.0:
            raise ValueError(f"leak must lie in [0, 1], got {leak}")
        self.raw_threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.raw_leak = nn.Parameter(torch.tensor(float(leak)))
        self.leak_reset = leak_reset

    @property
    def threshold(self) -> Tensor:
        """``v``, a scalar >= `MIN_THRESHOLD`."""
        return _Bounded.apply(self.raw_threshold, MIN_THRESHOLD, math.inf)

    @property
    def leak(self) -> Tensor:
        """``l``, a scalar in [0, 1]."""
        return _Bounded.apply(self.raw_leak, 0.0, 1.0)

    def forward(
        self, current: Tensor, carry: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer over ``current`` (steps, batch, ...) from ``carry`` (batch, ...); None is silence.

        ``keep`` (frames, batch) divides the steps into frames of equal length and multiplies the carry before each:
        0 where an episode starts, 1 elsewhere. Returns the spikes, shaped as ``current``, and the last carry.

        Raises:
            ValueError: no step, a carry that does not fit the current, or frames that do not divide the steps.
        """
        if current.dim() < 2 or current.shape[0] < 1:
            raise ValueError(f"current must be (steps >= 1, batch, ...), got shape {tuple(current.shape)}")
        if carry is None:
            carry = torch.zeros(current.shape[1:], dtype=current.dtype, device=current.device)
        elif carry.shape != current.shape[1:]:
            raise ValueError(
                f"carry must have the shape of one step of the current, {tuple(current.shape[1:])}, "
                f"got {tuple(carry.shape)}"
            )
        if keep is not None:
            if keep.dim() != 2 or keep.shape[1] != current.shape[1] or current.shape[0] % keep.shape[0]:
                raise ValueError(
                    f"keep must be (frames, batch) with a number of frames that divides the {current.shape[0]} steps, "
                    f"and the current's batch of {current.shape[1]}, got shape {tuple(keep.shape)}"
                )
            keep = keep.to(current.dtype).reshape(*keep.shape, *[1] * (current.dim() - 2))
        return _Scan.apply(current, carry, self.threshold, self.leak, keep, self.leak_reset)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold.item():.4g}, leak={self.leak.item():.4g}, leak_reset={self.leak_reset}"
