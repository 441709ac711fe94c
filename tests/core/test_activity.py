"""Spike counts, operations, energy and memory accesses against sums made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snn_rl import SpikingNetwork, activity, count_spikes, to_spiking
from snn_rl.core.activity import spikes_per_neuron


def network(timesteps: int = 4) -> SpikingNetwork:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 10), nn.ReLU(), nn.Linear(10, 5)
    )
    return to_spiking(ann, torch.randn(32, 2, 8, 8), timesteps=timesteps)


def test_rates_are_spikes_per_neuron_and_inference() -> None:
    net = network()
    spikes: dict[str, float] = dict.fromkeys(net.lif_layers, 0.0)
    for name, lif in net.lif_layers.items():
        lif.register_forward_hook(
            lambda _m, _i, out, name=name: spikes.update({name: spikes[name] + out[0].sum().item()})
        )
    x = torch.randn(6, 5, 2, 8, 8)
    with count_spikes(net) as counter:
        net.unroll(x)  # 30 inferences
        net(x[0])  # and 5
    first, second = net.lif_layers
    assert counter.rates() == pytest.approx({first: spikes[first] / 35 / (3 * 36), second: spikes[second] / 35 / 10})
    assert 0 < counter.rates()[first] <= 4
    net(x[0])
    assert counter.inferences == {first: 35, second: 35}  # nothing is counted behind the block


def test_spikes_in_a_loss_are_those_that_are_counted_and_pull_spikes_down() -> None:
    net = network()
    x = torch.randn(3, 5, 2, 8, 8)
    with count_spikes(net) as counter, spikes_per_neuron(net) as spikes:
        net.unroll(x)
    first, second = (counter.rates()[name] for name in net.lif_layers)
    mean = spikes.mean()
    assert mean.item() == pytest.approx((first * 3 * 36 + second * 10) / (3 * 36 + 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    mean.backward()
    optimizer.step()
    with spikes_per_neuron(net) as spikes:
        net.unroll(x)
    assert spikes.mean() < mean


def test_spikes_without_gradient_are_no_loss() -> None:
    net = network()
    with spikes_per_neuron(net) as spikes, torch.no_grad():
        net(torch.randn(2, 2, 8, 8))
    with pytest.raises(ValueError, match="no spikes with gradient: run the network inside `spikes_per_neuron`"):
        spikes.mean()


def test_operations_and_energy_by_hand() -> None:
    net = network()
    first, second = net.lif_layers
    measured = activity(net, {first: 0.5, second: 0.25}, (2, 8, 8))
    conv, fc1, fc2 = 3 * 6 * 6 * 2 * 9, 27 * 10, 10 * 5
    assert measured.ann_ops == conv + fc1 + fc2
    assert measured.snn_ops == conv + 0.5 * fc1 + 0.25 * fc2
    energy_ann = 4.6 * (conv + fc1 + fc2)
    energy_snn = 4.6 * conv + 0.9 * (0.5 * fc1 + 0.25 * fc2)
    assert measured.ann_over_snn == pytest.approx(energy_ann / energy_snn)
    neurons = 3 * 6 * 6, 10
    assert measured.mean == pytest.approx((0.5 * neurons[0] + 0.25 * neurons[1]) / sum(neurons))


def test_memory_accesses_by_hand() -> None:
    rates = dict.fromkeys(network().lif_layers, 0.1)
    conv, fc1, fc2, neurons = 3 * 2 * 9, 270, 50, 3 * 36 + 10
    at = {t: activity(network(t), rates, (2, 8, 8)).memory_accesses for t in (1, 4)}
    assert at[4].weights == conv + 4 * (fc1 + fc2)
    assert at[4].membranes == 2 * 4 * neurons
    assert at[4].total == at[4].weights + at[4].membranes
    assert at[1].weights == at[1].ann == conv + fc1 + fc2
    assert at[1].membranes == 2 * neurons
    cleared = activity(network(1), rates, (2, 8, 8), persistent=False).memory_accesses
    assert cleared.membranes == 0


def test_a_sum_carries_the_spikes_of_both_branches() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            return self.c(x + torch.relu(self.b(x)))

    net = to_spiking(Block(), torch.randn(16, 4))
    first, second = net.lif_layers
    measured = activity(net, {first: 0.5, second: 0.25}, (4,))
    assert measured.snn_ops == pytest.approx(16 + 0.5 * 16 + 0.75 * 16)


def test_analogue_values_and_spikes_that_enter_one_synapse_by_hand() -> None:
    class Mixed(nn.Module):
        """An image and a vector side by side, and a shortcut of the vector around a layer of spikes."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Linear(17, 5), nn.Linear(5, 5), nn.Linear(9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            image, vector = x[:, :32].unflatten(1, (2, 4, 4)), x[:, 32:]
            image = torch.relu(self.conv(image)).flatten(1)  # 12 neurons
            hidden = torch.relu(self.a(torch.cat([vector, image], 1))) + vector
            both = torch.cat([image[:, 3:5], torch.relu(self.b(hidden)), image[:, :1], vector[:, 4:]], 1)
            return self.c(both)

    net = to_spiking(Mixed(), torch.randn(16, 37), timesteps=3)
    conv_lif, a_lif, b_lif = net.lif_layers
    measured = activity(net, {conv_lif: 0.5, a_lif: 0.25, b_lif: 0.125}, (37,))
    conv, a, b, c = 12 * 18, 17 * 5, 25, 9 * 2
    assert measured.ann_ops == conv + a + b + c
    # of `a` 5 inputs are analogue and 12 spike; `b` gets both on each; of `c` 3 + 5 spike, and 1 is analogue
    dense = conv + 5 * 5 + b + 2
    additions = 12 * 5 * 0.5 + b * 0.25 + 2 * (3 * 0.5 + 5 * 0.125)
    assert measured.snn_ops == pytest.approx(dense + additions)
    energy = 4.6 * dense + 0.9 * additions
    assert measured.ann_over_snn == pytest.approx(4.6 * (conv + a + b + c) / energy)
    # weights that spikes reach are read at each of 3 micro-steps
    assert measured.memory_accesses.weights == pytest.approx(3 * 2 * 9 + 5 * 5 + 3 * 12 * 5 + 3 * b + 3 * 16 + 2)
    assert measured.mean == pytest.approx((12 * 0.5 + 5 * 0.25 + 5 * 0.125) / 22)


def test_behind_a_synapse_of_both_each_value_is_of_both() -> None:
    class Linears(nn.Module):
        """Two synapses in a row, with no neurons between: the second gets sums of analogue values and spikes."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(7, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(torch.cat([torch.relu(self.a(x)), x], 1)))

    net = to_spiking(Linears(), torch.randn(16, 3), timesteps=4)
    (lif,) = net.lif_layers
    measured = activity(net, {lif: 0.7}, (3,))
    rate = 4 * 0.7 / 7  # over all that enters the first of them
    assert measured.snn_ops == pytest.approx(12 + 3 * 5 + 4 * 5 * 0.7 + (1 + rate) * 10)
    assert measured.memory_accesses.weights == pytest.approx(12 + 3 * 5 + 4 * 4 * 5 + 4 * 10)


def test_rates_must_name_the_layers() -> None:
    with pytest.raises(ValueError, match="rates must name the LIF layers"):
        activity(network(), {"conv": 0.5}, (2, 8, 8))
    with pytest.raises(ValueError, match="no spikes were counted"), count_spikes(network()) as counter:
        counter.rates()
