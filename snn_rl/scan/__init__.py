"""A LIF layer through all frames and micro-steps, by the implementation that fits its input.

The equations stand in `snn_rl.neuron`. A kernel that does not know an input (another device or precision, a graph that
`torch.compile` traces) leaves it to the reference.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from snn_rl.scan._memory import SpikeConv2d as SpikeConv2d
from snn_rl.scan._memory import SpikesRecomputed as SpikesRecomputed
from snn_rl.scan._reference import MIN_THRESHOLD as MIN_THRESHOLD
from snn_rl.scan._reference import bounded_leak as bounded_leak
from snn_rl.scan._reference import bounded_threshold as bounded_threshold
from snn_rl.scan._reference import reference_scan as reference_scan

try:
    from snn_rl.scan import _cpu
except ImportError as error:  # numba has no build for this Python, or not for this numpy
    _cpu = None  # type: ignore[assignment]
    warnings.warn(f"no compiled LIF layers, several times slower on the CPU: {error}", stacklevel=2)


def lif_scan(
    current: Tensor,
    carry: Tensor | None,
    raw_threshold: Tensor,
    raw_leak: Tensor,
    keep: Tensor | None = None,
    hold: int = 1,
    leak_reset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Spikes (steps * hold, batch, ...) and the last carry (batch, ...); the arguments are those of `snn_rl.LIF`."""
    scan = reference_scan
    if _cpu is not None and current.device.type == "cpu" and current.dtype in _cpu.NUMPY_TYPE:
        scan = reference_scan if torch.compiler.is_compiling() else _cpu.cpu_scan
    return scan(current, carry, raw_threshold, raw_leak, keep, hold, leak_reset)
