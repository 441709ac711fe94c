"""The paper's networks: their sizes counted by hand, and what becomes of them in conversion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snn_rl import to_spiking
from snn_rl.vision import build
from snn_rl.vision.models import Block


def parameters(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(p.numel() for m in network.modules() if isinstance(m, kind) for p in m.parameters(recurse=False))


def test_vgg16_has_the_published_number_of_weights() -> None:
    network = build("vgg16", 10, 32, batch_norm=False)
    assert parameters(network, nn.Conv2d) == 14_714_688  # of VGG16's thirteen convolutions, wherever it is described
    # no fifth pooling at 32 x 32: 512 channels of 2 x 2
    assert parameters(network, nn.Linear) == 2048 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10


def test_vgg16_for_imagenet_is_the_published_network() -> None:
    with torch.device("meta"):
        network = build("vgg16", 1000, 224, batch_norm=False)
    assert sum(p.numel() for p in network.parameters()) == 138_357_544  # Simonyan & Zisserman's configuration D
    assert sum(isinstance(m, nn.AvgPool2d) for m in network) == 5


def test_vgg6_has_three_convolutions_and_three_linear_layers() -> None:
    network = build("vgg6", 100, 32)
    assert [(m.in_channels, m.out_channels) for m in network if isinstance(m, nn.Conv2d)] == [
        (3, 64), (64, 128), (128, 128),
    ]  # fmt: skip
    assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [
        (8192, 4096), (4096, 4096), (4096, 100),
    ]  # fmt: skip


def test_resnet20_has_the_published_number_of_weights() -> None:
    network = build("resnet20", 10, 32)
    # He et al.'s 0.27 M: a 3-16 stem, six 3 x 3 in each stage, the readout; and here two 1 x 1 shortcuts
    stem, stages = 9 * 3 * 16, 9 * (16 * 16 * 6 + 16 * 32 + 32 * 32 * 5 + 32 * 64 + 64 * 64 * 5)
    assert parameters(network, nn.Conv2d) == stem + stages + 16 * 32 + 32 * 64
    assert parameters(network, nn.Linear) == 64 * 10 + 10
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == 19  # twenty layers, the last without


def test_a_block_adds_before_its_relu() -> None:
    block = Block(2, 2, 1, batch_norm=False)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    x = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("model", ["vgg6", "vgg16", "resnet20"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_converted_network_approaches_the_ann(model: str, batch_norm: bool) -> None:
    torch.manual_seed(0)
    ann = build(model, 5, 16 if model == "vgg16" else 8, batch_norm=batch_norm, width=0.125, dropout=0.1)
    x = torch.randn(64, 3, *[16 if model == "vgg16" else 8] * 2)
    with torch.no_grad():
        for _ in range(3):  # running statistics
            ann(x)
        nn.init.normal_(ann[-1].weight)  # type: ignore[arg-type]
        ann.eval()
        expected = ann(x)
        errors = []
        for timesteps in (4, 256):
            snn = to_spiking(ann, x, percentile=100.0, timesteps=timesteps, leak=1.0)
            errors.append(((snn(x)[0] - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.25 * errors[0]
    assert errors[1] < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "alexnet"}, "unknown model 'alexnet'; there are vgg6, vgg16, resnet20"),
        ({"classes": 1}, "classes must be >= 2, got 1"),
        ({"image_size": 30}, "image_size must be a multiple of 4, one 2 for each pooling, got 30"),
        ({"model": "resnet20", "image_size": 2}, "image_size must be >= 4 for resnet20, got 2"),
        ({"width": 0.0}, "width must be > 0, got 0.0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        build(**{"model": "vgg6", "classes": 10, "image_size": 32, **arguments})
