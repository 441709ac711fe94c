"""New weights for a network that has to remember, where no ANN's weights fit it: a start for distillation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snn_rl.core.layers import SYNAPSES
from snn_rl.core.network import NetworkGraph, SpikingNetwork
from snn_rl.core.neuron import LIF

MAX_GAIN = 30.0
MAX_PATCHES = 2**17  # of images; more are sampled
# Of a current, in thresholds: at 1 and above, half of all neurons fire at random, and distillation begins by silencing
# them; far below, layers behind layers are silent and learn nothing.
DEVIATION = 0.5


def spread_first_synapse(network: SpikingNetwork, samples: Tensor, max_gain: float = MAX_GAIN) -> None:
    """Redraw the first synapse so that its neurons can remember.

    Neuron i gets ``w_i . (x - x_i) + v / 2`` as its current, with a random direction ``w_i`` in units of the samples'
    standard deviation, a random sample ``x_i`` and a gain between 1 and ``max_gain``, log-uniform. Where currents stay
    below the threshold ``v``, as conversion makes them, the soft reset cancels a membrane's past as fast as it fires
    (the rate follows the input at once). Where they exceed it many times over, a neuron is silent or fires at every
    step, and which of the two is decided by its input averaged over 1 / (1 - leak) steps. Both kinds side by side let
    the next layer tell now from before.

    Of a Conv2d the samples are the patches that its kernel sees, and the unit is their deviation where they show
    anything: what moves leaves a trail of spikes.

    Draws from torch's global generator. Raises ValueError where the samples hold NaN or infinity, or where the first
    synapse is neither a Linear layer nor a Conv2d of one group that pads with zeros, or has no bias.
    """
    if not torch.isfinite(samples).all():  # every weight would be NaN
        raise ValueError("the samples hold NaN or infinity: repair the environment")
    first = next((module for module in network.modules() if isinstance(module, SYNAPSES)), None)
    bias = None if first is None else first.bias
    if isinstance(first, nn.Linear) and bias is not None:
        x = samples.flatten(1)
        deviation, length = x.std(0, correction=0), 1.0
    elif isinstance(first, nn.Conv2d) and bias is not None and _unfolds(first):
        x = _patches(first, samples)
        shown = x[x.amax(1) > x.amin(1)]
        deviation = shown.std(0, correction=0) if len(shown) else torch.zeros_like(x[0])
        length = 1 / math.sqrt(x.shape[1])  # neighbouring pixels go together, entries of other observations do not
    else:
        raise ValueError(
            f"only a Linear or Conv2d first layer (of one group, padded by numbers, with zeros), with a bias, can be "
            f"spread, got {first}; "
            "train the ANN on the frames that the spiking agent sees"
        )
    neurons = first.weight.shape[0]
    gain = torch.rand(neurons, 1, device=x.device).mul(math.log(max_gain)).exp()
    threshold = next(iter(network.lif_layers.values())).threshold
    deviation[deviation < 1e-6] = 1.0  # an entry that never varies says nothing: any unit does
    with torch.no_grad():
        weight = torch.randn(neurons, x.shape[1], device=x.device) * gain * length / deviation
        at = x[torch.randint(len(x), (neurons,), device=x.device)]
        first.weight.copy_(weight.view_as(first.weight))
        bias.copy_(threshold / 2 - (weight * at).sum(1))


def _unfolds(convolution: nn.Conv2d) -> bool:
    zeros = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return convolution.groups == 1 and zeros


def _patches(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """What the kernel sees of ``images`` (batch, channels, height, width): (patches, entries of the kernel)."""
    assert not isinstance(convolution.padding, str)
    x = F.unfold(
        images,
        convolution.kernel_size,
        convolution.dilation,
        convolution.padding,
        convolution.stride,
    )  # (batch, entries, positions)
    x = x.transpose(1, 2).flatten(0, 1)
    return x if len(x) <= MAX_PATCHES else x[torch.randint(len(x), (MAX_PATCHES,), device=x.device)]


def scale_currents(network: SpikingNetwork, samples: Tensor) -> None:
    """Scale the synapses between LIF layers, one after another, so that each current deviates by half its threshold.

    As layer-sequential unit variance (Mishkin and Matas 2016), on a frame of ``samples`` (batch, ...) from silence.
    PyTorch's own initial weights are smaller: behind two layers of spikes a third would be silent, and learn nothing.
    A current that does not vary is left as it is. What reaches a LIF layer past the synapses, on a shortcut of a
    residual block, is not scaled.
    """
    graph = network.graph
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    current: list[Tensor] = []
    for name, lif in list(network.lif_layers.items())[1:]:
        with torch.no_grad(), lif.register_forward_pre_hook(lambda _, args: current.append(args[0])):
            network(samples, with_state=False)
        deviation = current.pop().std(correction=0)
        if deviation > 1e-6:
            for synapse in _synapses_before(graph, nodes[name]):
                for parameter in synapse.parameters():
                    with torch.no_grad():
                        parameter.mul_(DEVIATION * lif.threshold / deviation)


def _synapses_before(graph: NetworkGraph, node: fx.Node) -> set[nn.Module]:
    """The last synapses on the ways that lead to ``node``."""
    found: set[nn.Module] = set()
    for source in node.all_input_nodes:
        module = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
        if isinstance(module, LIF):
            continue
        found |= {module} if isinstance(module, SYNAPSES) else _synapses_before(graph, source)
    return found
