"""A LIF layer through all frames and micro-steps, by the implementation that fits its input.

The equations stand in `snn_rl.core.neuron`. A kernel that does not know an input (another device or precision, a graph
that `torch.compile` traces) leaves it to the reference.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor, nn

from snn_rl.core.scan._memory import SpikeConv2d as SpikeConv2d
from snn_rl.core.scan._memory import SpikesRecomputed as SpikesRecomputed
from snn_rl.core.scan._reference import MIN_THRESHOLD as MIN_THRESHOLD
from snn_rl.core.scan._reference import bounded_leak as bounded_leak
from snn_rl.core.scan._reference import bounded_threshold as bounded_threshold
from snn_rl.core.scan._reference import reference_scan as reference_scan


@functools.cache
def _cpu_kernels() -> ModuleType | None:
    """The CPU's kernels, imported where they are first needed, since numba takes long; None where they cannot run."""
    try:
        return importlib.import_module("snn_rl.core.scan._cpu")
    except ImportError as error:  # numba has no build for this Python, or not for this numpy, or is told not to compile
        warnings.warn(f"no compiled LIF layers, several times slower on the CPU: {error}", stacklevel=3)
        return None


@functools.cache
def _cuda_kernels() -> ModuleType | None:
    """The CUDA kernels, imported where they are first needed; None where there is no Triton."""
    try:
        return importlib.import_module("snn_rl.core.scan._cuda")
    except ImportError as error:
        warnings.warn(f"no Triton, LIF layers on CUDA run step by step: {error}", stacklevel=3)
        return None


def lif_scan(
    current: Tensor,
    carry: Tensor | None,
    raw_threshold: Tensor,
    raw_leak: Tensor,
    keep: Tensor | None = None,
    hold: int = 1,
    leak_reset: bool = False,
    with_carry: bool = True,
) -> tuple[Tensor, Tensor]:
    """Spikes (steps * hold, batch, ...) and the last carry (batch, ...); the arguments are those of `snn_rl.LIF`.

    Without ``with_carry`` the second is empty, (0,): a third of what one micro-step writes.
    """
    scan = reference_scan
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(current) not in (Tensor, nn.Parameter):
        pass  # what follows the tensors' operations must see them; a subclass of Tensor need not have memory
    elif current.device.type == "cpu" and (kernels := _cpu_kernels()) is not None and current.dtype in kernels.TYPES:
        scan = kernels.cpu_scan
    elif current.device.type == "cuda" and (kernels := _cuda_kernels()) is not None and current.dtype in kernels.TYPES:
        scan = kernels.cuda_scan
    return scan(current, carry, raw_threshold, raw_leak, keep, hold, leak_reset, with_carry)
