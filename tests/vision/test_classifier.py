"""Classifier files: what comes back is what was written, and a bad file is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from snn_rl import to_spiking
from snn_rl.vision import Classifier, build, load_classifier, save_classifier
from snn_rl.vision.classifier import FORMAT

ARCHITECTURE: dict[str, Any] = {"model": "resnet20", "image_size": 8, "batch_norm": True, "width": 0.25, "dropout": 0.1}
IMAGES = torch.arange(2 * 3 * 64, dtype=torch.uint8).view(2, 3, 8, 8)


def classifier(timesteps: int | None, *, leak_reset: bool = False) -> Classifier:
    torch.manual_seed(0)
    network: nn.Module = build(classes=3, **ARCHITECTURE).eval()
    if timesteps is not None:
        network = to_spiking(network, torch.randn(8, 3, 8, 8), timesteps=timesteps, leak_reset=leak_reset)
    return Classifier(network, ARCHITECTURE, ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), {"seed": 0})


@pytest.mark.parametrize("timesteps", [None, 1, 4])
def test_it_comes_back_as_it_was(timesteps: int | None, tmp_path: Path) -> None:
    before = classifier(timesteps, leak_reset=timesteps == 4)
    save_classifier(before, tmp_path / "model.safetensors")
    after = load_classifier(tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(after.logits(IMAGES), before.logits(IMAGES), rtol=0, atol=0)
    for name in ("architecture", "classes", "mean", "std", "provenance", "timesteps"):
        assert getattr(after, name) == getattr(before, name)
    assert not after.network.training


def test_images_are_normalised_per_channel() -> None:
    x = classifier(None).prepare(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    assert x[0, :, 0, 0].tolist() == pytest.approx([0.5 / 0.2, 0.6 / 0.3, 0.7 / 0.4])


def test_files_are_read_as_they_are_evaluated(tmp_path: Path) -> None:
    pixels = np.arange(3 * 64, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).resize((24, 16)).convert("L").save(tmp_path / "b.png")
    images = classifier(None).read(tmp_path / "a.png", str(tmp_path / "b.png"))
    assert images.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), pixels)
    with pytest.raises(ValueError, match=r"c\.png is .*no such file"):
        classifier(None).read(tmp_path / "c.png")


@pytest.mark.parametrize(
    "images", [torch.rand(1, 3, 8, 8), torch.zeros(1, 3, 9, 9, dtype=torch.uint8), np.zeros((1, 3, 8, 8), np.uint8)]
)
def test_images_of_another_kind_are_refused(images: Any) -> None:
    with pytest.raises(ValueError, match=r"images must be a uint8 tensor \(batch, 3, 8, 8\), 0 to 255, got"):
        classifier(None).predict(images)


def damage(path: Path, **changes: Any) -> None:
    weights = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[FORMAT])
    metadata.update(changes)
    save_file(weights, path, metadata={FORMAT: json.dumps(metadata)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {**ARCHITECTURE, "model": "os.system"}}, "unknown model 'os.system'"),
        ({"architecture": {**ARCHITECTURE, "width": 0.5}}, "its weights do not fit its description"),
        ({"architecture": {}}, "describes no classifier that can be built: TypeError"),
        ({"classes": ["a"]}, "classes must be >= 2, got 1"),
        ({"std": [0.0, 1.0, 1.0]}, "mean and std must be three numbers each"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "mean and std must be three numbers each"),
        ({"classes": "abc"}, "classes must be a list and provenance an object"),
        ({"provenance": None}, "classes must be a list and provenance an object"),
        ({"spiking": {"timesteps": 0}}, "timesteps must be an integer >= 1, got 0"),
    ],
)
def test_a_file_that_describes_nothing_is_one_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_classifier(classifier(None), path)
    damage(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_classifier(path)


def test_missing_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no classifier file at"):
        load_classifier(tmp_path / "none")
    path = tmp_path / "model.safetensors"
    save_classifier(classifier(None), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_classifier(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a classifier of this package"):
        load_classifier(path)
