"""Recipes of classifiers: all that a training depends on, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snn_rl.recipe import check_numbers, check_plain, check_schedule

AUGMENTATIONS = ("none", "crop-flip", "resized-crop-flip")
OPTIMIZERS = ("sgd", "adam")
SMOKE_IMAGES = 64  # of each split


@dataclass(frozen=True)
class AnnTraining:
    """The ANN stage. The learning rate falls to 0 along half a cosine."""

    epochs: int = 100
    optimizer: str = "sgd"  # with Nesterov momentum 0.9, or adam
    learning_rate: float = 0.1
    weight_decay: float = 5e-4  # of weights alone: not of biases and batch-norm
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class SnnTraining:
    """A spiking stage: conversion of the ANN, or pruning of timesteps, then surrogate gradients through time."""

    percentile: float = 90.0  # of a ReLU's input: the threshold that it becomes
    leak: float = 1.0
    leak_reset: bool = False
    epochs: int = 20
    same_compute: bool = False  # epochs are those of T = 1; a stage has epochs / T, rounded up, which take as long
    keep_rates: bool = True  # thresholds fall with T (`snn_rl.prune_timesteps`); False lowers T alone, as the paper
    optimizer: str = "adam"  # or sgd
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    label_smoothing: float = 0.1
    distillation_weight: float = 0.0  # of the ANN's softened predictions in the loss; the labels have the rest
    patience: int | None = None  # epochs without a better validation accuracy that end a stage early


@dataclass(frozen=True)
class VisionRecipe:
    """One classifier: data, network, hyperparameters, stages.

    ``dataset`` is cifar10, cifar100 or imagenet-1k, or a folder (`snn_rl.vision.load_images`). ``validation_images``
    are held out of its training images: thresholds are calibrated on ``calibration_images`` of them, checkpoints are
    chosen and stages ended early on all of them. ``width`` multiplies the model's channels. ``total_snn_epochs``
    divides a budget of epochs equally among the spiking stages; None gives each ``snn.epochs``. ``sparsity`` adds a
    last stage that prunes this fraction of each layer's weights by magnitude and trains the rest. ``cpu_threads`` is
    torch's; None leaves it to torch.

    Raises:
        ValueError: a schedule that does not decrease, or a value out of range.
    """

    name: str
    dataset: str
    model: str  # vgg6, vgg16 or resnet20
    image_size: int = 32
    convert: bool = False  # images that are not RGB into RGB; else they are refused
    width: float = 1.0
    batch_norm: bool = True
    dropout: float = 0.0
    augmentation: str = "crop-flip"  # or none, or resized-crop-flip
    validation_images: int = 5_000
    calibration_images: int = 1_000
    batch_size: int = 128  # of all processes together
    ann: AnnTraining = field(default_factory=AnnTraining)
    snn: SnnTraining = field(default_factory=SnnTraining)
    schedule: tuple[int, ...] = (5, 4, 3, 2, 1)
    total_snn_epochs: int | None = None
    sparsity: float = 0.0
    max_images: int | None = None  # of each split, for trials; None takes all
    cpu_threads: int | None = None

    def __post_init__(self) -> None:
        check_plain(self.as_dict())
        check_schedule(self.schedule)
        if not self.width > 0:
            raise ValueError(f"width must be > 0, got {self.width}")
        check_numbers(self, fractions={"sparsity", "dropout", "leak", "label_smoothing", "distillation_weight"})
        if self.total_snn_epochs is not None and self.total_snn_epochs < len(self.schedule):
            raise ValueError(
                f"total_snn_epochs must be >= {len(self.schedule)}, one for each stage, got {self.total_snn_epochs}"
            )
        if self.sparsity == 1:
            raise ValueError("sparsity must be < 1: no weight would be left")
        if not 0 < self.snn.percentile <= 100:
            raise ValueError(f"snn.percentile must lie in (0, 100], got {self.snn.percentile}")
        for value, known, name in (
            (self.augmentation, AUGMENTATIONS, "augmentation"),
            (self.ann.optimizer, OPTIMIZERS, "ann.optimizer"),
            (self.snn.optimizer, OPTIMIZERS, "snn.optimizer"),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.calibration_images > self.validation_images:
            raise ValueError(
                f"calibration_images must be <= validation_images ({self.validation_images}), of which they are, "
                f"got {self.calibration_images}"
            )

    def snn_epochs(self, timesteps: int) -> int:
        """Epochs of the stage at ``timesteps``, at most; of a budget, what is left over goes to the last stages."""
        if self.total_snn_epochs is None:
            return -(-self.snn.epochs // timesteps) if self.snn.same_compute else self.snn.epochs
        each, left = divmod(self.total_snn_epochs, len(self.schedule))
        return each + (len(self.schedule) - self.schedule.index(timesteps) <= left)

    def smoke(self) -> VisionRecipe:
        """The same stages with budgets of seconds: every line runs, nothing is learnt."""
        replace = dataclasses.replace
        return replace(
            self,
            width=self.width / 16,
            max_images=SMOKE_IMAGES,
            validation_images=20,
            calibration_images=20,
            batch_size=16,
            ann=replace(self.ann, epochs=1),
            snn=replace(self.snn, epochs=1),
            total_snn_epochs=None,
        )

    @staticmethod
    def is_smoke(config: Mapping[str, Any]) -> bool:
        """Whether ``config``, as `as_dict` returns it, is that of a `smoke` recipe."""
        return config.get("max_images") == SMOKE_IMAGES

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        return dataclasses.asdict(self)


_VGG6 = VisionRecipe(name="vgg6-cifar10", dataset="cifar10", model="vgg6", dropout=0.2)
_VGG16 = dataclasses.replace(_VGG6, name="vgg16-cifar10", model="vgg16", dropout=0.3)
_RESNET20 = dataclasses.replace(_VGG6, name="resnet20-cifar10", model="resnet20", dropout=0.0)
_IMAGENET = dataclasses.replace(
    _VGG16,
    name="vgg16-imagenet",
    dataset="imagenet-1k",
    image_size=224,
    convert=True,  # it holds a few hundred greyscale images
    augmentation="resized-crop-flip",
    validation_images=20_000,
    calibration_images=1_000,
    batch_size=256,
    snn=SnnTraining(epochs=10),
)
_ON_CIFAR100 = tuple(
    dataclasses.replace(recipe, name=recipe.name.replace("cifar10", "cifar100"), dataset="cifar100")
    for recipe in (_VGG6, _VGG16, _RESNET20)
)
# Two cores: fewer channels and epochs.
_VGG6_NARROW = dataclasses.replace(
    _VGG6,
    name="vgg6-cifar10-w0.25",
    width=0.25,
    dropout=0.1,
    ann=AnnTraining(epochs=24, learning_rate=0.05),
    snn=SnnTraining(epochs=30, same_compute=True, learning_rate=1e-3, distillation_weight=0.7),
)

_VGG16_NARROW = dataclasses.replace(
    _VGG6_NARROW,
    name="vgg16-cifar10-w0.125",
    model="vgg16",
    width=0.125,
    ann=AnnTraining(epochs=8, learning_rate=0.05),
    snn=SnnTraining(epochs=1, learning_rate=1e-3),
)

VISION_RECIPES: dict[str, VisionRecipe] = {
    recipe.name: recipe
    for recipe in (
        _VGG6,
        _VGG6_NARROW,
        _VGG16,
        _VGG16_NARROW,
        _RESNET20,
        *_ON_CIFAR100,
        _IMAGENET,
        dataclasses.replace(
            _IMAGENET,
            name="vgg16-imagenette",
            dataset="imagenette",
            validation_images=1_000,
            batch_size=64,
            ann=AnnTraining(epochs=60, learning_rate=0.02),
            snn=SnnTraining(epochs=20),
        ),
    )
}
