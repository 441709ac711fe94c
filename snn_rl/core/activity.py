"""What a spiking network does and costs: spike rates, operations, energy, memory accesses.

Energy model of the temporal-pruning paper, 45 nm CMOS (Horowitz 2014): a multiply-accumulate costs 4.6 pJ, an
addition 0.9 pJ,

    E_ann / E_snn = sum_q(ops_q * 4.6) / (ops_1 * 4.6 + sum_{q>=2}(rate_{q-1} * ops_q * 0.9))

with ``ops_q`` the dense operations of synapse q and ``rate_{q-1}`` the spikes per neuron and inference (summed over
the T micro-steps) that enter it. With direct encoding the first synapse is dense in both. Where spikes and analogue
values enter one synapse, side by side or as a sum, it is linear: the analogue ones are multiplied once per inference,
and an addition follows each spike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from snn_rl.core.graph import reshaped
from snn_rl.core.layers import SYNAPSES
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
    ``ann_ops`` are multiply-accumulates; ``snn_ops`` counts the multiply-accumulates of analogue values (those of the
    first synapse) and one addition per spike and synapse.
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

    Memory accesses: a synapse reads a weight that spikes reach once per micro-step, and others once per frame: those of
    analogue values alone, as in the first synapse, and the ANN's.

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
    dense = sum(s.ops * share * s.analogue for s, share in zip(synapses, kept, strict=True))
    additions = sum(s.ops * share * s.rate for s, share in zip(synapses, kept, strict=True))
    energy_snn = dense * PJ_PER_MAC + additions * PJ_PER_ADDITION
    reads = [s.weights * share * (1 + (steps - 1) * s.spiking) for s, share in zip(synapses, kept, strict=True)]
    weights = sum(reads)
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
    analogue: float  # share of its inputs that hold analogue values
    spiking: float  # share of its inputs that hold spikes
    rate: float  # of spikes, over all inputs


# Operations that only choose and arrange entries.
_ARRANGING = (operator.getitem, torch.cat, torch.flatten, torch.unflatten, reshaped, nn.Flatten, nn.Unflatten)


def _synapses(
    network: SpikingNetwork, rates: dict[str, float], observation_shape: tuple[int, ...]
) -> tuple[list[_Synapse], dict[str, int]]:
    """The synapses in order, and the number of neurons of each LIF layer, by one pass of a silent observation."""
    synapses: list[_Synapse] = []
    neurons: dict[str, int] = {}
    # Of each entry of a node's output, (3, ...): is it analogue, does it hold spikes, and at which rate.
    signals: dict[fx.Node, Tensor] = {}

    class Walk(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
            if isinstance(module, LIF):
                out: Any = self.env[n.args[0]]  # type: ignore[index]
                neurons[str(n.target)] = math.prod(out.shape[1:])
            else:
                out = super().run_node(n) if n.op != "output" else None
            if isinstance(module, SYNAPSES):
                shares = signals[n.all_input_nodes[0]].flatten(1).mean(1).tolist()
                fan_in, weights = module.weight[0].numel(), module.weight.numel()
                density = int(module.weight.count_nonzero()) / weights
                synapses.append(_Synapse(fan_in * math.prod(out.shape[1:]), weights, density, *shares))
            if n.op != "output":
                signals[n] = self.signal(n, module, out)
            return out

        def signal(self, n: fx.Node, module: nn.Module | None, out: Tensor) -> Tensor:
            incoming = [signals[source] for source in n.all_input_nodes]
            measured = rates.get(str(n.target)) if n.op == "call_module" else None
            if measured is not None:  # a LIF layer, or max pooling of spikes
                each = torch.tensor([0.0, 1.0, measured], dtype=torch.float64)
            elif n.target is operator.add:  # it carries what is on either side
                a, b = (signals[arg] for arg in n.args)  # type: ignore[index]
                return torch.cat([torch.maximum(a[:2], b[:2]), (a + b)[2:]])
            elif n.target in _ARRANGING or isinstance(module, nn.Flatten | nn.Unflatten):
                arguments = fx.node.map_arg((n.args, n.kwargs), signals.__getitem__)
                return (module or n.target)(*arguments[0], **arguments[1])  # type: ignore[operator]
            elif incoming:  # of each entry as of all
                each = incoming[0].flatten(1).mean(1)
                if isinstance(module, SYNAPSES):  # each output is a sum over inputs of both kinds
                    each[:2] = each[:2].ceil()
            else:
                each = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
            return each.view(3, *[1] * (out.dim() - 1)).expand(3, *out.shape[1:])

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
