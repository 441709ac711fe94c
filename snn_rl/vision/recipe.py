"""Recipes of classifiers: all that a training depends on, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snn_rl.base.fields import amount, check_fields, choice, count, fraction, percent, positive, switch
from snn_rl.runs.recipe import check_plain, check_schedule

AUGMENTATIONS = ("none", "crop-flip", "resized-crop-flip")
OPTIMIZERS = ("sgd", "adam")
SMOKE_IMAGES = 64  # of each split


# The comment at or above a field is its help on the command line.


@dataclass(frozen=True)
class AnnTraining:
    """The ANN stage, which trains an ordinary network. Its learning rate falls to 0 along half a cosine."""

    epochs: int = count(100)  # epochs of the stage
    optimizer: str = choice("sgd", *OPTIMIZERS)  # sgd (with Nesterov momentum 0.9) or adam
    learning_rate: float = amount(0.1)  # learning rate at the start
    weight_decay: float = amount(5e-4)  # weight decay; biases and batch-norm have none
    label_smoothing: float = fraction(0.1)  # share of a label's weight that is spread over all classes


@dataclass(frozen=True)
class SnnTraining:
    """A spiking stage. It is the converted ANN, or the stage before it with fewer timesteps, trained on."""

    # the initial threshold is this percentile of the inputs of the ReLU that it replaces
    percentile: float = percent(90.0)
    # initial leak, the factor by which a membrane potential shrinks at each timestep; 1: no leak
    leak: float = fraction(1.0)
    # let the reset leak too: a membrane keeps leak * (potential - threshold * spike) instead of
    # leak * potential - threshold * spike
    leak_reset: bool = switch(False)
    epochs: int = count(20)  # epochs of the stage, at most
    same_compute: bool = switch(False)  # divide epochs by T, rounded up, so that stages take equally long
    # lower the thresholds with T, so that neurons fire as often per timestep as before; otherwise lower T alone, as the
    # paper does
    keep_rates: bool = switch(True)
    optimizer: str = choice("adam", *OPTIMIZERS)  # adam or sgd (with Nesterov momentum 0.9)
    learning_rate: float = amount(1e-4)  # learning rate at the start; it falls to 0 along half a cosine
    weight_decay: float = amount(0.0)  # weight decay; biases and batch-norm have none
    label_smoothing: float = fraction(0.1)  # share of a label's weight that is spread over all classes
    # weight of the ANN's predictions in the loss, from 0 to 1; labels have the rest
    distillation_weight: float = fraction(0.0)
    patience: int | None = count(None)  # end the stage after this many epochs without a better validation; None: never


@dataclass(frozen=True)
class VisionRecipe:
    """One classifier: data, network, hyperparameters, stages.

    Raises:
        ValueError: a schedule that does not decrease, or a value out of range.
    """

    name: str
    dataset: str  # cifar10, cifar100 or imagenet-1k, or a folder with train/CLASS/IMAGE and test/CLASS/IMAGE
    model: str  # vgg6, vgg16 or resnet20
    image_size: int = count(32)  # height and width of the images in pixels
    convert: bool = switch(False)  # convert images that are not RGB; otherwise they are refused
    width: float = positive(1.0)  # factor for the model's numbers of channels
    batch_norm: bool = switch(True)  # batch-norm in the ANN; it is folded into the spiking network
    dropout: float = fraction(0.0)  # share of activations that dropout sets to 0
    augmentation: str = choice("crop-flip", *AUGMENTATIONS)  # crop-flip, resized-crop-flip or none
    validation_images: int = count(5_000)  # training images to hold out, which choose checkpoints and end stages early
    calibration_images: int = count(1_000)  # validation images that set the thresholds in the conversion
    batch_size: int = count(128)  # images per gradient step, of all processes together
    ann: AnnTraining = field(default_factory=AnnTraining)
    snn: SnnTraining = field(default_factory=SnnTraining)
    schedule: tuple[int, ...] = (5, 4, 3, 2, 1)  # timesteps per image (T) of each spiking stage, in decreasing order
    # epochs of all spiking stages together, divided equally; None: each stage has snn.epochs
    total_snn_epochs: int | None = count(None)
    # add a last stage that sets this share of each layer's weights to 0, the smallest ones; 0: no such stage
    sparsity: float = fraction(0.0)
    max_images: int | None = count(None)  # use only this many images of each split, to try things out; None: all
    cpu_threads: int | None = count(None)  # CPU threads of torch; None: torch decides

    def __post_init__(self) -> None:
        check_plain(self.as_dict())
        check_schedule(self.schedule)
        check_fields(self)
        if self.total_snn_epochs is not None and self.total_snn_epochs < len(self.schedule):
            raise ValueError(
                f"total_snn_epochs must be >= {len(self.schedule)}, one for each stage, got {self.total_snn_epochs}"
            )
        if self.sparsity == 1:
            raise ValueError("sparsity must be < 1: no weight would be left")
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
