"""The LIF scan on a CUDA device: one Triton kernel forward, one backward, whatever the number of micro-steps.

A program walks a block of neurons through all micro-steps, with the carry in registers. As on the CPU, the backward
pass keeps the current alone: it walks through the micro-steps once more, holds their membrane potentials in registers,
and returns. Threshold and leak are read on the device, so that nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_rl.core.scan._layout import Layout
from snn_rl.core.scan._reference import MIN_THRESHOLD
from snn_rl.core.surrogate import GAMMA

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.float32, torch.float16: tl.float32}
BLOCK = 256  # neurons of a program, two per thread
MOST_STEPS = 32  # of one launch: each holds a membrane potential in a register; longer sequences take several


@triton.jit
def _constants(raw_v, raw_leak, LEAK_RESET: tl.constexpr, MIN: tl.constexpr, TYPE: tl.constexpr):
    v = tl.maximum(tl.load(raw_v).to(TYPE), tl.full([], MIN, TYPE))  # a plain constant would be single
    leak = tl.minimum(tl.maximum(tl.load(raw_leak).to(TYPE), 0.0), 1.0)
    return v, leak, v * leak if LEAK_RESET else v


@triton.jit
def _forward(
    current, carry_0, keep, spikes, carry_at, raw_v, raw_leak, neurons, rows, width,
    STEPS: tl.constexpr, HOLD: tl.constexpr, FRAME: tl.constexpr, LEAK_RESET: tl.constexpr, MIN: tl.constexpr,
    TYPE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """current (STEPS / HOLD, neurons), carry_0 (neurons) or None, keep (STEPS / FRAME, rows) or None -> spikes (STEPS,
    neurons), carry (neurons) or None."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    neurons = tl.full([], 0, tl.int64) + neurons  # offsets of later steps pass 2^31
    inside = i < neurons
    v, leak, reset = _constants(raw_v, raw_leak, LEAK_RESET, MIN, TYPE)
    carry = tl.zeros([SIZE], TYPE)
    if carry_0 is not None:
        carry = tl.load(carry_0 + i, inside, 0.0)
    drive = tl.zeros([SIZE], TYPE)
    for t in tl.static_range(STEPS):
        if keep is not None:
            if t % FRAME == 0:
                kept = tl.load(keep + t // FRAME * rows + i // width, inside, 0.0)
                carry = tl.where(kept != 0, carry, 0.0)  # selected: 0 times NaN is NaN
        if t % HOLD == 0:
            drive = tl.load(current + t // HOLD * neurons + i, inside, 0.0).to(TYPE)
        u = carry + drive
        fires = u > v
        tl.store(spikes + t * neurons + i, tl.where(fires, 1.0, 0.0).to(spikes.dtype.element_ty), inside)
        carry = leak * u - tl.where(fires, reset, 0.0)
    if carry_at is not None:
        tl.store(carry_at + i, carry, inside)


@triton.jit
def _backward(
    current, carry_0, keep, grad_spikes, grad_carry, grad_current, grad_carry_0, sums, raw_v, raw_leak,
    neurons, rows, width,
    STEPS: tl.constexpr, HOLD: tl.constexpr, FRAME: tl.constexpr, LEAK_RESET: tl.constexpr, MIN: tl.constexpr,
    SLOPE: tl.constexpr, TYPE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Shapes are those of `_forward`; sums (2, programs) gets each program's dL/dv and dL/dleak. grad_carry of None is
    zero, grad_carry_0 of None is not wanted."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    neurons = tl.full([], 0, tl.int64) + neurons  # offsets of later steps pass 2^31
    inside = i < neurons
    v, leak, reset = _constants(raw_v, raw_leak, LEAK_RESET, MIN, TYPE)
    carry = tl.zeros([SIZE], TYPE)
    if carry_0 is not None:
        carry = tl.load(carry_0 + i, inside, 0.0)
    drive = tl.zeros([SIZE], TYPE)
    potentials = ()
    for t in tl.static_range(STEPS):
        if keep is not None:
            if t % FRAME == 0:
                kept = tl.load(keep + t // FRAME * rows + i // width, inside, 0.0)
                carry = tl.where(kept != 0, carry, 0.0)  # selected: 0 times NaN is NaN
        if t % HOLD == 0:
            drive = tl.load(current + t // HOLD * neurons + i, inside, 0.0).to(TYPE)
        u = carry + drive
        potentials += (u,)  # type: ignore[assignment]
        carry = leak * u - tl.where(u > v, reset, 0.0)

    slope = tl.full([], SLOPE, TYPE) / v
    later = tl.zeros([SIZE], TYPE)  # dL/dcarry[t]
    if grad_carry is not None:
        later = tl.load(grad_carry + i, inside, 0.0)
    to_v = tl.zeros([SIZE], TYPE)
    to_leak = tl.zeros([SIZE], TYPE)
    to_current = tl.zeros([SIZE], TYPE)
    for t in tl.static_range(STEPS - 1, -1, -1):
        u = potentials[t]
        spike = tl.where(u > v, 1.0, 0.0).to(TYPE)
        through_spike = tl.load(grad_spikes + t * neurons + i, inside, 0.0).to(TYPE)
        through_spike *= tl.maximum(0.0, 1.0 - tl.abs(u / v - 1.0)) * slope
        if LEAK_RESET:
            to_v -= through_spike * u / v + later * spike * leak
            to_leak += later * (u - spike * v)
        else:
            to_v -= through_spike * u / v + later * spike
            to_leak += later * u
        grad_u = through_spike + leak * later
        to_current += grad_u
        if t % HOLD == 0:
            tl.store(grad_current + t // HOLD * neurons + i, to_current.to(grad_current.dtype.element_ty), inside)
            to_current = tl.zeros([SIZE], TYPE)
        later = grad_u
        if keep is not None:
            if t % FRAME == 0:
                kept = tl.load(keep + t // FRAME * rows + i // width, inside, 0.0)
                later = tl.where(kept != 0, later, 0.0)
    if grad_carry_0 is not None:
        tl.store(grad_carry_0 + i, later, inside)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, to_v, 0.0)))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(inside, to_leak, 0.0)))


# --- PyTorch's side.


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, current: Tensor, carry_0: Tensor | None, keep: Tensor | None, raw_v: Tensor, raw_leak: Tensor,
        layout: Layout, leak_reset: bool, with_carry: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        spikes, carries = _scan(current, carry_0, keep, raw_v, raw_leak, layout, leak_reset, with_carry)
        if not with_carry:
            ctx.mark_non_differentiable(carries[-1])
        ctx.save_for_backward(current, keep, raw_v, raw_leak, carry_0, *carries[:-1])
        ctx.layout, ctx.leak_reset = layout, leak_reset
        ctx.spikes_again = _spikes_again
        ctx.set_materialize_grads(False)
        return spikes, carries[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_carry: Tensor | None) -> tuple[Tensor | None, ...]:
        current, keep, raw_v, raw_leak, *carries = ctx.saved_tensors
        layout, compute = ctx.layout, _compute_type(current.dtype)
        if grad_spikes is None:
            grad_spikes = layout.empty(current.dtype, layout.steps).zero_()
        grad_spikes = layout.dense(grad_spikes)
        grad_carry = None if grad_carry is None else layout.dense(grad_carry.to(compute))
        grad_current = layout.empty(current.dtype, current.shape[0])
        pieces = _pieces(current, keep, grad_spikes, grad_current, layout=layout)
        sums = torch.zeros((len(pieces), 2, _programs(layout)), dtype=compute, device=current.device)
        for k, (current_k, keep_k, grad_spikes_k, grad_current_k) in reversed(list(enumerate(pieces))):
            wanted = k > 0 or ctx.needs_input_grad[1]
            grad_tm1 = layout.empty(compute) if wanted else None
            _launch(
                _backward, current_k, carries[k], keep_k, grad_spikes_k, grad_carry, grad_current_k, grad_tm1, sums[k],
                raw_v, raw_leak, layout=layout, steps=len(grad_spikes_k), leak_reset=ctx.leak_reset, SLOPE=GAMMA,
            )  # fmt: skip
            grad_carry = grad_tm1
        grad_v, grad_leak = sums.sum((0, 2))
        # As in the reference: dropped only where a descent step would lead further out of bounds.
        grad_v = grad_v.masked_fill((raw_v <= MIN_THRESHOLD) & (grad_v > 0), 0.0)
        outward = ((raw_leak <= 0) & (grad_leak > 0)) | ((raw_leak >= 1) & (grad_leak < 0))
        grad_leak = grad_leak.masked_fill(outward, 0.0)
        return grad_current, grad_carry, None, grad_v.to(raw_v.dtype), grad_leak.to(raw_leak.dtype), None, None, None


def _scan(
    current: Tensor, carry_0: Tensor | None, keep: Tensor | None, raw_v: Tensor, raw_leak: Tensor, layout: Layout,
    leak_reset: bool, with_carry: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Spikes, and the carry after each of the `_pieces`, of arguments that are `Layout.dense`."""
    spikes = layout.empty(current.dtype, layout.steps)
    carries: list[Tensor] = []
    pieces = _pieces(current, keep, spikes, layout=layout)
    for k, (current_k, keep_k, spikes_k) in enumerate(pieces):
        wanted = with_carry or k < len(pieces) - 1
        carry = layout.empty(_compute_type(current.dtype)) if wanted else current.new_empty(0)
        _launch(
            _forward, current_k, carry_0, keep_k, spikes_k, carry if wanted else None, raw_v, raw_leak,
            layout=layout, steps=len(spikes_k), leak_reset=leak_reset,
        )  # fmt: skip
        carries.append(carry)
        carry_0 = carry
    return spikes, carries


def _pieces(current: Tensor, keep: Tensor | None, *per_step: Tensor, layout: Layout) -> list[tuple[Any, ...]]:
    """Current, keep and what else is given, cut in time into launches: whole frames where frames reset neurons."""
    unit = layout.hold if keep is None else layout.frame  # micro-steps that one launch must hold
    size = max(1, MOST_STEPS // unit) * unit
    cuts = []
    for t in range(0, layout.steps, size):
        keep_k = None if keep is None else keep[t // layout.frame : (t + size) // layout.frame]
        at_rate = [x[t // (layout.steps // len(x)) : (t + size) // (layout.steps // len(x))] for x in per_step]
        cuts.append((current[t // layout.hold : (t + size) // layout.hold], keep_k, *at_rate))
    return cuts


def _launch(kernel: Any, *args: Tensor | None, layout: Layout, steps: int, leak_reset: bool, **options: float) -> None:
    current = args[0]
    assert current is not None
    if _programs(layout):
        with torch.cuda.device_of(current):
            kernel[(_programs(layout),)](
                *args, layout.rows * layout.width, layout.rows, layout.width, STEPS=steps, HOLD=layout.hold,
                FRAME=min(layout.frame, steps), LEAK_RESET=leak_reset, MIN=MIN_THRESHOLD, TYPE=TYPES[current.dtype],
                SIZE=BLOCK, **options,
                enable_fp_fusion=False,  # forward and backward must round alike, or they disagree about a spike
            )  # fmt: skip


def _programs(layout: Layout) -> int:
    return triton.cdiv(layout.rows * layout.width, BLOCK)


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _spikes_again(ctx: Any) -> Tensor:
    current, keep, raw_v, raw_leak, carry_0, *_ = ctx.saved_tensors
    return _scan(current, carry_0, keep, raw_v, raw_leak, ctx.layout, ctx.leak_reset, False)[0]


def cuda_scan(
    current: Tensor,
    carry: Tensor | None,
    raw_threshold: Tensor,
    raw_leak: Tensor,
    keep: Tensor | None = None,
    hold: int = 1,
    leak_reset: bool = False,
    with_carry: bool = True,
) -> tuple[Tensor, Tensor]:
    """`snn_rl.core.scan.lif_scan` on a CUDA device; half precision is computed in single, the carry stays in single."""
    layout = Layout(current, keep, hold)
    current = layout.dense(current)
    compute = _compute_type(current.dtype)
    if carry is not None:
        carry = layout.dense(carry.to(compute))
    if keep is not None:
        keep = keep.to(compute).contiguous()
    if torch.is_grad_enabled():
        return _Scan.apply(current, carry, keep, raw_threshold, raw_leak, layout, leak_reset, with_carry)
    spikes, carries = _scan(current, carry, keep, raw_threshold, raw_leak, layout, leak_reset, with_carry)
    return spikes, carries[-1]
