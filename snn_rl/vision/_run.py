"""A classifier's run: its data, and the processes that share its work."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from snn_rl.runs import task
from snn_rl.runs.stages import Stage
from snn_rl.vision.classifier import Classifier
from snn_rl.vision.data import ImageFiles, Images, channel_statistics, hold_out, load_images
from snn_rl.vision.recipe import VisionRecipe


@dataclass(frozen=True)
class Data:
    """``train`` and ``validation`` are the training images, ``test`` is for reporting alone."""

    train: Images | ImageFiles
    validation: Images | ImageFiles
    test: Images | ImageFiles
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Run(task.Run):
    """One training of a recipe: where, with which seed, on which device, by how many processes."""

    recipe: VisionRecipe
    rank: int = 0
    world: int = 1
    deadline: float = math.inf  # of `time.monotonic`

    memory_fields = "batch_size, width or image_size"

    @cached_property
    def data(self) -> Data:
        recipe = self.recipe
        train, test = (
            load_images(recipe.dataset, split, recipe.image_size, convert=recipe.convert) for split in ("train", "test")
        )
        try:
            kept, validation = hold_out(train, recipe.validation_images, self.seed)
        except ValueError as error:
            raise ValueError(
                f"validation_images: {error} (of {len(train)} training images, and with them calibration_images, "
                f"{recipe.calibration_images}, and batch_size, {recipe.batch_size})"
            ) from error
        if recipe.max_images is not None:
            kept, test = (thinned(d, recipe.max_images) for d in (kept, test))
        if len(kept) < recipe.batch_size:
            raise ValueError(f"batch_size must be <= {len(kept)}, the images left to train on, got {recipe.batch_size}")
        mean, std = channel_statistics(kept)
        return Data(kept.to(self.device), validation.to(self.device), test.to(self.device), mean, std)

    @property
    def architecture(self) -> dict[str, Any]:
        recipe = self.recipe
        names = ("model", "image_size", "batch_norm", "width", "dropout")
        return {name: getattr(recipe, name) for name in names}

    @property
    def split(self) -> dict[str, Any]:
        """What decides which images were trained on."""
        names = ("dataset", "validation_images", "max_images")
        return {**{name: getattr(self.recipe, name) for name in names}, "seed": self.seed}

    def classifier(self, network: nn.Module, stage: Stage) -> Classifier:
        provenance = {"recipe": self.recipe.name, "stage": stage.name, **self.split}
        data = self.data
        return Classifier(network, self.architecture, data.train.classes, data.mean, data.std, provenance)

    def autocast(self) -> torch.autocast:
        """bfloat16 where tensor cores make it pay."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.device.startswith("cuda"))

    @property
    def writes(self) -> bool:
        return self.rank == 0

    @property
    def hardware(self) -> str:
        return super().hardware + (f", {self.world} processes" if self.world > 1 else "")

    def is_late(self) -> bool:
        """Whether any process has passed the deadline: all have to agree to stop."""
        late = torch.tensor(float(time.monotonic() > self.deadline), device=self.device)
        return bool(self.total(late) > 0)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            if values.device.type != torch.device(self.device).type:  # which NCCL could not reach
                raise AssertionError(f"a tensor on {values.device} cannot be added up on {self.device}")
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process is here: what one wrote, the others now see."""
        if self.world > 1:
            dist.barrier()

    def of_all(self, value: Any) -> set[Any]:
        """The values of all processes; waits for them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return set(values)

    def together(self, check: Callable[[], None]) -> None:
        """Run ``check``, the first process before the others; where it fails in one, it does in all.

        Raises:
            ValueError: of the first process that failed.
        """
        failure: str | None = None
        for turn in (self.rank == 0, self.rank != 0):
            if turn:
                try:
                    check()
                except (ValueError, OSError) as error:
                    if self.world == 1:
                        raise
                    failure = str(error)
            self.wait()
        for message in sorted(self.of_all(failure) - {None}):
            raise ValueError(message)


def thinned(data: Images | ImageFiles, number: int) -> Images | ImageFiles:
    """At most ``number`` images, evenly spread."""
    number = min(number, len(data))
    return data.pick(torch.arange(number) * len(data) // number)


@contextmanager
def processes(device: str) -> Iterator[tuple[str, int, int]]:
    """This process's device, its rank and their number, as ``torchrun`` says; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield device, 0, 1
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device, dist.get_rank(), world
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()
