"""A run: a fold of stages, each from its parent's checkpoint to its own, whatever it is that they train.

A stage writes into a folder of its own and ends by writing ``metrics.json``; where that stands, the stage is done.
A killed run goes on from the same call: finished stages are skipped, and a started one resumes from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from snn_rl.activity import Activity
from snn_rl.files import TEMPORARY, read_json, write_json

LOG = logging.getLogger(__name__)
BEST = "best.zip"  # an agent's best checkpoint on validation episodes so far


@dataclass(frozen=True)
class Stage:
    """``timesteps`` is None for the ANN."""

    timesteps: int | None
    parent: str | None  # a stage's name, or the file that stands for the ANN stage's parent
    variant: str = ""  # what sets it apart from the stage of the same timesteps

    @property
    def name(self) -> str:
        return ("ann" if self.timesteps is None else f"T{self.timesteps}") + self.variant


def chain(schedule: Sequence[int], ann: Path | None) -> list[Stage]:
    """The ANN, then one stage for each T of ``schedule``, each from the one before it."""
    stages = [Stage(None, None if ann is None else str(ann))]
    for timesteps in schedule:
        stages.append(Stage(timesteps, stages[-1].name))
    return stages


def run_stages(
    directory: Path,
    stages: Sequence[Stage],
    train: Callable[[Stage], None],
    head: dict[str, Any],
    *,
    writes: bool = True,
) -> dict[str, Any]:
    """``train`` every stage that is not finished yet; returns what ``results.json`` holds, written after each of them.

    ``head`` stands at the top: recipe, env_id and seed. Where a run has several processes, one of them ``writes``.
    """
    results: dict[str, Any] = {}
    for stage in stages:
        if (directory / stage.name / "metrics.json").is_file():
            LOG.info("%s stands finished", stage.name)
        else:
            train(stage)
        if writes:
            remove_leftovers(directory / stage.name)
        results = _collect(directory, stages, head)
        if writes:
            write_json(directory / "results.json", results)
    return results


def _collect(directory: Path, stages: Sequence[Stage], head: dict[str, Any]) -> dict[str, Any]:
    """The metrics of all finished stages, and where the last of them was measured."""
    paths = (directory / stage.name / "metrics.json" for stage in stages)
    finished = [read_json(path) for path in paths if path.is_file()]
    measured = {key: finished[-1][key] for key in ("versions", "hardware")} if finished else {}
    return {**head, **measured, "stages": finished}


def remove_leftovers(folder: Path) -> None:
    """What a stage needs on its way only, and what a kill left half-written."""
    for pattern in ("best.*", "checkpoint.*", f"{TEMPORARY}*"):
        for leftover in folder.glob(pattern):
            leftover.unlink()


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


def claim(directory: Path, recipe: dict[str, Any], seed: int, ann: Path | None, kind: str) -> None:
    """Bind the directory to this run, or find that it is. ``kind`` of file may take the ANN stage's place."""
    if ann is not None and not ann.is_file():
        raise ValueError(f"no file at {ann}; --ann takes {kind}")
    config = {"recipe": recipe, "seed": seed, "ann": None if ann is None else str(ann.resolve())}
    path = directory / "run.json"
    begun = any(any(directory.glob(f"*/{name}")) for name in ("checkpoint.*", "metrics.json"))
    if not path.is_file() or not begun:  # where nothing has been trained yet, nothing is lost
        write_json(path, config)
        return
    before = _flat(read_json(path))
    # through the writer's own conversion, in which tuples are lists
    now = _flat(_jsonable(config))
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "recipe.name", key != "seed", key)):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{directory} belongs to another run: its {key} is {before.get(key)!r}, not {now.get(key)!r}; "
                "give the options that began it, or use another --run-dir"
            )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return out


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
