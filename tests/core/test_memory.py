"""What training keeps: spikes are computed again, and a convolution behind them lets go of them early."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from snn_rl import to_spiking
from snn_rl.core.scan import SpikeConv2d, SpikesRecomputed


def twins(*args: Any, **kwargs: Any) -> tuple[SpikeConv2d, nn.Conv2d]:
    plain = nn.Conv2d(*args, **kwargs).double()
    ours = SpikeConv2d(*args, **kwargs).double()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"kernel_size": 3}, (7, 9)),
        ({"kernel_size": 4, "stride": 2}, (9, 8)),
        ({"kernel_size": 8, "stride": 4}, (23, 21)),
        ({"kernel_size": (3, 2), "stride": (3, 2), "padding": (2, 1), "dilation": (2, 1)}, (12, 11)),
        ({"kernel_size": 3, "padding": 1, "groups": 2, "bias": False}, (6, 6)),
        ({"kernel_size": 3, "padding": "same"}, (6, 5)),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (6, 5)),
    ],
)
@pytest.mark.parametrize("batch", [0, 3])
def test_gradients_are_those_of_pytorch(options: dict[str, Any], size: tuple[int, int], batch: int) -> None:
    ours, plain = twins(4, 6, **options)
    x = torch.randn(batch, 4, *size).double()
    results = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, let_go=True) if layer is ours else layer(leaf)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [leaf, *layer.parameters()])))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


def test_frozen_weights_and_a_single_image() -> None:
    ours, plain = twins(2, 3, 3)
    for layer in (ours, plain):
        layer.weight.requires_grad_(False)
    for shape in ((2, 2, 5, 5), (2, 5, 5)):
        grads = []
        for layer in (ours, plain):
            x = torch.arange(float(torch.Size(shape).numel())).double().view(shape).requires_grad_()
            assert layer.bias is not None
            out = layer(x, let_go=True) if layer is ours else layer(x)
            grads.append(torch.autograd.grad(out.square().sum(), [x, layer.bias]))
        for mine, expected in zip(*grads, strict=True):
            torch.testing.assert_close(mine, expected)


def test_the_input_is_gone_before_its_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = twins(2, 3, 3)
    again: list[weakref.ref[Tensor]] = []
    seen = []

    def unpack(x: Tensor) -> Tensor:
        if x.shape[1:] != (2, 5, 5):
            return x
        copy = x.clone()
        again.append(weakref.ref(copy))
        return copy

    transposed = nn.functional.conv_transpose2d

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.extend(copy() for copy in again)
        return transposed(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "conv_transpose2d", watched)
    with saved_tensors_hooks(lambda x: x, unpack):
        loss = ours(torch.randn(1, 2, 5, 5).double().requires_grad_(), let_go=True).sum()
    loss.backward()
    assert seen == [None]


def test_no_spikes_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each LIF layer its input current is saved; of spikes none, but where they are copied into another order."""
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 2),
    )  # fmt: skip
    x = torch.rand(3, 2, 6, 6)
    network = to_spiking(ann, x, timesteps=5)
    kept: list[torch.Size] = []
    pack = SpikesRecomputed._pack

    def recording(self: SpikesRecomputed, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        if isinstance(packed, Tensor) and not isinstance(packed, nn.Parameter):
            kept.append(packed.shape)
        return packed

    monkeypatch.setattr(SpikesRecomputed, "_pack", recording)
    weights = {p.numel() for p in network.parameters()}
    network(x)[0].sum().backward()
    with_steps = [tuple(shape) for shape in kept if shape.numel() > x.numel() and shape.numel() not in weights]
    # The first layer's current is the same at every micro-step, and so has none; flattening leaves channels-last.
    assert with_steps == [(5, 3, 8, 2, 2), (15, 32), (5, 3, 16)]
    assert (1, 3, 4, 4, 4) in kept


def test_a_backward_pass_inside_autocast_keeps_the_precision_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    grads = []
    plain = nn.Conv2d(4, 6, 3)
    ours = SpikeConv2d(4, 6, 3)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 7, 7)
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, let_go=True) if layer is ours else layer(leaf)
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(torch.autograd.grad(out.square().sum(), [leaf, layer.weight]))
    for mine, expected in zip(*grads, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_spikes_that_a_hook_has_changed_are_kept(timesteps: int) -> None:
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    net = to_spiking(ann, x, timesteps=timesteps)

    def silence(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            output[0].mul_(0)

    next(iter(net.lif_layers.values())).register_forward_hook(silence)
    net(x)[0].square().sum().backward()
    second = [m for m in net.modules() if isinstance(m, nn.Linear)][1]
    assert second.weight.grad is not None
    assert not second.weight.grad.any()  # nothing entered it
