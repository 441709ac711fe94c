"""What the tables share: interleaved timing, peak memory, the machine, Markdown."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile


def medians(cases: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds per call of each case.

    The cases take turns, so that a slow spell of the machine meets them all. A turn is one call that is not counted,
    which fills the caches as the call before does in real use, and three that are.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(-1, rounds):  # one round warms up
        for name, call in cases.items():
            call()
            for _ in range(3):
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                if round_ >= 0:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that PyTorch holds during ``call`` beyond what it held before, in bytes."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    kineto = profiler.profiler
    assert kineto is not None
    held = peak = 0
    for event in sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine(device: str = "cpu") -> str:
    """Hardware and versions, in one line."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    except OSError:
        pass
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{processor}, {torch.get_num_threads()} threads"
    return f"{chip}; Python {platform.python_version()}, torch {torch.__version__}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
