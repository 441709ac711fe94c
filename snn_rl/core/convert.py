"""ANN to SNN: each ReLU of a trained network becomes a LIF layer, on the module graph.

Conversion follows DIET-SNN and temporal pruning: fuse batch-norm, then set each threshold to a percentile of that
ReLU's input over calibration data. A spike of a layer with threshold ``v`` stands for an activation of ``v``
(Diehl et al. 2015), which is folded into the weights behind it; with ``rescale`` each layer's current is divided by
its threshold as well, so that every threshold starts at 1: the same spikes, better conditioned for training.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, Dataset

from snn_rl.core.graph import FLAT_NORM, NORM, prepare, unused_name
from snn_rl.core.layers import SYNAPSES
from snn_rl.core.network import Gain, NetworkGraph, SpikingNetwork, check_timesteps
from snn_rl.core.plain import evaluation_copy, first_line
from snn_rl.core.scan import MIN_THRESHOLD

DEFAULT_LEAK = 0.9
DEFAULT_PERCENTILE = 90.0

MAX_CALIBRATION_VALUES = 2**21  # kept per layer, of all batches; more are sampled without bias
CHECKED = 64  # samples on which the traced network is compared with the ANN

Calibration = np.ndarray | Tensor | Iterable[np.ndarray | Tensor]


def to_spiking(
    ann: nn.Module,
    calibration: Calibration,
    percentile: float = DEFAULT_PERCENTILE,
    timesteps: int = 5,
    *,
    leak: float = DEFAULT_LEAK,
    rescale: bool = True,
    leak_reset: bool = False,
) -> SpikingNetwork:
    """Convert a trained ReLU network; returns a new network and leaves ``ann`` as it was.

    Args:
        ann: any network that torch.fx can trace, of Linear, Conv, BatchNorm, pooling, Flatten, Dropout, ReLU (module,
            function or method), additions, slices and concatenations of features, with one input and one output. It is
            converted as it computes in evaluation mode. Weights that are computed at each call (weight norm, spectral
            norm, other parametrizations, pruning masks) are stored as they are now; shared parameters become separate
            ones.
        calibration: inputs of shape (samples, ...) as the ANN takes them, or an iterable of such batches. A
            ``DataLoader`` may yield tuples: the first entry is the input.
        percentile: the threshold of a layer is this percentile, in (0, 100], of its ReLU's input.
        timesteps: T, the micro-steps per frame.
        leak: initial leak of every LIF layer.
        rescale: divide each layer's weights by its threshold, so that thresholds are 1; False keeps the percentiles.
        leak_reset: DIET-SNN's reset, see `LIF`.

    Where a percentile is not positive (a ReLU whose input mostly is not), it is taken over the positive inputs alone,
    and is 1 where there are none.

    Max pooling converts where it stands right behind a ReLU or right in front of one. The maximum of spikes is a
    logical OR at each micro-step. At T = 1 that is exactly the maximum of the neurons' outputs. At T > 1 the neurons
    may fire at different micro-steps, so the pooled rate lies between the maximum of their rates and the sum.

    Raises:
        ValueError: a node that cannot be converted, by name and with the way out; a network that computes something
            else on the calibration data than its traced graph does; calibration data that is empty, not finite or does
            not fit the network; percentile, timesteps or leak out of range.
    """
    if not (0.0 < percentile <= 100.0):
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    check_timesteps(timesteps)  # before the calibration data, which may be long, is run
    graph, lif_nodes = prepare(ann, leak=leak, leak_reset=leak_reset)
    thresholds = _calibrate(ann, graph, lif_nodes, calibration, percentile)
    _scale(graph, thresholds, rescale=rescale)
    return SpikingNetwork(graph, timesteps).train(ann.training)


def spiking_architecture(
    ann: nn.Module, timesteps: int, *, leak: float = DEFAULT_LEAK, leak_reset: bool = False
) -> SpikingNetwork:
    """The network that `to_spiking` would return, before calibration: every threshold is 1, weights are the ANN's.

    What a policy is built from before weights are trained or loaded. Raises ValueError as `to_spiking` does.
    """
    graph, lif_nodes = prepare(ann, leak=leak, leak_reset=leak_reset)
    _scale(graph, dict.fromkeys(lif_nodes, 1.0), rescale=True)
    return SpikingNetwork(graph, timesteps).train(ann.training)


# --- calibration --------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Run the graph as the ANN that it was, keeping a sample of what enters each ReLU."""

    def __init__(self, graph: NetworkGraph, lif_nodes: list[fx.Node]) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # errors are one line
        self.samples: dict[fx.Node, list[np.ndarray]] = {node: [] for node in lif_nodes}
        self.fraction = dict.fromkeys(lif_nodes, 1.0)  # of all values, that are kept
        self.batch = 0
        self.generator = np.random.default_rng(0)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.samples:
            if NORM in n.meta and self.env[n.args[0]].dim() != 2:  # type: ignore[index]
                raise ValueError(f"cannot convert node {n.meta[NORM]!r}: {FLAT_NORM}")
            out = super().run_node(n)
            if isinstance(out, Tensor) and (out.dim() < 1 or out.shape[0] != self.batch):
                raise ValueError(
                    f"cannot convert node {n.name!r}: it turns a batch of {self.batch} into shape {tuple(out.shape)}; "
                    "keep the batch as the first dimension"
                )
            return out
        x = self.env[n.args[0]]  # type: ignore[index]
        self._keep(n, x.detach().flatten().float().cpu().numpy())
        return torch.relu(x)

    def _keep(self, node: fx.Node, values: np.ndarray) -> None:
        """Add to a layer's sample, in which every value of every batch is with the same probability."""
        if self.fraction[node] < 1:
            values = values[self.generator.random(values.size) < self.fraction[node]]
        kept = self.samples[node]
        kept.append(values)
        while sum(v.size for v in kept) > MAX_CALIBRATION_VALUES:
            kept[:] = [v[self.generator.random(v.size) < 0.5] for v in kept]
            self.fraction[node] /= 2


def _calibrate(
    ann: nn.Module, graph: NetworkGraph, lif_nodes: list[fx.Node], calibration: Calibration, percentile: float
) -> dict[fx.Node, float]:
    recorder = _Recorder(graph, lif_nodes)
    parameter = next(graph.parameters())
    first: tuple[Tensor, Tensor] | None = None  # inputs, and what the traced network makes of them
    for index, batch in enumerate(_batches(calibration)):
        try:
            x = torch.as_tensor(batch)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"calibration batch {index} must be an array or a tensor, got {type(batch).__name__}; "
                "pass the inputs alone, such as (x for x, _ in loader)"
            ) from error
        if x.dim() < 1 or x.numel() == 0:
            raise ValueError(f"calibration batch {index} must be (samples >= 1, ...), got shape {tuple(x.shape)}")
        x = x.to(device=parameter.device, dtype=parameter.dtype)
        if not torch.isfinite(x).all():
            raise ValueError(f"calibration batch {index} must be finite, got NaN or infinity; clean the data")
        recorder.batch = x.shape[0]
        try:
            with torch.no_grad():
                out = recorder.run(x)
        except RuntimeError as error:
            raise ValueError(
                f"calibration batch {index} of shape {tuple(x.shape)} does not fit the network: {first_line(error)}"
            ) from error
        first = first or (x[:CHECKED].clone(), out[:CHECKED])
    if first is None:
        raise ValueError("calibration must hold at least one batch, got none; an iterator can be used only once")
    thresholds = {n: _threshold(np.concatenate(values), percentile, n) for n, values in recorder.samples.items()}
    _check_traced(ann, *first)
    return thresholds


def _batches(calibration: Calibration) -> Iterator[Any]:
    if isinstance(calibration, np.ndarray | Tensor):
        yield calibration
        return
    if isinstance(calibration, Dataset) or not isinstance(calibration, Iterable):
        raise ValueError(
            "calibration must be an array, a tensor, a DataLoader or an iterable of batches, got "
            f"{type(calibration).__name__}"
        )
    for batch in calibration:
        is_pair = isinstance(calibration, DataLoader) and isinstance(batch, tuple | list) and len(batch) > 0
        yield batch[0] if is_pair else batch


def _check_traced(ann: nn.Module, x: Tensor, traced: Tensor) -> None:
    """Refuse a network whose own forward computes something else than its traced graph: what tracing did not see."""
    with torch.no_grad():
        expected = evaluation_copy(ann)(x)
    # Folding batch-norm rounds. What tracing misses is seen in how outputs differ, whatever they have in common.
    eps, largest = torch.finfo(expected.dtype).eps, expected.abs().max().item()
    rounding, spread = 8 * eps * largest, (expected - expected.mean(0)).abs().max().item()
    tolerance = rounding + max(1e-3, 8 * eps) * (spread if spread > rounding else largest)
    error = (traced - expected).abs().max().item()
    if not error <= tolerance:
        raise ValueError(
            f"the traced network's output differs from that of {type(ann).__name__} by {error:.3g} on the calibration "
            "data: its forward uses random numbers, memory of earlier calls or weights that tracing does not see; "
            "convert the part that has none of these"
        )


def _threshold(inputs: np.ndarray, percentile: float, node: fx.Node) -> float:
    if not np.isfinite(inputs).all():
        raise ValueError(f"node {node.name!r} gets NaN or infinity on the calibration data: check the ANN's weights")
    threshold = float(np.percentile(inputs, percentile))
    if threshold < MIN_THRESHOLD:
        positive = inputs[inputs > MIN_THRESHOLD]
        threshold = float(np.percentile(positive, percentile)) if positive.size else 1.0
    return threshold


# --- scales -------------------------------------------------------------------------------------------------------

UNIT = "unit"  # the scale of the input and of the output: 1 stands for 1


def _scale(graph: NetworkGraph, thresholds: dict[fx.Node, float], *, rescale: bool) -> None:
    """Fold the meaning of a spike, and with ``rescale`` every threshold, into weights; add gains where there are none.

    Each signal has a scale: the ANN's value that a 1 on it stands for. A LIF layer with threshold v emits on scale v.
    A synapse can turn any scale into any other through its weights; a sum needs one scale on both sides, so a branch
    without weights (an identity shortcut) gets a `Gain`. So does a concatenation, which takes the scale of its first
    spikes where no LIF layer behind it asks for another: they stay what they are. Scales are named by LIF layer, not by
    their value, so that where gains stand depends on the architecture alone.
    """
    scale_of: dict[fx.Node | str, float] = {UNIT: 1.0}
    for lif_node, threshold in thresholds.items():
        scale_of[lif_node] = threshold
    scale: dict[fx.Node, fx.Node | str] = {}  # of a node's output, by name

    def wanted(node: fx.Node) -> fx.Node | str:
        """The scale on which a synapse or sum should deliver: that of the next LIF layer, if it reaches one."""
        for user in node.users:
            if user in thresholds:
                return user if rescale else UNIT
        for user in node.users:
            if user.op != "output" and not _is_synapse(graph, user):
                found = wanted(user)
                if found != UNIT:
                    return found
        return UNIT

    def bring(node: fx.Node, source: fx.Node, target: fx.Node | str) -> None:
        """Make ``source`` arrive at ``node`` on the scale ``target``."""
        if scale[source] == target:
            return
        name = unused_name(graph, f"gain_{source.name}_{node.name}")
        graph.add_module(name, Gain(scale_of[scale[source]] / scale_of[target]))
        with graph.graph.inserting_before(node):
            gain = graph.graph.call_module(name, (source,))
        scale[gain] = target
        node.replace_input_with(source, gain)

    for node in list(graph.graph.nodes):
        if node.op == "placeholder":
            scale[node] = UNIT
        elif node in thresholds:
            bring(node, node.args[0], node if rescale else UNIT)
            lif: Any = graph.get_submodule(str(node.target))
            with torch.no_grad():
                lif.raw_threshold.fill_(1.0 if rescale else thresholds[node])
            scale[node] = node
        elif _is_synapse(graph, node):
            scale[node] = wanted(node)
            synapse: Any = graph.get_submodule(str(node.target))
            with torch.no_grad():
                synapse.weight.mul_(scale_of[scale[node.args[0]]] / scale_of[scale[node]])
                if synapse.bias is not None:
                    synapse.bias.div_(scale_of[scale[node]])
        elif node.target is operator.add:
            scale[node] = wanted(node)
            for source in dict.fromkeys(node.all_input_nodes):
                bring(node, source, scale[node])
        elif node.target is torch.cat:
            sources = dict.fromkeys(node.all_input_nodes)
            spikes = (scale[source] for source in sources if scale[source] != UNIT)
            scale[node] = target if (target := wanted(node)) != UNIT else next(spikes, UNIT)
            for source in sources:
                bring(node, source, scale[node])
        elif node.op == "output":
            bring(node, node.args[0], UNIT)
        else:  # pooling, flatten, slices, dropout: linear without weights
            scale[node] = scale[node.all_input_nodes[0]]
    parameter = next(graph.parameters())
    graph.to(device=parameter.device, dtype=parameter.dtype)


def _is_synapse(graph: NetworkGraph, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), SYNAPSES)
