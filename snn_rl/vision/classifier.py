"""A classifier to share and run: weights, and as JSON all that is needed to rebuild its network. No code is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_rl.base.weights_file import MAX_TIMESTEPS, check_fits, read_weights, write_weights
from snn_rl.core.convert import spiking_architecture
from snn_rl.core.network import SpikingNetwork
from snn_rl.vision.data import read_image
from snn_rl.vision.models import build

FORMAT = "snn_rl-classifier-1"
MAX_IMAGE_SIZE = 2**12  # that a file may ask for before its weights can be compared with it


@dataclass(frozen=True)
class Classifier:
    """A network and what it takes: images are scaled to [0, 1], then normalised by ``mean`` and ``std`` per channel.

    ``architecture`` holds the arguments of `snn_rl.vision.build`; ``provenance`` says where the weights come from.
    """

    network: nn.Module
    architecture: dict[str, Any]
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    provenance: dict[str, Any]

    @property
    def timesteps(self) -> int | None:
        """T, or None for an ANN."""
        return self.network.timesteps if isinstance(self.network, SpikingNetwork) else None

    def read(self, *paths: str | Path) -> Tensor:
        """Image files -> (batch, 3, image_size, image_size) uint8, resized and cut at the centre as in evaluation.

        They are turned into RGB as by ``load_images(convert=True)``.

        Raises:
            ValueError: a file that is missing, corrupt or not convertible, by name.
        """
        size = int(self.architecture["image_size"])
        return torch.from_numpy(np.stack([read_image(Path(path), size, convert=True) for path in paths]))

    def prepare(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) uint8 -> what the network takes, on the images' device.

        Raises:
            ValueError: images of another type or shape.
        """
        size = self.architecture["image_size"]
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
            what = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"images must be a uint8 tensor (batch, 3, {size}, {size}), 0 to 255, got {what}; `read` makes one of "
                "files, and normalisation is done here"
            )
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def logits(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) uint8 -> logits (batch, classes); membranes start from silence."""
        return call(self.network, self.prepare(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) uint8 -> the index of the likeliest of ``classes``, (batch,)."""
        return self.logits(images).argmax(1)


def call(network: nn.Module, x: Tensor) -> Tensor:
    """The output of an ANN, or of a spiking network for one frame from silence, ``DistributedDataParallel`` or not."""
    inner = getattr(network, "module", network)
    return network(x, with_state=False)[0] if isinstance(inner, SpikingNetwork) else network(x)


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Write ``classifier`` to ``path``, atomically."""
    network = classifier.network
    spiking = None
    if isinstance(network, SpikingNetwork):
        lif = next(iter(network.lif_layers.values()))
        spiking = {"timesteps": network.timesteps, "leak_reset": lif.leak_reset}
    metadata = {
        "architecture": classifier.architecture,
        "classes": list(classifier.classes),
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "spiking": spiking,
        "provenance": classifier.provenance,
    }
    write_weights(path, network, FORMAT, metadata)


def load_classifier(path: str | Path, device: str = "cpu") -> Classifier:
    """Load a classifier, in evaluation mode; runs no code from the file.

    Raises:
        ValueError: a missing, truncated or foreign file, or weights that do not fit its description.
    """
    path = Path(path)
    metadata, weights = read_weights(path, FORMAT, "classifier", "model.safetensors")
    try:
        if not isinstance(metadata["classes"], list) or not isinstance(metadata["provenance"], dict):
            raise ValueError("classes must be a list and provenance an object")
        classes = tuple(map(str, metadata["classes"]))
        architecture, spiking = metadata["architecture"], metadata["spiking"]
        if architecture.get("image_size", 1) > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be <= {MAX_IMAGE_SIZE}, got {architecture['image_size']}")
        if spiking is not None and spiking["timesteps"] > MAX_TIMESTEPS:
            raise ValueError(f"timesteps must be <= {MAX_TIMESTEPS}, got {spiking['timesteps']}")

        def rebuild() -> nn.Module:
            ann = build(classes=len(classes), **architecture).eval()
            return ann if spiking is None else spiking_architecture(ann, **spiking)

        check_fits(rebuild, weights)
        network = rebuild()
        network.load_state_dict(weights)
        mean, std = (tuple(map(float, metadata[key])) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std must be three numbers each, std > 0, got {mean} and {std}")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} describes no classifier that can be built: {type(error).__name__}: {reason}"
        ) from error
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Classifier(network, metadata["architecture"], classes, mean, std, metadata["provenance"])
