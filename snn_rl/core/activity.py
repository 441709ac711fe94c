"""What a spiking network does and costs: spike rates, operations, energy, memory accesses.

Energy model of the temporal-pruning paper, 45 nm CMOS (Horowitz 2014): a multiply-accumulate costs 4.6 pJ, an
addition 0.9 pJ,

    E_ann / E_snn = sum_q(ops_q * 4.6) / (ops_1 * 4.6 + sum_{q>=2}(rate_{q-1} * ops_q * 0.9))

with ``ops_q`` the dense operations of synapse q and ``rate_{q-1}`` the spikes per neuron and inference (summed over
the T micro-steps) that enter it. With direct encoding the first synapse is dense in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from snn_rl.core.network import SpikingNetwork
from snn_rl.core.neuron import LIF

PJ_PER_MAC = 4.6
PJ_PER_ADDITION = 0.9


@dataclass(frozen=True)
class MemoryAccesses:
    """Words read or written for one inference (one frame)."""

    weights: float
    membranes: float
    total: float
    ann: float


@dataclass(frozen=True)
class Activity:
    """Measured spike rates and what follows from them, per inference of one frame.

    ``layers`` maps each LIF layer to its spikes per neuron, summed over T; ``mean`` is over all neurons.
    ``ann_ops`` are multiply-accumulates; ``snn_ops`` counts the first synapse's multiply-accumulates and, behind it,
    one addition per spike and synapse.
    """

    mean: float
    layers: dict[str, float]
    ann_ops: float
    snn_ops: float
    ann_over_snn: float
    memory_accesses: MemoryAccesses

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class SpikeCounter:
    """Running spike counts of a network's LIF and max-pooling layers; filled by `count_spikes`."""

    def __init__(self, network: SpikingNetwork) -> None:
        self.network = network
        self.spikes: dict[str, float] = dict.fromkeys([*network.lif_layers, *network.spike_pools], 0.0)
        self.neurons: dict[str, int] = {}  # per observation
        self.inferences: dict[str, int] = dict.fromkeys(self.spikes, 0)
        self.counted: np.ndarray | None = None  # (batch,) bool, which of the batch to count; None counts all

    def rates(self) -> dict[str, float]:
        """Spikes per neuron and inference of each LIF layer, and of each max-pooling layer that spikes go through.

        Raises ValueError where nothing was counted.
        """
        if not all(self.inferences.values()):
            raise ValueError("no spikes were counted: run the network inside `count_spikes` first")
        return {name: n / self.inferences[name] / self.neurons[name] for name, n in self.spikes.items()}


@contextmanager
def count_spikes(network: SpikingNetwork) -> Iterator[SpikeCounter]:
    """Count the spikes of everything that ``network`` computes inside the ``with`` block.

    >>> with count_spikes(net) as counter:          # doctest: +SKIP
    ...     evaluate_policy(agent, env)
    >>> activity(net, counter.rates(), observation_shape=(4, 84, 84))   # doctest: +SKIP
    """
    counter = SpikeCounter(network)

    def count(name: str, spikes: Tensor) -> None:
        if counter.counted is not None:
            spikes = spikes[:, torch.as_tensor(counter.counted, device=spikes.device)]
        counter.spikes[name] += float(spikes.detach().sum(dtype=torch.float64))
        counter.neurons[name] = math.prod(spikes.shape[2:])
        counter.inferences[name] += spikes.shape[0] // network.timesteps * spikes.shape[1]

    with _at_every_layer(network, count, pools=True):
        yield counter


@contextmanager
def _at_every_layer(
    network: SpikingNetwork, look: Callable[[str, Tensor], None], *, pools: bool = False
) -> Iterator[None]:
    """Call ``look`` with the name and the spikes (frames * T, batch, ...) of each LIF layer that is run.

    With ``pools``, of each max-pooling layer behind them, too.
    """
    batch = 0

    def at_lif(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            nonlocal batch
            batch = output[0].shape[1]
            look(name, output[0])

        return hook

    def at_pool(name: str) -> Any:  # which sees micro-steps and batch as one dimension
        return lambda _module, _inputs, output: look(name, output.unflatten(0, (-1, batch)))

    handles = [lif.register_forward_hook(at_lif(name)) for name, lif in network.lif_layers.items()]
    if pools:
        handles += [pool.register_forward_hook(at_pool(name)) for name, pool in network.spike_pools.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SpikeMean:
    """Spikes of a network's LIF layers as part of a loss; filled by `spikes_per_neuron`."""

    def __init__(self) -> None:
        self.spikes: list[Tensor] = []  # of each call of a layer with gradient, per inference
        self.neurons: dict[str, int] = {}

    def mean(self) -> Tensor:
        """Spikes per neuron and inference, over all layers, with gradient; a scalar. ValueError where none was."""
        if not self.spikes:
            raise ValueError("no spikes with gradient: run the network inside `spikes_per_neuron` first")
        return torch.stack(self.spikes).sum() / sum(self.neurons.values())


@contextmanager
def spikes_per_neuron(network: SpikingNetwork) -> Iterator[SpikeMean]:
    """What `count_spikes` counts, over all neurons, as a tensor to be penalised: of one call with gradient."""
    mean = SpikeMean()

    def add(name: str, spikes: Tensor) -> None:
        if spikes.requires_grad:
            mean.spikes.append(spikes.sum() * (network.timesteps / (spikes.shape[0] * spikes.shape[1])))
            mean.neurons[name] = math.prod(spikes.shape[2:])

    with _at_every_layer(network, add):
        yield mean


def activity(
    network: SpikingNetwork,
    rates: dict[str, float],
    observation_shape: tuple[int, ...],
    *,
    persistent: bool = True,
    skip_zero_weights: bool = False,
) -> Activity:
    """Operations, energy ratio and memory accesses of one frame at the measured ``rates``.

    Args:
        network: a converted network.
        rates: spikes per neuron and inference of each layer, from `count_spikes`.
        observation_shape: of one observation, without the batch.
        persistent: membranes survive from frame to frame, and so are read and written at every micro-step; where they
            are cleared, the first step has none to read and the last none to write.
        skip_zero_weights: the spiking network neither reads weights of 0 nor computes with them; the ANN does both.

    Memory accesses: a synapse reads each weight once per micro-step (the first synapse, and the ANN, once per frame).

    Raises:
        ValueError: rates that do not name the network's LIF layers and the max-pooling layers behind them.
    """
    expected = {**network.lif_layers, **network.spike_pools}
    if set(rates) != set(expected):
        raise ValueError(f"rates must name the LIF layers and spike pools {sorted(expected)}, got {sorted(rates)}")
    synapses, neurons = _synapses(network, rates, observation_shape)
    steps = network.timesteps
    ann_ops = sum(s.ops for s in synapses)
    energy_ann = ann_ops * PJ_PER_MAC
    kept = [s.density if skip_zero_weights else 1.0 for s in synapses]
    dense = sum(s.ops * share for s, share in zip(synapses, kept, strict=True) if s.rate is None)
    additions = sum(s.ops * share * s.rate for s, share in zip(synapses, kept, strict=True) if s.rate is not None)
    energy_snn = dense * PJ_PER_MAC + additions * PJ_PER_ADDITION
    weights = sum(s.weights * share * (1 if s.rate is None else steps) for s, share in zip(synapses, kept, strict=True))
    membranes = sum(neurons.values()) * 2 * (steps if persistent else steps - 1)
    return Activity(
        mean=sum(rates[name] * n for name, n in neurons.items()) / sum(neurons.values()),
        layers={name: rates[name] for name in network.lif_layers},
        ann_ops=ann_ops,
        snn_ops=dense + additions,
        ann_over_snn=energy_ann / energy_snn,
        memory_accesses=MemoryAccesses(
            weights=weights, membranes=membranes, total=weights + membranes, ann=sum(s.weights for s in synapses)
        ),
    )


@dataclass(frozen=True)
class _Synapse:
    ops: int  # multiply-accumulates per dense pass of one observation
    weights: int
    density: float  # share of the weights that are not 0
    rate: float | None  # of the spikes that enter it; None where its input is analogue


def _synapses(
    network: SpikingNetwork, rates: dict[str, float], observation_shape: tuple[int, ...]
) -> tuple[list[_Synapse], dict[str, int]]:
    """The synapses in order, and the number of neurons of each LIF layer, by one pass of a silent observation."""
    synapses: list[_Synapse] = []
    neurons: dict[str, int] = {}
    rate: dict[fx.Node, float | None] = {}

    class Walk(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
            incoming = [rate[source] for source in n.all_input_nodes]
            if isinstance(module, LIF):
                x = self.env[n.args[0]]  # type: ignore[index]
                neurons[str(n.target)] = math.prod(x.shape[1:])
                rate[n] = rates[str(n.target)]
                return x
            # a sum carries the spikes of both branches; where one is analogue, so is the sum
            rate[n] = None if not incoming or None in incoming else sum(r for r in incoming if r is not None)
            if str(n.target) in network.spike_pools:
                rate[n] = rates[str(n.target)]
            out: Any = super().run_node(n) if n.op != "output" else None
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                fan_in = module.weight[0].numel()
                weights = module.weight.numel()
                density = int(module.weight.count_nonzero()) / weights
                synapses.append(_Synapse(fan_in * math.prod(out.shape[1:]), weights, density, rate[n]))
            return out

    parameter = next(network.parameters())
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            observation = torch.zeros(1, *observation_shape, device=parameter.device, dtype=parameter.dtype)
            # FrameDropout looks for a step axis; in evaluation mode it is the identity, so that a bare batch passes
            Walk(network.graph).run(observation)
    finally:
        network.train(training)
    return synapses, neurons
