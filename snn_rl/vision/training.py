"""The training of a classifier: ANN, conversion, temporal pruning. How stages make a run: `snn_rl.runs.life`.

A stage is resumed to the epoch. Under ``torchrun`` every process takes its part of each batch, gradients are averaged,
and the first process alone writes; the run's folder must be one that all of them see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from snn_rl.runs.life import live, prepare
from snn_rl.runs.stages import Stage, chain
from snn_rl.runs.task import Task, Training
from snn_rl.vision._run import Run, processes
from snn_rl.vision.classifier_training import ClassifierTraining, GivenClassifier, load_ann
from snn_rl.vision.models import build
from snn_rl.vision.recipe import VisionRecipe


def run(
    recipe: VisionRecipe,
    directory: Path,
    seed: int = 0,
    *,
    device: str = "auto",
    ann: Path | None = None,
    progress_bar: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Train every stage of ``recipe`` that is not finished yet; returns what ``results.json`` holds.

    ``ann`` is the ``model.safetensors`` of another run's ANN that takes the ANN stage's place: it is evaluated, not
    trained. After ``minutes`` the run stops at the end of an epoch.

    What the run does is logged to ``logging``'s "snn_rl" and shown on stderr, unless the program has set up logging.
    ``logging.getLogger("snn_rl").setLevel(logging.WARNING)`` turns it off. ``progress_bar`` adds bars with the time
    left, where tqdm is installed.

    Raises:
        ValueError: a directory of another run, a device that is not there, data that cannot be used, an ``ann`` that
            does not fit, a loss that is not finite.
        OutOfTimeError: ``minutes`` have passed; the same call goes on.
    """
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be >= 0, got {minutes}")
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with processes(prepare(recipe, seed, device)) as (device, rank, world):
        if recipe.batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes, got {recipe.batch_size}")
        this = Run(recipe, directory, seed, device, progress_bar and rank == 0, rank, world, deadline)
        return live(ClassifierTask(this, ann))


class ClassifierTask(Task):
    """The ANN, a spiking stage for each T of the recipe's schedule, and a sparse one where the recipe wants it."""

    run: Run

    def __init__(self, run: Run, ann: Path | None = None) -> None:
        self.run, self.ann = run, ann
        self.stages = chain(run.recipe.schedule, ann)
        if sparsity := run.recipe.sparsity:
            self.stages.append(Stage(run.recipe.schedule[-1], self.stages[-1].name, f"-sparse{100 * sparsity:g}"))
        self.subject = run.recipe.dataset

    def check(self) -> Mapping[str, str]:
        run = self.run
        if not (run.directory / "run.json").is_file():
            if run.rank:
                raise ValueError(
                    f"{run.directory} must be a folder that all processes share: the first one's is not seen"
                )
            classes = len(run.data.train.classes)
            with torch.device("meta"):  # takes no memory
                build(classes=classes, **run.architecture)
            if self.ann is not None:
                load_ann(run, self.ann)
        return {}

    def training(self, stage: Stage) -> Training:
        if stage.timesteps is None and self.ann is not None:
            return GivenClassifier(self.run, stage, self.ann)
        return ClassifierTraining(self.run, stage)
