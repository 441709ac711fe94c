"""Stages of a run, and what is noted of each: spike rates, energy, versions and the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from snn_rl.core.activity import Activity


@dataclass(frozen=True)
class Stage:
    """``timesteps`` is None for the ANN and the teacher."""

    timesteps: int | None
    parent: str | None  # a stage's name, or the file that stands for the ANN stage's parent
    variant: str = ""  # what sets it apart from the stage of the same timesteps
    is_teacher: bool = False  # a given agent, which is only evaluated

    @property
    def name(self) -> str:
        if self.is_teacher:
            return "teacher"
        return ("ann" if self.timesteps is None else f"T{self.timesteps}") + self.variant


def chain(schedule: Sequence[int], ann: Path | None) -> list[Stage]:
    """The ANN, then one stage for each T of ``schedule``, each from the one before it."""
    stages = [Stage(None, None if ann is None else str(ann))]
    for timesteps in schedule:
        stages.append(Stage(timesteps, stages[-1].name))
    return stages


def check_device(device: str) -> str:
    """``device`` itself. Raises ValueError where torch does not know it or this machine does not have it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device here; use --device cpu")
    return device


def measurements(measured: Activity | None) -> dict[str, Any]:
    """What ``metrics.json`` keeps of the activity of a spiking stage; None is an ANN."""
    if measured is None:
        return {"spike_rate": None, "energy": None}
    return {
        "spike_rate": {"mean": measured.mean, "layers": measured.layers},
        "energy": {
            "ann_over_snn": measured.ann_over_snn,
            "ann_ops": measured.ann_ops,
            "snn_ops": measured.snn_ops,
            "memory_accesses": vars(measured.memory_accesses),
        },
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("torch", "stable-baselines3", "gymnasium", "ale-py", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def hardware(device: str) -> str:
    """The processor, or the GPU, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
