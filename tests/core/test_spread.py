"""New first weights that remember, and later ones that are not silent."""

from __future__ import annotations

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from snn_rl import to_spiking
from snn_rl.core.convert import spiking_architecture
from snn_rl.core.spread import scale_currents, spread_first_synapse
from snn_rl.rl.policy import MlpPolicy


def test_spread_first_synapse_crosses_its_threshold_at_samples_with_every_gain() -> None:
    torch.manual_seed(0)
    samples = torch.randn(500, 2) * torch.tensor([0.5, 0.04]) + torch.tensor([1.0, -3.0])
    ann = nn.Sequential(nn.Linear(2, 400), nn.ReLU(), nn.Linear(400, 2))
    network = to_spiking(ann, samples, timesteps=1)
    before = {name: p.clone() for name, p in network.named_parameters()}
    spread_first_synapse(network, samples, max_gain=20.0)
    first = next(m for m in network.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        currents = first(samples)  # (samples, neurons)
    (lif,) = network.lif_layers.values()
    assert (currents - lif.threshold / 2).abs().min(0).values.max() < 1e-3
    # a neuron's gain is how far its current spreads over the samples, here by a direction of length 0 to 3
    gains = currents.std(0)
    assert gains.min() < 1
    assert 10 < gains.max() < 20 * 4
    for name, p in network.named_parameters():  # and nothing else is touched
        assert torch.equal(p, before[name]) == (not any(p is q for q in first.parameters()))


def test_of_a_convolution_every_patch_is_a_sample() -> None:
    torch.manual_seed(0)
    images = torch.zeros(60, 2, 9, 9)
    images[:, :, 2:7, 3:8] = torch.rand(60, 2, 5, 5)
    ann = nn.Sequential(nn.Conv2d(2, 200, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(200 * 16, 2))
    network = to_spiking(ann, images, timesteps=1)
    spread_first_synapse(network, images, max_gain=20.0)
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        currents = first(images)  # (samples, neurons, height, width)
    (lif,) = network.lif_layers.values()
    at_a_patch = (currents - lif.threshold / 2).abs().amin((0, 2, 3))
    assert at_a_patch.max() < 1e-3
    shown = currents.transpose(0, 1).flatten(1)
    gains = shown.std(1)
    assert gains.min() < 1.5
    assert 5 < gains.max() < 20 * 4


def test_what_moves_leaves_a_trail() -> None:
    torch.manual_seed(0)
    images = torch.zeros(16, 1, 6, 6)
    for i in range(16):
        images[i, 0, i // 4 + 1, i % 4 + 1] = 1.0
    ann = nn.Sequential(nn.Conv2d(1, 32, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 25, 2))
    network = spiking_architecture(ann, 1, leak=0.8)
    spread_first_synapse(network, images)
    with torch.no_grad():  # what is left of a ball two frames after it was there, behind both
        ball_then_nothing = torch.stack([images[5:6], torch.zeros(1, 1, 6, 6)])
        nothing = torch.zeros(2, 1, 1, 6, 6)
        _, after_ball = network.unroll(ball_then_nothing)
        _, after_nothing = network.unroll(nothing)
    trail = (after_ball[0] - after_nothing[0]).abs()[0]  # (channels, height, width)
    threshold = next(iter(network.lif_layers.values())).threshold
    assert (trail[:, :2, :2] > 2 * threshold).any()  # the four positions whose kernels saw it
    elsewhere = trail.clone()
    row, column = 5 // 4 + 1, 5 % 4 + 1
    elsewhere[:, row - 1 : row + 1, column - 1 : column + 1] = 0
    assert elsewhere.max() < 1e-4


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(1, 2, 3, bias=False),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(1, 2, 3, padding="valid"),
        nn.Conv2d(1, 2, 5, padding=1, padding_mode="reflect"),
    ],
    ids=["no-bias", "groups", "padding-by-name", "reflect"],
)
def test_spread_first_synapse_refuses_what_it_cannot_draw(first: nn.Conv2d) -> None:
    images = torch.rand(4, first.in_channels, 8, 8)
    ann = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 2))
    network = to_spiking(ann, images, timesteps=1)
    with pytest.raises(ValueError, match=r"only a Linear or Conv2d first layer .* can be spread, got .*Conv2d"):
        spread_first_synapse(network, images)


def test_spread_first_synapse_on_samples_that_do_not_vary() -> None:
    ann = nn.Sequential(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 2))
    network = to_spiking(ann, torch.rand(8, 2), timesteps=1)
    spread_first_synapse(network, torch.tensor([[0.3, 0.3]]))
    first = next(m for m in network.modules() if isinstance(m, nn.Linear))
    assert torch.isfinite(first.weight).all()
    assert first.weight.abs().max() < 30 * 6  # a gain times a normal draw, in units of 1


def test_images_that_show_nothing_are_spread_in_units_of_one() -> None:
    ann = nn.Sequential(nn.Conv2d(1, 50, 3), nn.ReLU(), nn.Flatten(), nn.Linear(50 * 4, 2))
    network = to_spiking(ann, torch.rand(8, 1, 4, 4), timesteps=1)
    spread_first_synapse(network, torch.full((3, 1, 4, 4), 0.3))
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert torch.isfinite(first.weight).all()
    assert 0 < first.weight.abs().max() < 30 * 6


def test_every_current_behind_the_first_deviates_by_half_its_threshold() -> None:
    torch.manual_seed(0)
    x = torch.rand(400, 1, 8, 8)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 2), nn.ReLU(), nn.Flatten()]
    ann = nn.Sequential(*layers, nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 3))
    network = to_spiking(ann, x, timesteps=2)
    before = {name: p.clone() for name, p in network.named_parameters()}
    scale_currents(network, x)
    currents: list[torch.Tensor] = []
    for lif in network.lif_layers.values():
        lif.register_forward_pre_hook(lambda _, args: currents.append(args[0]))
    with torch.no_grad():
        network(x)
    for lif, current in zip(list(network.lif_layers.values())[1:], currents[1:], strict=True):
        torch.testing.assert_close(current.std(correction=0), lif.threshold.detach() / 2)
    synapses = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    scaled = [not torch.equal(m.weight, before[name]) for m, name in zip(synapses, _weights(network), strict=True)]
    assert scaled == [False, True, True, False]  # neither the first nor the readout


def _weights(network: nn.Module) -> list[str]:
    return [f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_a_current_that_does_not_vary_is_left_alone() -> None:
    ann = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    network = to_spiking(ann, torch.rand(8, 2), timesteps=1)
    silent = torch.full((8, 2), -1e6)
    with torch.no_grad():
        for p in next(m for m in network.modules() if isinstance(m, nn.Linear)).parameters():
            p.fill_(1.0)
        for bias in [m.bias for m in network.modules() if isinstance(m, nn.Linear)]:
            bias.zero_()
    before = [p.clone() for p in network.parameters()]
    scale_currents(network, silent)
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


def test_two_branches_into_one_layer_are_scaled_alike() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(6, 5)
            self.last, self.relu = nn.Linear(5, 2), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.relu(self.first(x))
            return self.last(torch.relu(self.left(h) + self.right(h)))

    torch.manual_seed(0)
    x = torch.rand(50, 3)
    network = spiking_architecture(Branches(), 1)
    spread_first_synapse(network, x)
    named = dict(network.named_modules())
    left, right = named["graph.left"], named["graph.right"]
    assert isinstance(left, nn.Linear)
    assert isinstance(right, nn.Linear)
    ratio = left.weight / right.weight
    scale_currents(network, x)
    torch.testing.assert_close(left.weight / right.weight, ratio)


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last, self.relu = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.relu(self.first(x))
        return self.last(torch.relu(self.second(h) + h))


def test_behind_a_shortcut_the_first_synapse_is_left_as_it_was_spread() -> None:
    torch.manual_seed(0)
    x = torch.rand(50, 3)
    network = spiking_architecture(Shortcut(), 1)
    spread_first_synapse(network, x)
    named = dict(network.named_modules())
    first, second = named["graph.first"], named["graph.second"]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    before = first.weight.clone(), second.weight.clone()
    scale_currents(network, x)
    assert torch.equal(first.weight, before[0])
    assert not torch.equal(second.weight, before[1])


def test_an_agent_that_has_acted_sees_its_new_weights() -> None:
    torch.manual_seed(0)
    policy = MlpPolicy(Box(-1, 1, (3,)), Discrete(2), lambda _: 0.0, net_arch=[8, 8], timesteps=1)
    x = torch.rand(5, 3)
    policy.q_net.act(x, None, None)
    scale_currents(policy.q_net.network, x)
    acted, _ = policy.q_net.act(x, None, None)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(acted), policy.q_net(x)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_leave_the_weights_alone(bad: float) -> None:
    network = spiking_architecture(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), 1)
    before = [p.clone() for p in network.parameters()]
    samples = torch.rand(50, 3)
    samples[7, 1] = bad
    with pytest.raises(ValueError, match="the samples hold NaN or infinity: repair the environment"):
        spread_first_synapse(network, samples)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
