"""The life of a run: a fold of stages, each from its parent's checkpoint to its own, whatever it is that they train.

A stage writes into a folder of its own and ends by writing ``metrics.json``; where that stands, the stage is done.
A killed run goes on from the same call: finished stages are skipped, and a started one resumes from its checkpoint.

A `Task` says which stages there are, and a `Training` how one of them is begun, resumed, trained and exported.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from snn_rl.base.files import TEMPORARY, alone_in, read_json, write_json
from snn_rl.base.progress import one_line, show_log
from snn_rl.rl.environments import EnvironmentFailedError
from snn_rl.runs.claim import AnyRecipe, claim
from snn_rl.runs.stages import Stage, check_device, measurements, versions
from snn_rl.runs.task import Checkpoints, Measured, OutOfTimeError, Run, Task, Training

LOG = logging.getLogger(__name__)
METRICS = "metrics.json"


def prepare(recipe: AnyRecipe, seed: int, device: str) -> str:
    """The device of a run, with as many threads as its recipe wants.

    Raises:
        ValueError: a seed out of range, or a device that is not there.
    """
    if not 0 <= seed < 100_000:
        raise ValueError(f"seed must lie in [0, 100000), got {seed}")
    device = check_device(device)
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    return device


def live(task: Task, wait: float = 0.0) -> dict[str, Any]:
    """Train every stage that is not finished yet; returns what ``results.json`` holds, written after each of them.

    Where another process trains in the folder, ``wait`` that many seconds for it to end.

    Raises:
        ValueError: a folder of another run, or one that another process trains in; too little memory; an environment
            that raised an error (the ``__cause__``).
        OutOfTimeError: the run has used its time.
    """
    run = task.run

    def enter() -> None:
        seen = task.check()
        if run.writes:
            held.enter_context(alone_in(run.directory, wait))
        claim(run.directory, run.recipe, run.seed, task.ann, seen)

    with ExitStack() as held:
        if run.writes:
            held.enter_context(show_log())
        run.together(enter)
        LOG.info("training into %s; watch it with: tensorboard --logdir %s", run.directory, run.directory)
        results: dict[str, Any] = {}
        trained = False
        for stage in task.stages:
            if is_finished(run, stage):
                LOG.info("%s is already finished", stage.name)
            else:
                if trained and run.is_late():
                    raise OutOfTimeError(f"out of time before {stage.name}; the same call goes on")
                _train_or_say_why(run, task.training(stage))
                trained = True
            if run.writes:
                remove_leftovers(run.folder(stage))
            results = _collect(task)
            if run.writes:
                write_json(run.directory / "results.json", results)
        return results


def _train_or_say_why(run: Run, training: Training) -> None:
    """Raises ValueError, of one line, where the environment or the memory fails."""
    name = training.stage.name
    try:
        train_stage(run, training)
    except EnvironmentFailedError as failure:
        raise ValueError(
            f"{name}: {failure}; once that is repaired, the same call goes on from the last checkpoint"
        ) from failure.__cause__
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"{name} takes more memory than there is ({one_line(error)}); lower {run.memory_fields}"
        ) from error


def train_stage(run: Run, training: Training) -> None:
    """Train or resume a stage, choose its checkpoint, measure it, write its files, ``metrics.json`` last."""
    stage, folder = training.stage, training.folder
    if run.writes:
        folder.mkdir(parents=True, exist_ok=True)
    since = monotonic()
    if not training.is_trained:
        training.begin()
    else:
        done = training.resume()
        if done is None:
            if run.writes:
                remove_leftovers(folder)
            training.begin()
            LOG.info("%s begins, from %s", stage.name, stage.parent or "nothing")
        else:
            LOG.info("%s goes on after %s", stage.name, done)
        training.train(Checkpoints(training.history, training.save, since))
        training.choose()
    measured = training.export()
    if run.writes and measured is not None:
        write_json(folder / METRICS, _metrics(run, training, measured))
    run.wait()


def _metrics(run: Run, training: Training, measured: Measured) -> dict[str, Any]:
    stage, history = training.stage, training.history
    lifs = {} if measured.network is None else measured.network.lif_layers
    return {
        "stage": stage.name,
        "timesteps": stage.timesteps,
        "parent": stage.parent,
        **measured.counts,
        "wall_seconds": round(history.wall_seconds, 1),
        "cpu_seconds": round(history.cpu_seconds, 1),
        **measured.score,
        "validation": history.validation,
        "curve": history.curve,
        **measurements(measured.activity),
        "threshold": {name: lif.threshold.item() for name, lif in lifs.items()},
        "leak": {name: lif.leak.item() for name, lif in lifs.items()},
        "versions": versions(),
        "hardware": run.hardware,
    }


def _collect(task: Task) -> dict[str, Any]:
    """The metrics of all finished stages, and where the last of them was measured."""
    run = task.run
    finished = [read_json(run.folder(stage) / METRICS) for stage in task.stages if is_finished(run, stage)]
    measured = {key: finished[-1][key] for key in ("versions", "hardware")} if finished else {}
    head = {"recipe": run.recipe.name, "env_id": task.subject, "seed": run.seed}
    return {**head, **measured, "stages": finished}


def is_finished(run: Run, stage: Stage) -> bool:
    return (run.folder(stage) / METRICS).is_file()


def remove_leftovers(folder: Path) -> None:
    """What a stage needs on its way only, and what a kill left half-written."""
    for pattern in ("best.*", "checkpoint.*", f"{TEMPORARY}*"):
        for leftover in folder.glob(pattern):
            leftover.unlink()
