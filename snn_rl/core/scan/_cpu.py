"""The LIF scan on the CPU: one pass over memory forward, one backward, compiled by numba.

The neurons of a sample are cut into blocks that fit the cache. A block walks through all micro-steps before the next
one starts, so that its carry never leaves the cache; threads share the blocks out among themselves. The backward pass
keeps the current alone and recomputes a block's membrane potentials from it: faster than to write and read them.

Arrays enter the kernels by address: that saves most of what a call costs, which counts where one frame is played.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_rl.core.scan._kernel_cache import KernelCache, warn_once
from snn_rl.core.scan._layout import Layout
from snn_rl.core.scan._reference import MIN_THRESHOLD
from snn_rl.core.surrogate import GAMMA

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # kernels take addresses, which Python itself cannot follow
    raise ImportError("NUMBA_DISABLE_JIT is set")

TYPES = {torch.float32: np.float32, torch.float64: np.float64}
MOST, LEAST = 1024, 64  # neurons of a block
POTENTIALS = 32_768  # of a block, all its micro-steps together: 128 KiB in single precision
PER_THREAD = 32_768  # neuron-steps below which one more thread costs more than it saves


def compiled(**options: Any) -> Callable[[Any], Any]:
    """``numba.njit``, kept from one process to the next where there is a folder for it."""

    def compile_(function: Any) -> Any:
        kernel = numba.njit(nogil=True, error_model="numpy", **options)(function)
        try:
            kernel._cache = KernelCache(function)  # as `cache=True` sets numba's own
        except RuntimeError:
            warn_once(
                "cannot be kept, and each start compiles anew",
                "neither the folder of snn_rl nor the user's cache can be written; set NUMBA_CACHE_DIR",
            )
        return kernel

    return compile_


def _typed_pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """A pointer to numbers of the type of ``like`` at ``address``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), code


pointer: Any = intrinsic(_typed_pointer)


# --- Forward. Input and output carry are never the same memory: the compiler would then give up vector instructions.


@compiled()
def _step(carry_tm1: Any, current: Any, spikes: Any, carry: Any, v: Any, leak: Any, reset: Any) -> None:
    one, zero = spikes.dtype.type(1), spikes.dtype.type(0)
    for j in range(current.size):
        u = carry_tm1[j] + current[j]
        fires = u > v
        spikes[j] = one if fires else zero
        carry[j] = leak * u - (reset if fires else zero)


@compiled()
def _last_step(carry_tm1: Any, current: Any, spikes: Any, v: Any) -> None:
    """`_step` where nobody wants the carry."""
    one, zero = spikes.dtype.type(1), spikes.dtype.type(0)
    for j in range(current.size):
        spikes[j] = one if carry_tm1[j] + current[j] > v else zero


@compiled()
def _forward(
    current_at: int, carry_0_at: int, keep_at: int, spikes_at: int, carry_at: int, v: Any, leak: Any, reset: Any,
    steps: int, hold: int, frame: int, rows: int, width: int, block: int, first: int, last: int,
) -> None:  # fmt: skip
    """Blocks ``first`` to ``last``. Addresses: current (steps / hold, rows, width), carry_0 (rows, width) or 0 for
    silence, keep (steps / frame, rows) or 0, spikes (steps, rows, width), carry (rows, width) or 0."""
    current = numba.carray(pointer(current_at, v), (steps // hold, rows, width))
    carry_0 = numba.carray(pointer(carry_0_at, v), (rows, width))
    keep = numba.carray(pointer(keep_at, v), (steps // frame, rows))
    spikes = numba.carray(pointer(spikes_at, v), (steps, rows, width))
    carry = numba.carray(pointer(carry_at, v), (rows, width))
    blocks = (width + block - 1) // block
    silence = np.zeros(min(block, width), spikes.dtype)
    between = np.empty((2, min(block, width)), spikes.dtype)  # carries of even and odd steps
    for i in range(first, last):
        row, low = i // blocks, i % blocks * block
        high = min(width, low + block)
        size = high - low
        before = carry_0[row, low:high] if carry_0_at else silence[:size]
        for t in range(steps):
            if keep_at and t % frame == 0 and keep[t // frame, row] == 0:
                before = silence[:size]  # not 0 times what was there: that is NaN where it is
            to_neurons, fired = current[t // hold, row, low:high], spikes[t, row, low:high]
            if t == steps - 1 and not carry_at:
                _last_step(before, to_neurons, fired, v)
                continue
            after = carry[row, low:high] if t == steps - 1 else between[t % 2, :size]
            _step(before, to_neurons, fired, after, v, leak, reset)
            before = after


@compiled(parallel=True)
def _forward_parallel(
    current_at: int, carry_0_at: int, keep_at: int, spikes_at: int, carry_at: int, v: Any, leak: Any, reset: Any,
    steps: int, hold: int, frame: int, rows: int, width: int, block: int, blocks: int, threads: int,
) -> None:  # fmt: skip
    for i in numba.prange(threads):
        _forward(
            current_at, carry_0_at, keep_at, spikes_at, carry_at, v, leak, reset, steps, hold, frame, rows, width,
            block, blocks * i // threads, blocks * (i + 1) // threads,
        )  # fmt: skip


# --- Backward. Sums over neurons may be taken in any order, which lets the compiler keep them in vectors.


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _step_backward(
    u: Any, grad_spikes: Any, grad_carry: Any, grad_carry_tm1: Any, v: Any, leak: Any, leak_reset: bool, gamma: Any
) -> Any:
    """dL/du[t] into ``grad_carry_tm1``; returns this step's dL/dv and dL/dleak."""
    one, zero = u.dtype.type(1), u.dtype.type(0)
    per_v = one / v
    height = gamma * per_v  # dL/do -> dL/du at the threshold
    reset_leak, reset_v = (leak, v) if leak_reset else (one, zero)
    grad_v, grad_leak = zero, zero
    for j in range(u.size):
        u_j, g_j = u[j], grad_carry[j]
        spike = one if u_j > v else zero
        slope = one - abs(u_j * per_v - one)
        slope = zero if slope < zero else slope  # and NaN where it is NaN
        through_spike = slope * height * grad_spikes[j]
        grad_v -= through_spike * u_j * per_v + g_j * spike * reset_leak
        grad_leak += g_j * (u_j - spike * reset_v)
        grad_carry_tm1[j] = through_spike + leak * g_j
    return grad_v, grad_leak


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _last_step_backward(u: Any, grad_spikes: Any, grad_carry_tm1: Any, v: Any, gamma: Any) -> Any:
    """`_step_backward` where nobody wants the carry; returns dL/dv alone."""
    one, zero = u.dtype.type(1), u.dtype.type(0)
    per_v = one / v
    height = gamma * per_v
    grad_v = zero
    for j in range(u.size):
        u_j = u[j]
        slope = one - abs(u_j * per_v - one)
        slope = zero if slope < zero else slope  # and NaN where it is NaN
        through_spike = slope * height * grad_spikes[j]
        grad_v -= through_spike * u_j
        grad_carry_tm1[j] = through_spike
    return grad_v * per_v


@compiled()
def _potentials(carry_tm1: Any, current: Any, u: Any, carry: Any, v: Any, leak: Any, reset: Any) -> None:
    zero = u.dtype.type(0)
    for j in range(current.size):
        u_j = carry_tm1[j] + current[j]
        u[j] = u_j
        carry[j] = leak * u_j - (reset if u_j > v else zero)


@compiled()
def _last_potentials(carry_tm1: Any, current: Any, u: Any) -> None:
    for j in range(current.size):
        u[j] = carry_tm1[j] + current[j]


@compiled()
def _backward(
    current_at: int, carry_0_at: int, keep_at: int, grad_spikes_at: int, grad_carry_at: int, grad_current_at: int,
    grad_carry_0_at: int, sums: Any, v: Any, leak: Any, leak_reset: bool, gamma: Any,
    steps: int, hold: int, frame: int, rows: int, width: int, block: int, first: int, last: int,
) -> None:  # fmt: skip
    """Blocks ``first`` to ``last``; their dL/dv and dL/dleak into ``sums`` (blocks, 2), which so do not depend on the
    number of threads. Shapes are those of `_forward`; a grad_carry of 0 is zero, a grad_carry_0 of 0 is not wanted."""
    current = numba.carray(pointer(current_at, v), (steps // hold, rows, width))
    carry_0 = numba.carray(pointer(carry_0_at, v), (rows, width))
    keep = numba.carray(pointer(keep_at, v), (steps // frame, rows))
    grad_spikes = numba.carray(pointer(grad_spikes_at, v), (steps, rows, width))
    grad_last = numba.carray(pointer(grad_carry_at, v), (rows, width))
    grad_current = numba.carray(pointer(grad_current_at, v), (steps // hold, rows, width))
    grad_carry_0 = numba.carray(pointer(grad_carry_0_at, v), (rows, width))
    reset = v * leak if leak_reset else v
    blocks = (width + block - 1) // block
    nothing = np.zeros(min(block, width), grad_spikes.dtype)
    u = np.empty((steps, min(block, width)), grad_spikes.dtype)
    between = np.empty((2, min(block, width)), grad_spikes.dtype)  # of even and odd steps: carries, then dL/du
    for i in range(first, last):
        row, low = i // blocks, i % blocks * block
        high = min(width, low + block)
        size = high - low
        before = carry_0[row, low:high] if carry_0_at else nothing[:size]
        for t in range(steps):
            if keep_at and t % frame == 0 and keep[t // frame, row] == 0:
                before = nothing[:size]
            to_neurons, after = current[t // hold, row, low:high], between[t % 2, :size]
            if t == steps - 1:
                _last_potentials(before, to_neurons, u[t, :size])
            else:
                _potentials(before, to_neurons, u[t, :size], after, v, leak, reset)
            before = after
        grad_v, grad_leak = 0.0, 0.0
        later = grad_last[row, low:high] if grad_carry_at else nothing[:size]
        for t in range(steps - 1, -1, -1):
            to_current = grad_current[t // hold, row, low:high]
            grad_u = to_current if hold == 1 else between[t % 2, :size]
            to_spikes = grad_spikes[t, row, low:high]
            if t == steps - 1 and not grad_carry_at:
                grad_v += _last_step_backward(u[t, :size], to_spikes, grad_u, v, gamma)
            else:
                step_v, step_leak = _step_backward(u[t, :size], to_spikes, later, grad_u, v, leak, leak_reset, gamma)
                grad_v += step_v
                grad_leak += step_leak
            if hold > 1:
                if t % hold == hold - 1:
                    for j in range(size):
                        to_current[j] = grad_u[j]
                else:
                    for j in range(size):
                        to_current[j] += grad_u[j]
            later = grad_u
            if keep_at and t % frame == 0 and keep[t // frame, row] == 0:
                later = nothing[:size]
        if grad_carry_0_at:
            for j in range(size):
                grad_carry_0[row, low + j] = later[j]
        sums[i, 0], sums[i, 1] = grad_v, grad_leak


@compiled(parallel=True)
def _backward_parallel(
    current_at: int, carry_0_at: int, keep_at: int, grad_spikes_at: int, grad_carry_at: int, grad_current_at: int,
    grad_carry_0_at: int, sums: Any, v: Any, leak: Any, leak_reset: bool, gamma: Any,
    steps: int, hold: int, frame: int, rows: int, width: int, block: int, blocks: int, threads: int,
) -> None:  # fmt: skip
    for i in numba.prange(threads):
        _backward(
            current_at, carry_0_at, keep_at, grad_spikes_at, grad_carry_at, grad_current_at, grad_carry_0_at, sums, v,
            leak, leak_reset, gamma, steps, hold, frame, rows, width, block,
            blocks * i // threads, blocks * (i + 1) // threads,
        )  # fmt: skip


# --- Threads. numba ends the process where its OpenMP is entered in a forked child, and where its fallback without
# OpenMP is entered by two threads at once; in both cases the calling thread does all the work itself.

_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # the most it will start
_parallel_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), _THREADS, work // PER_THREAD))


def _run(kernel: Any, parallel: Any, args: tuple[Any, ...], blocks: int, threads: int) -> None:
    if threads == 1 or _forked or not _parallel_lock.acquire(blocking=False):
        kernel(*args, 0, blocks)
        return
    try:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        parallel(*args, blocks, threads)
        numba.set_num_threads(before)
    finally:
        _parallel_lock.release()


# --- PyTorch's side.


class _Layout(Layout):
    """Adds how the neurons of a sample are cut into blocks, and how many threads share them."""

    def __init__(self, current: Tensor, keep: Tensor | None, hold: int) -> None:
        super().__init__(current, keep, hold)
        self.block = max(LEAST, min(MOST, POTENTIALS // self.steps))
        self.blocks = self.rows * -(-self.width // self.block)
        self.threads = _threads(self.steps * self.rows * self.width)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.steps, self.hold, self.frame, self.rows, self.width, self.block


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _scan(
    current: Tensor, carry_0: Tensor | None, keep: Tensor | None, v: float, leak: float, layout: _Layout,
    leak_reset: bool, with_carry: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spikes and last carry, of arguments that are `_Layout.dense`."""
    number: Any = TYPES[current.dtype]
    spikes = layout.empty(current.dtype, layout.steps)
    carry = layout.empty(current.dtype) if with_carry else current.new_empty(0)
    addresses = (_at(current), _at(carry_0), _at(keep), _at(spikes), _at(carry) if with_carry else 0)
    constants = number(v), number(leak), number(number(v) * number(leak) if leak_reset else v)
    _run(_forward, _forward_parallel, (*addresses, *constants, *layout.sizes), layout.blocks, layout.threads)
    return spikes, carry


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, current: Tensor, carry_0: Tensor | None, keep: Tensor | None, raw_v: Tensor, raw_leak: Tensor,
        layout: _Layout, leak_reset: bool, with_carry: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        bounds = _bounds(raw_v, raw_leak)
        ctx.save_for_backward(current, carry_0, keep)
        ctx.constants = *bounds, layout, leak_reset
        ctx.raw = raw_v.item(), raw_leak.item(), raw_v.dtype, raw_leak.dtype
        ctx.spikes_again = _spikes_again
        ctx.set_materialize_grads(False)
        spikes, carry = _scan(current, carry_0, keep, *bounds, layout, leak_reset, with_carry)
        if not with_carry:
            ctx.mark_non_differentiable(carry)
        return spikes, carry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_carry: Tensor | None) -> tuple[Tensor | None, ...]:
        current, carry_0, keep = ctx.saved_tensors
        v, leak, layout, leak_reset = ctx.constants
        number: Any = TYPES[current.dtype]
        if grad_spikes is None:
            grad_spikes = layout.empty(current.dtype, layout.steps).zero_()
        grad_spikes = layout.dense(grad_spikes)
        grad_carry = None if grad_carry is None else layout.dense(grad_carry)
        grad_current = layout.empty(current.dtype, current.shape[0])
        grad_carry_0 = layout.empty(current.dtype) if ctx.needs_input_grad[1] else None
        sums = np.empty((layout.blocks, 2))
        addresses = (_at(current), _at(carry_0), _at(keep), _at(grad_spikes), _at(grad_carry))
        results = (_at(grad_current), _at(grad_carry_0), sums)
        args = (*addresses, *results, number(v), number(leak), leak_reset, number(GAMMA), *layout.sizes)
        _run(_backward, _backward_parallel, args, layout.blocks, layout.threads)
        grad_v, grad_leak = sums.sum(0).tolist()
        # As in the reference: dropped only where a descent step would lead further out of bounds.
        raw_v, raw_leak, type_v, type_leak = ctx.raw
        if raw_v <= MIN_THRESHOLD and grad_v > 0:
            grad_v = 0.0
        if (raw_leak <= 0 and grad_leak > 0) or (raw_leak >= 1 and grad_leak < 0):
            grad_leak = 0.0
        grads = torch.scalar_tensor(grad_v, dtype=type_v), torch.scalar_tensor(grad_leak, dtype=type_leak)
        return grad_current, grad_carry_0, None, *grads, None, None, None


def _spikes_again(ctx: Any) -> Tensor:
    (current, carry_0, keep), (v, leak, layout, leak_reset) = ctx.saved_tensors, ctx.constants
    return _scan(current, carry_0, keep, v, leak, layout, leak_reset, with_carry=False)[0]


def _bounds(raw_v: Tensor, raw_leak: Tensor) -> tuple[float, float]:
    return max(raw_v.item(), MIN_THRESHOLD), min(max(raw_leak.item(), 0.0), 1.0)


def cpu_scan(
    current: Tensor,
    carry: Tensor | None,
    raw_threshold: Tensor,
    raw_leak: Tensor,
    keep: Tensor | None = None,
    hold: int = 1,
    leak_reset: bool = False,
    with_carry: bool = True,
) -> tuple[Tensor, Tensor]:
    """`snn_rl.core.scan.lif_scan` for single and double precision on the CPU."""
    layout = _Layout(current, keep, hold)
    current = layout.dense(current)
    if carry is not None:
        carry = layout.dense(carry.to(current.dtype))
    if keep is not None:
        keep = keep.to(current.dtype).contiguous()
    inputs = (current, carry, raw_threshold, raw_leak)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Scan.apply(current, carry, keep, raw_threshold, raw_leak, layout, leak_reset, with_carry)
    return _scan(current, carry, keep, *_bounds(raw_threshold, raw_leak), layout, leak_reset, with_carry)
