"""A run: a fold of stages, each from its parent's checkpoint to its own, whatever it is that they train.

A stage writes into a folder of its own and ends by writing ``metrics.json``; where that stands, the stage is done.
A killed run goes on from the same call: finished stages are skipped, and a started one resumes from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from snn_rl.base.files import TEMPORARY, read_json, write_json
from snn_rl.core.activity import Activity

if TYPE_CHECKING:
    from snn_rl.runs.recipe import Recipe
    from snn_rl.vision.recipe import VisionRecipe

LOG = logging.getLogger(__name__)
BEST = "best.zip"  # an agent's best checkpoint on validation episodes so far
# What a training has worked for: files of its stages that the next training in the folder would replace.
WORK = ("checkpoint.*", "model.*", "policy.*", "metrics.json")
# Fields of a recipe on which nothing depends that a run learns or reports: they may change from call to call.
FREE = {"cpu_threads", "checkpoint_every", "max_episode_steps"}
UNSET = object()


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
    LOG.info("training into %s; watch it with: tensorboard --logdir %s", directory, directory)
    results: dict[str, Any] = {}
    for stage in stages:
        if (directory / stage.name / "metrics.json").is_file():
            LOG.info("%s is already finished", stage.name)
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


def claim(
    directory: Path,
    recipe: Recipe | VisionRecipe,
    seed: int,
    ann: Path | None,
    spaces: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Bind the directory to this run, or find that it is.

    ``spaces`` are those of the environment, which tell its code apart where the recipe's fields do not. A field that
    ``run.json`` lacks counts as its default: the recipe has gained it since.

    Raises:
        ValueError: a directory that holds the work of another run.
    """
    config = {"recipe": recipe.as_dict(), "seed": seed, "ann": None if ann is None else str(ann.resolve()), **spaces}
    path, results = directory / "run.json", directory / "results.json"
    stages = (found for pattern in WORK for name in ("ann", "T[0-9]*") for found in directory.glob(f"{name}/{pattern}"))
    work = results if results.is_file() else next(stages, None)
    if work is None:  # where nothing has been trained yet, nothing is lost
        write_json(path, config)
        return
    another = "give the options that began it, or use another --run-dir"
    if not path.is_file():
        raise ValueError(
            f"{directory} holds {work.relative_to(directory)} but no run.json, so that this run cannot tell whose it "
            "is; use another --run-dir"
        )
    for difference in _differences(read_json(path), config, recipe):
        raise ValueError(f"{directory} belongs to another run: {difference}; {another}")
    if results.is_file():
        head = read_json(results)
        theirs = (head.get("recipe"), head.get("seed")) if isinstance(head, dict) else None
        if theirs != (recipe.name, seed):
            raise ValueError(f"{results} is not of this run, which would replace it; move it, or use another --run-dir")


def _differences(before: Any, now: Mapping[str, Any], recipe: Recipe | VisionRecipe) -> Iterator[str]:
    """What sets two runs apart, first what a person would name first."""
    before = before if isinstance(before, dict) else {}
    theirs, ours = before.get("recipe"), now["recipe"]
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("name") != recipe.name:
        yield f"its recipe is {theirs.get('name')!r}, not {recipe.name!r}"
    if recipe.is_smoke(theirs) != recipe.is_smoke(ours):
        yield "it is a smoke run, and this is none" if recipe.is_smoke(theirs) else "it is no smoke run, as this is"
    for key in ("seed", "ann"):
        if before.get(key) != now[key]:
            yield f"its {key} is {before.get(key)!r}, not {now[key]!r}"
    yield from _other_fields(theirs, recipe)
    for key in now.keys() - {"recipe", "seed", "ann"}:
        if before.get(key, now[key]) != now[key]:  # older runs do not tell
            yield f"its environment has the {key.replace('_', ' ')} {before[key]}, not {now[key]}"


def _other_fields(before: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """Fields of the dataclass ``now``, and of those in it, that ``before`` holds otherwise."""
    before = before if isinstance(before, dict) else {}
    names = set()
    for field in dataclasses.fields(now):
        names.add(field.name)
        if not prefix and field.name in FREE | {"make_env"}:
            continue
        name, ours = prefix + field.name, _jsonable(getattr(now, field.name))
        if dataclasses.is_dataclass(ours):
            yield from _other_fields(before.get(field.name), ours, f"{name}.")
            continue
        theirs = before.get(field.name, _default(field))
        if isinstance(ours, dict) and isinstance(theirs, dict):  # arguments of the environment
            pairs = [(f"{name}.{key}", theirs.get(key, UNSET), ours.get(key, UNSET)) for key in {**ours, **theirs}]
        else:
            pairs = [(name, theirs, ours)]
        for which, a, b in pairs:
            if a != b:
                yield f"its {which} is {_said(a)}, not {_said(b)}"
    for name in before.keys() - names:
        yield f"its {prefix}{name} is {before[name]!r}, and recipes no longer have this field"


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default as JSON holds it."""
    if field.default_factory is not dataclasses.MISSING:
        return _jsonable(field.default_factory())
    return UNSET if field.default is dataclasses.MISSING else _jsonable(field.default)


def _said(value: Any) -> str:
    return "unset" if value is UNSET else repr(value)


def _jsonable(value: Any) -> Any:
    """``value`` as it comes back from JSON, in which tuples are lists."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


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
