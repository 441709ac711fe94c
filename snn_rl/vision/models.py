"""The ANNs of the paper: VGG6, VGG16 and ResNet20 with average pooling, of ReLUs that conversion knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

POOL = 0  # in a list of channels: average pooling over 2 x 2

VGG = {
    "vgg6": (64, POOL, 128, 128, POOL),
    # without a fifth pooling at 32 x 32, as the authors' code has it
    "vgg16": (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512),
}
HIDDEN = 4096  # units of each of a VGG's two hidden linear layers
RESNET20 = (16, 32, 64)  # channels of its three stages, of three blocks each (He et al. 2016, section 4.2)


def vgg(
    layers: tuple[int, ...],
    classes: int,
    image_size: int,
    *,
    batch_norm: bool = True,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Convolutions of 3 x 3 and pooling as ``layers`` lists them, then two hidden linear layers and the readout."""
    modules: list[nn.Module] = []
    channels, size = 3, image_size
    for wanted in layers:
        if wanted == POOL:
            if size % 2:
                raise ValueError(
                    f"image_size must be a multiple of {2 ** layers.count(POOL)}, one 2 for each pooling, "
                    f"got {image_size}"
                )
            modules.append(nn.AvgPool2d(2))
            size //= 2
            continue
        out = scaled(wanted, width)
        modules.append(nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            modules.append(nn.BatchNorm2d(out))
        modules.append(nn.ReLU())
        channels = out
    hidden = scaled(HIDDEN, width)
    modules.append(nn.Flatten())
    for inputs in (channels * size**2, hidden):
        modules += [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*modules, nn.Linear(hidden, classes))


class Block(nn.Module):
    """Two convolutions and a shortcut, ReLU after their sum; where shapes change, the shortcut is convolved, 1 x 1."""

    def __init__(self, channels: int, out: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = convolution(channels, out, 3, stride, batch_norm)
        self.relu1 = nn.ReLU()
        self.conv2 = convolution(out, out, 3, 1, batch_norm)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else convolution(channels, out, 1, stride, batch_norm)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))


def resnet20(
    classes: int, image_size: int, *, batch_norm: bool = True, width: float = 1.0, dropout: float = 0.0
) -> nn.Sequential:
    """He et al. 2016 for small images: a convolution, three stages of three blocks, average pooling, the readout."""
    if image_size < 4:
        raise ValueError(f"image_size must be >= 4 for resnet20, got {image_size}")
    channels = scaled(RESNET20[0], width)
    modules: list[nn.Module] = [convolution(3, channels, 3, 1, batch_norm), nn.ReLU()]
    for stage, wanted in enumerate(RESNET20):
        out = scaled(wanted, width)
        for block in range(3):
            modules.append(Block(channels, out, 2 if stage and not block else 1, batch_norm))
            channels = out
    modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
    return nn.Sequential(*modules, nn.Linear(channels, classes))


def convolution(channels: int, out: int, kernel: int, stride: int, batch_norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=not batch_norm)
    return nn.Sequential(conv, nn.BatchNorm2d(out)) if batch_norm else nn.Sequential(conv)


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def vgg6(classes: int, image_size: int, **options: Any) -> nn.Sequential:
    return vgg(VGG["vgg6"], classes, image_size, **options)


def vgg16(classes: int, image_size: int, **options: Any) -> nn.Sequential:
    last = (POOL,) if image_size > 32 else ()
    return vgg(VGG["vgg16"] + last, classes, image_size, **options)


MODELS: dict[str, Callable[..., nn.Sequential]] = {"vgg6": vgg6, "vgg16": vgg16, "resnet20": resnet20}


def build(
    model: str,
    classes: int,
    image_size: int,
    *,
    batch_norm: bool = True,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """An untrained classifier: images (batch, 3, image_size, image_size) -> logits (batch, classes).

    Args:
        model: vgg6, vgg16 or resnet20.
        classes: at least 2.
        image_size: of square images; a VGG's linear layers fit this size alone.
        batch_norm: behind every convolution; without it, convolutions have a bias.
        width: multiplies all channels and hidden units.
        dropout: behind each hidden linear layer of a VGG and before the readout of a ResNet; in a spiking network one
            mask for all micro-steps.

    Weights are drawn as He et al. 2015 propose for ReLUs, from torch's global generator.

    Raises:
        ValueError: an unknown model or an argument out of range.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; there are {', '.join(MODELS)}")
    if classes < 2:
        raise ValueError(f"classes must be >= 2, got {classes}")
    if not width > 0:
        raise ValueError(f"width must be > 0, got {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    network = MODELS[model](classes, image_size, batch_norm=batch_norm, width=width, dropout=dropout)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    readout = network[-1]
    assert isinstance(readout, nn.Linear)
    nn.init.normal_(readout.weight, std=0.01)  # so that the first predictions are all alike
    return network
