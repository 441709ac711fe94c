"""Temporal pruning: spike rates per micro-step stay, layer by layer; at T = 1 a threshold is a plain quantile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snn_rl import SpikingNetwork, count_spikes, prune_timesteps, to_spiking


def network(timesteps: int = 5, leak: float = 0.9) -> SpikingNetwork:
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))
    return to_spiking(ann, torch.randn(512, 12), timesteps=timesteps, leak=leak)


def rates(net: SpikingNetwork, frames: Tensor, episode_start: Tensor | None = None) -> list[float]:
    """Spikes per neuron and micro-step of each layer."""
    with torch.no_grad(), count_spikes(net) as counter:
        net.unroll(frames, None, episode_start)
    return [rate / net.timesteps for rate in counter.rates().values()]


@pytest.mark.parametrize("timesteps", [4, 3, 2, 1])
def test_rates_per_micro_step_stay(timesteps: int) -> None:
    net, images = network(), torch.randn(1, 512, 12)
    pruned = prune_timesteps(net, timesteps, images)
    assert pruned.timesteps == timesteps
    assert rates(pruned, images) == pytest.approx(rates(net, images), rel=0.01)
    plain = network(timesteps)
    assert rates(plain, images)[-1] < 0.95 * rates(net, images)[-1]  # what there is to make up for


def test_rates_of_play_in_sequence_stay_where_membranes_persist() -> None:
    net, frames = network(), torch.randn(6, 128, 12)
    starts = torch.rand(6, 128) < 0.2
    pruned = prune_timesteps(net, 1, frames, starts)
    assert rates(pruned, frames, starts) == pytest.approx(rates(net, frames, starts), rel=0.01)


def test_one_micro_step_from_silence_has_the_quantile_of_its_current_as_threshold() -> None:
    net, images = network(), torch.randn(1, 512, 12)
    wanted = rates(net, images)[0]
    pruned = prune_timesteps(net, 1, images)
    first = next(m for m in net.modules() if isinstance(m, nn.Linear))
    current = first(images[0]).detach().numpy()
    expected = np.quantile(current, 1 - wanted)
    assert next(iter(pruned.lif_layers.values())).threshold.item() == pytest.approx(expected, rel=1e-3)


def test_a_silent_layer_keeps_its_threshold() -> None:
    net, images = network(), torch.randn(1, 64, 12)
    first, second = net.lif_layers.values()
    with torch.no_grad():
        second.raw_threshold.fill_(1e6)
    pruned = prune_timesteps(net, 1, images)
    assert [lif.threshold.item() for lif in pruned.lif_layers.values()][1] == 1e6
    assert rates(pruned, images)[0] == pytest.approx(rates(net, images)[0], rel=0.02)
    assert first.threshold.item() == 1.0


def test_a_layer_that_always_fires_is_not_made_to_fire_for_less() -> None:
    net = network(leak=0.0)
    images = torch.randn(1, 64, 12)
    first = next(iter(net.lif_layers.values()))
    with torch.no_grad():
        next(m for m in net.modules() if isinstance(m, nn.Linear)).bias.fill_(100.0)
    assert rates(net, images)[0] == 1.0
    pruned = prune_timesteps(net, 1, images)
    assert next(iter(pruned.lif_layers.values())).threshold.item() >= first.threshold.item()
    assert rates(pruned, images)[0] == 1.0


def test_the_network_itself_stays_as_it_was() -> None:
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruned = prune_timesteps(net, 2, torch.randn(1, 64, 12))
    assert net.training
    assert pruned.training
    assert net.timesteps == 5
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    weights = [(n, p) for n, p in pruned.named_parameters() if "threshold" not in n]
    assert all(torch.equal(p, before[n]) for n, p in weights)


@pytest.mark.parametrize(
    ("timesteps", "frames", "message"),
    [
        (5, torch.zeros(1, 2, 12), "timesteps must be < 5, those of the network, got 5"),
        (0, torch.zeros(1, 2, 12), "timesteps must be an integer >= 1, got 0"),
        (1, torch.full((1, 2, 12), torch.nan), "frames must be finite"),
        (1, torch.zeros(0, 2, 12), "at least one frame"),
        (1, torch.zeros(1, 0, 12), "at least one observation"),
        (1, torch.zeros(1, 2, 11), r"cannot take observations of shape \(11,\).*12x64"),
    ],
)
def test_what_cannot_be_pruned_is_refused(timesteps: int, frames: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_timesteps(network(), timesteps, frames)
