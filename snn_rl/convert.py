"""ANN to SNN: each ReLU of a trained network becomes a LIF layer, on the module graph.

Conversion follows DIET-SNN and temporal pruning: fuse batch-norm, then set each threshold to a percentile of that
ReLU's input over calibration data. A spike of a layer with threshold ``v`` stands for an activation of ``v``
(Diehl et al. 2015), which is folded into the weights behind it; with ``rescale`` each layer's current is divided by
its threshold as well, so that every threshold starts at 1: the same spikes, better conditioned for training.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from snn_rl.network import FrameDropout, Gain, SpikingNetwork
from snn_rl.neuron import LIF
from snn_rl.scan import MIN_THRESHOLD

DEFAULT_LEAK = 0.9
DEFAULT_PERCENTILE = 90.0

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SYNAPSES = (nn.Linear, *CONVOLUTIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
POOLINGS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
POOLING_FUNCTIONS = (
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)
RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
ADDITIONS = (operator.add, operator.iadd, torch.add)
MAX_CALIBRATION_VALUES = 2**21  # kept per layer, of all batches; more are sampled without bias

WAY_OUT = {
    "MaxPool": "use average pooling or a stride in its place",
    "max_pool": "use average pooling or a stride in its place",
    "BatchNorm": "place it right behind a Linear or Conv layer whose output goes nowhere else",
    "GELU": "train the ANN with ReLU",
    "LSTM": "the membranes are the memory: leave it out",
    "cat": "add the branches instead",
}
DEFAULT_WAY_OUT = (
    "use Linear, Conv, BatchNorm, average pooling, Flatten, Dropout, ReLU and additions, or keep it outside the network"
)


def to_spiking(
    ann: nn.Module,
    calibration: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    percentile: float = DEFAULT_PERCENTILE,
    timesteps: int = 5,
    *,
    leak: float = DEFAULT_LEAK,
    rescale: bool = True,
    leak_reset: bool = False,
) -> SpikingNetwork:
    """Convert a trained ReLU network; returns a new network and leaves ``ann`` as it was.

    Args:
        ann: any network that torch.fx can trace, of Linear, Conv, BatchNorm, average pooling, Flatten, Dropout, ReLU
            (module, function or method) and additions, with one input and one output.
        calibration: inputs of shape (samples, ...) as the ANN takes them, or an iterable of such batches.
        percentile: the threshold of a layer is this percentile, in (0, 100], of its ReLU's input.
        timesteps: T, the micro-steps per frame.
        leak: initial leak of every LIF layer.
        rescale: divide each layer's weights by its threshold, so that thresholds are 1; False keeps the percentiles.
        leak_reset: DIET-SNN's reset, see `LIF`.

    Where a percentile is not positive (a ReLU whose input mostly is not), it is taken over the positive inputs alone,
    and is 1 where there are none.

    Raises:
        ValueError: a node that cannot be converted, by name and with the way out; calibration data that is empty, not
            finite or does not fit the network; percentile, timesteps or leak out of range.
    """
    if not (0.0 < percentile <= 100.0):
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    graph, lif_nodes = _prepare(ann, leak=leak, leak_reset=leak_reset)
    # A bad T is refused before the calibration data, which may be long, is run.
    check = SpikingNetwork(graph, timesteps).timesteps
    thresholds = _calibrate(graph, lif_nodes, calibration, percentile)
    _scale(graph, thresholds, rescale=rescale)
    return SpikingNetwork(graph, check).train(ann.training)


def spiking_architecture(
    ann: nn.Module, timesteps: int, *, leak: float = DEFAULT_LEAK, leak_reset: bool = False
) -> SpikingNetwork:
    """The network that `to_spiking` would return, before calibration: every threshold is 1, weights are the ANN's.

    What a policy is built from before weights are trained or loaded. Raises ValueError as `to_spiking` does.
    """
    graph, lif_nodes = _prepare(ann, leak=leak, leak_reset=leak_reset)
    _scale(graph, dict.fromkeys(lif_nodes, 1.0), rescale=True)
    return SpikingNetwork(graph, timesteps).train(ann.training)


# --- the graph ----------------------------------------------------------------------------------------------------


def _prepare(ann: nn.Module, *, leak: float, leak_reset: bool) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Trace a copy of ``ann``, bring every node to one spelling, fuse batch-norm, put LIF layers for ReLUs."""
    try:
        graph = fx.symbolic_trace(copy.deepcopy(ann).eval())
    except Exception as error:  # tracing runs the user's own forward: whatever it raises, the reason is the same
        raise ValueError(
            f"cannot trace {type(ann).__name__}: {_first_line(error)}; "
            "its forward must not branch on values or shapes of its input"
        ) from error
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise ValueError(f"the network must have exactly one input, got {[node.name for node in placeholders]}")
    _refuse_overwritten(graph)
    graph.graph.eliminate_dead_code()
    _fuse_batch_norm(graph)
    # Found before any is replaced: one ReLU module may serve several nodes, each of which gets its own LIF layer.
    lif_nodes = [node for node in graph.graph.nodes if _is_relu(graph, node)]
    seen: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if node in lif_nodes:
            name = _free_name(graph, node)
            graph.add_submodule(name, LIF(leak=leak, leak_reset=leak_reset))
            _call_module(node, name, node.all_input_nodes[0])
        else:
            _normalise(graph, node, seen)
    if not lif_nodes:
        raise ValueError("the network has no ReLU, so there is nothing to convert to LIF layers")
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph, lif_nodes


def _refuse_overwritten(graph: fx.GraphModule) -> None:
    """Refuse an operation in place whose operand is read again: what conversion puts for it is not in place."""
    memory: dict[fx.Node, fx.Node] = {}  # of each node: the node whose memory it may share
    overwritten: dict[fx.Node, tuple[fx.Node, set[fx.Node]]] = {}  # memory -> the operation, and all that it made stale
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            by, stale = overwritten.get(memory[source], (None, set()))
            if by is not None and source in stale:
                raise ValueError(
                    f"cannot convert node {by.name!r}: it changes {source.name!r} in place, which node {node.name!r} "
                    "reads afterwards; use the operation that returns a new tensor"
                )
        memory[node] = memory[node.args[0]] if _may_share_memory(graph, node) else node
        if _is_in_place(graph, node):
            root = memory[node]
            overwritten[root] = (node, {other for other, of in memory.items() if of is root and other is not node})


def _is_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_named_so = name == "iadd" or (name.endswith("_") and not name.endswith("__"))
    return node.op in ("call_function", "call_method") and (is_named_so or bool(node.kwargs.get("inplace", False)))


def _may_share_memory(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the output may be the first operand's memory: changed in place, viewed, or handed through."""
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if _is_in_place(graph, node):
        return True
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), (nn.Flatten, nn.Identity, *DROPOUTS))
    return node.target in ("view", "reshape", "flatten", "contiguous", torch.flatten, torch.reshape, F.dropout)


def _fuse_batch_norm(graph: fx.GraphModule) -> None:
    modules = dict(graph.named_modules())
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.graph.nodes):
        if not (node.op == "call_module" and isinstance(modules[node.target], BATCH_NORMS)):
            continue
        source = node.args[0]
        norm = modules[node.target]
        if source.op != "call_module" or len(source.users) > 1 or calls[source.target] > 1 or calls[node.target] > 1:
            raise _refusal(graph, node)
        if norm.running_mean is None:
            raise ValueError(
                f"cannot convert node {node.name!r}: batch-norm without running statistics cannot be fused; "
                "build it with track_running_stats=True"
            )
        synapse = modules[source.target]
        if isinstance(synapse, CONVOLUTIONS):
            fused: nn.Module = fuse_conv_bn_eval(synapse, norm)
        elif isinstance(synapse, nn.Linear):
            fused = fuse_linear_bn_eval(synapse, norm)
        else:
            raise _refusal(graph, node)
        graph.set_submodule(source.target, fused)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


def _normalise(graph: fx.GraphModule, node: fx.Node, seen: dict[str, str]) -> None:
    """Leave a node that time can be folded into as it is, bring its other spellings to that, refuse the rest."""
    if node.op in ("placeholder", "output") or _is_batch_size(node):
        if node.op == "output" and not isinstance(node.args[0], fx.Node):
            raise ValueError("the network must return one tensor, not a tuple or dict; convert the part that does")
        return None
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None:
        raise _refusal(graph, node)
    others = [arg for arg in node.all_input_nodes if arg is not source]
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, SYNAPSES):
            if seen.setdefault(str(node.target), node.name) != node.name:
                raise ValueError(
                    f"cannot convert node {node.name!r}: layer {node.target!r} is used twice; "
                    "give each use its own layer"
                )
            return None
        if isinstance(module, POOLINGS) or (isinstance(module, nn.Flatten) and _keeps_batch(module.start_dim)):
            return None
        if isinstance(module, DROPOUTS):
            if not isinstance(module, nn.Dropout):
                raise ValueError(f"cannot convert node {node.name!r} ({type(module).__name__}): use nn.Dropout")
            name = f"{node.name}_frame"
            graph.add_submodule(name, FrameDropout(module.p))
            return _call_module(node, name, source)
        if isinstance(module, nn.Identity):
            return _drop(node, source)
        raise _refusal(graph, node)
    name = str(node.target) if node.op == "call_method" else ""
    if name in ("contiguous", "clone"):
        return _drop(node, source)
    if node.target in ADDITIONS or name in ("add", "add_", "__add__"):
        terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if len(terms) != 2 or len(node.args) != 2 or node.kwargs:
            raise ValueError(
                f"cannot convert node {node.name!r}: only the sum of two signals can be; fold constants into a bias"
            )
        return _call_function(node, operator.add, *terms)
    if node.target is F.dropout or node.target is torch.dropout:
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        # traced in evaluation mode: `training=self.training` reads False here, a literal True was meant as such
        if training is True:
            raise ValueError(
                f"cannot convert node {node.name!r}: dropout that is always on; pass training=self.training"
            )
        graph.add_submodule(f"{node.name}_frame", FrameDropout(float(p)))  # type: ignore[arg-type]
        return _call_module(node, f"{node.name}_frame", source)
    if node.target in POOLING_FUNCTIONS:
        return None
    if node.target is torch.flatten or name == "flatten":
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        if _keeps_batch(start):
            args = (start, *node.args[2:]) if len(node.args) > 1 else ()
            return _call_function(node, torch.flatten, source, *args, **node.kwargs)
    if name in ("view", "reshape") or node.target is torch.reshape:
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
        # (batch, -1) and (-1, features): a flatten in disguise. The calibration run checks that the batch survives.
        if len(sizes) == 2 and (sizes[1] == -1 or sizes[0] == -1) and all(_is_batch_size(n) for n in others):
            return _call_function(node, torch.flatten, source, 1)
    if name == "mean" or node.target is torch.mean:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else dims
        if isinstance(dims, tuple | list) and all(isinstance(d, int) and _keeps_batch(d) for d in dims):
            keepdim = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
            return _call_function(node, torch.mean, source, tuple(dims), keepdim)
    raise _refusal(graph, node)


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_function":
        return node.target in RELU_FUNCTIONS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _is_batch_size(node: fx.Node) -> bool:
    """``x.size(0)``, ``x.shape[0]`` and the ``x.shape`` in it: integers that only a reshape may use."""
    if node.op == "call_method" and node.target == "size":
        return tuple(node.args[1:]) in ((0,), ())
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    is_first = bool(node.target is operator.getitem and node.args[1] == 0)
    return is_first and all(map(_is_batch_size, node.all_input_nodes))


def _keeps_batch(dim: object) -> bool:
    # negative dimensions cannot be told from the batch without the rank, but -1 never is the batch of a flat input
    return isinstance(dim, int) and dim != 0


def _free_name(graph: fx.GraphModule, node: fx.Node) -> str:
    """The node's own name for its LIF layer, unless the network uses it for something else than that ReLU."""
    name = node.name
    while hasattr(graph, name) and type(getattr(graph, name)) is not nn.ReLU:
        name += "_lif"
    return name


def _call_module(node: fx.Node, name: str, source: fx.Node) -> None:
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def _call_function(node: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, kwargs


def _drop(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _refusal(graph: fx.GraphModule, node: fx.Node) -> ValueError:
    what = type(graph.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""
    what = what or getattr(node.target, "__name__", str(node.target))
    way_out = next((hint for key, hint in WAY_OUT.items() if key in what), DEFAULT_WAY_OUT)
    return ValueError(f"cannot convert node {node.name!r} ({what}): {way_out}")


# --- calibration --------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Run the graph as the ANN it was, keeping a sample of what enters each ReLU."""

    def __init__(self, graph: fx.GraphModule, lif_nodes: list[fx.Node]) -> None:
        super().__init__(graph)
        self.samples: dict[fx.Node, list[np.ndarray]] = {node: [] for node in lif_nodes}
        self.fraction = dict.fromkeys(lif_nodes, 1.0)  # of all values, that are kept
        self.batch = 0
        self.generator = np.random.default_rng(0)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.samples:
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
    graph: fx.GraphModule,
    lif_nodes: list[fx.Node],
    calibration: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    percentile: float,
) -> dict[fx.Node, float]:
    recorder = _Recorder(graph, lif_nodes)
    parameter = next(graph.parameters())
    batches = [calibration] if isinstance(calibration, np.ndarray | Tensor) else calibration
    for index, batch in enumerate(batches):
        x = torch.as_tensor(batch)
        if x.dim() < 1 or x.numel() == 0:
            raise ValueError(f"calibration batch {index} must be (samples >= 1, ...), got shape {tuple(x.shape)}")
        x = x.to(device=parameter.device, dtype=parameter.dtype)
        if not torch.isfinite(x).all():
            raise ValueError(f"calibration batch {index} must be finite, got NaN or infinity; clean the data")
        recorder.batch = x.shape[0]
        try:
            with torch.no_grad():
                recorder.run(x)
        except RuntimeError as error:
            raise ValueError(
                f"calibration batch {index} of shape {tuple(x.shape)} does not fit the network: {_first_line(error)}"
            ) from error
    if not recorder.samples[lif_nodes[0]]:
        raise ValueError("calibration must hold at least one batch, got none; an iterator can be used only once")
    return {node: _threshold(np.concatenate(values), percentile, node) for node, values in recorder.samples.items()}


def _threshold(inputs: np.ndarray, percentile: float, node: fx.Node) -> float:
    if not np.isfinite(inputs).all():
        raise ValueError(f"node {node.name!r} gets NaN or infinity on the calibration data: check the ANN's weights")
    threshold = float(np.percentile(inputs, percentile))
    if threshold < MIN_THRESHOLD:
        positive = inputs[inputs > MIN_THRESHOLD]
        threshold = float(np.percentile(positive, percentile)) if positive.size else 1.0
    return threshold


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- scales -------------------------------------------------------------------------------------------------------

UNIT = "unit"  # the scale of the input and of the output: 1 stands for 1


def _scale(graph: fx.GraphModule, thresholds: dict[fx.Node, float], *, rescale: bool) -> None:
    """Fold the meaning of a spike, and with ``rescale`` every threshold, into weights; add gains where there are none.

    Each signal has a scale: the ANN's value that a 1 on it stands for. A LIF layer with threshold v emits on scale v.
    A synapse can turn any scale into any other through its weights; a sum needs one scale on both sides, so a branch
    without weights (an identity shortcut) gets a `Gain`. Scales are named by LIF layer, not by their value, so that
    where gains stand depends on the architecture alone.
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
        name = f"gain_{source.name}_{node.name}"
        graph.add_submodule(name, Gain(scale_of[scale[source]] / scale_of[target]))
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
        elif node.op == "output":
            bring(node, node.args[0], UNIT)
        else:  # pooling, flatten, dropout: linear without weights
            scale[node] = scale[node.all_input_nodes[0]]
    parameter = next(graph.parameters())
    graph.to(device=parameter.device, dtype=parameter.dtype)
    graph.recompile()


def _is_synapse(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), SYNAPSES)
