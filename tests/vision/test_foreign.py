"""ANNs from elsewhere: networks as torchvision lays them out, defined here in plain PyTorch, convert as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from snn_rl import to_spiking


class VGG(nn.Module):
    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (8, 0, 16, 16, 0):
            if not out:
                layers.append(nn.AvgPool2d(kernel_size=2, stride=2))
                continue
            layers += [nn.Conv2d(channels, out, kernel_size=3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(),
            nn.Linear(32, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2, shortcut), BasicBlock(16, 16))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.mark.parametrize(("kind", "relus"), [(VGG, 5), (ResNet, 9)])
def test_it_converts_and_approaches_the_ann(kind: type[nn.Module], relus: int) -> None:
    torch.manual_seed(1)
    ann = kind()
    x = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        for _ in range(10):
            ann(x)
    before = copy.deepcopy(ann.eval().state_dict())
    errors = []
    with torch.no_grad():
        expected = ann(x)
        for timesteps in (2, 32, 512):
            snn = to_spiking(ann, x, percentile=100.0, timesteps=timesteps, leak=1.0)
            errors.append(((snn(x)[0] - expected).norm() / expected.norm()).item())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.1
    assert len(snn.lif_layers) == relus
    assert all(torch.equal(value, before[name]) for name, value in ann.state_dict().items())


def test_layers_keep_their_names() -> None:
    snn = to_spiking(ResNet().eval(), torch.randn(4, 3, 16, 16), timesteps=1)
    names = set(snn.graph.state_dict())
    assert {"layer2.0.downsample.0.weight", "layer1.1.conv2.bias", "fc.weight"} <= names


def test_a_vgg_with_max_pooling_fires_as_layer_by_layer_arithmetic_says() -> None:
    """As torchvision builds it. At one micro-step a neuron fires where its current exceeds 1, and pooling is an OR."""
    torch.manual_seed(1)
    net = VGG()
    for index, layer in enumerate(net.features):
        if isinstance(layer, nn.AvgPool2d):
            net.features[index] = nn.MaxPool2d(2, 2)
    x = torch.randn(32, 3, 16, 16)
    with torch.no_grad():
        for _ in range(10):
            net(x)
    snn = to_spiking(net.eval(), x, 60.0, timesteps=1)
    assert list(snn.spike_pools) == ["features_3", "features_10"]
    graph = snn.graph
    with torch.no_grad():
        h = x
        for index, layer in enumerate(net.features):
            if isinstance(layer, nn.Conv2d):
                h = (graph.get_submodule(f"features.{index}")(h) > 1).float()
            elif isinstance(layer, nn.MaxPool2d):
                h = h.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).any(-1).float()
        h = torch.flatten(net.avgpool(h), 1)
        for name in ("0", "3"):
            h = (graph.get_submodule(f"classifier.{name}")(h) > 1).float()
        torch.testing.assert_close(snn(x)[0], graph.get_submodule("classifier.6")(h))
        assert h.any()


def test_what_torchvision_has_and_we_do_not_is_refused_by_name() -> None:
    net = VGG()
    net.features[2] = nn.Hardswish()
    with pytest.raises(ValueError, match=r"'features_2' \(Hardswish\): use Linear, Conv"):
        to_spiking(net.eval(), torch.randn(4, 3, 16, 16))
