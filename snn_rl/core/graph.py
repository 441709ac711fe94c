"""The module graph of an ANN, brought to the form that a spiking network runs: LIF layers in place of ReLUs.

Conversion works on the graph that torch.fx traces, not on a list of known architectures. What it does not know is
refused with the name of the node and the way out.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from snn_rl.core.layers import (
    AVERAGE_POOLING_FUNCTIONS,
    AVERAGE_POOLINGS,
    BATCH_NORMS,
    CONCATENATIONS,
    CONVOLUTIONS,
    DROPOUTS,
    KNOWN,
    MAX_POOLING_FUNCTIONS,
    MAX_POOLINGS,
    RELU_FUNCTIONS,
    SYNAPSES,
    is_kind,
    kind_of,
)
from snn_rl.core.network import FrameDropout, NetworkGraph, module_of, put_module
from snn_rl.core.neuron import LIF
from snn_rl.core.plain import first_line, plain_copy

ADDITIONS = (operator.add, operator.iadd, torch.add)
MAY_BE_VIEWS = (
    "view", "reshape", "flatten", "unflatten", "contiguous", "narrow", "split", torch.flatten, torch.reshape,
    torch.unflatten, torch.narrow, torch.split, operator.getitem, F.dropout,
)  # fmt: skip

MAX_POOLING = "place max pooling right behind a ReLU, or use average pooling or a stride"
HOLDS_WEIGHTS = "call an nn.Linear or nn.Conv module, which holds its weights"
SIZES = "sizes other than the batch's are not known here; for global pooling use nn.AdaptiveAvgPool2d(1)"
SPLIT = "split along a dimension of features, at places that are numbers, by slices or torch.split"
RESHAPE = "keep the batch as the first dimension, and give the others as numbers"
WAY_OUT = {
    "MaxPool": MAX_POOLING,
    "max_pool": MAX_POOLING,
    "BatchNorm": "place it right behind a Linear or Conv layer whose output goes nowhere else, or right before one "
    "without padding",
    "GELU": "train the ANN with ReLU",
    "LSTM": "the membranes are the memory: leave it out",
    "cat": "concatenate signals along a dimension of features, not along the batch",
    "getitem": "of each observation take slices and single entries by numbers, as in x[:, 2:5]; " + SIZES,
    "split": SPLIT,
    "chunk": SPLIT,
    "narrow": SPLIT,
    "view": RESHAPE,
    "reshape": RESHAPE,
    "unflatten": RESHAPE,
}
FLAT_NORM = "batch-norm next to a Linear layer needs inputs of shape (batch, features); flatten them first"
NORM = "batch-norm"  # in the `meta` of a Linear layer's node: the name of the batch-norm that was folded into it
DEFAULT_WAY_OUT = (
    "use Linear, Conv, BatchNorm, pooling, Flatten, Dropout, ReLU, additions, slices and concatenations, or keep it "
    "outside the network"
)


class _Tracer(fx.Tracer):
    """Makes one node of each layer that conversion knows. Other modules of a user are followed to their operations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def prepare(ann: nn.Module, *, leak: float, leak_reset: bool) -> tuple[NetworkGraph, list[fx.Node]]:
    """Trace a copy of ``ann``, bring every node to one spelling, fold batch-norm, replace ReLUs by LIF layers.

    Returns the graph and the nodes of its LIF layers. Raises ValueError as `snn_rl.to_spiking` does.
    """
    plain = plain_copy(ann)
    try:
        nodes = _Tracer().trace(plain)
    except Exception as error:  # tracing runs the user's own forward: whatever it raises, the reason is the same
        raise ValueError(
            f"cannot trace {type(ann).__name__}: {first_line(error)}; "
            "its forward must not branch on values or shapes of its input"
        ) from error
    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise ValueError(f"the network must have exactly one input, got {[node.name for node in placeholders]}")
    net = NetworkGraph(plain, nodes)
    _refuse_overwritten(net)
    nodes.eliminate_dead_code(_is_kept)
    _fuse_batch_norm(net)
    _pool_behind_relu(net)
    # Found before any is replaced: one ReLU module may serve several nodes, each of which gets its own LIF layer.
    lif_nodes = [node for node in nodes.nodes if _is_relu(net, node)]
    seen: dict[str, str] = {}
    for node in list(nodes.nodes):
        if node in lif_nodes:
            name = _free_name(net, node, nn.ReLU)
            net.add_module(name, LIF(leak=leak, leak_reset=leak_reset))
            _call_module(node, name, node.all_input_nodes[0])
        else:
            _normalise(net, node, seen)
    if not lif_nodes:
        raise ValueError("the network has no ReLU, so there is nothing to convert to LIF layers")
    _fold_batch_norm_forward(net)
    nodes.eliminate_dead_code(_is_kept)
    return NetworkGraph(net, nodes).eval(), lif_nodes  # this leaves out modules that no node calls any more


def _is_kept(node: fx.Node) -> bool:
    """Whether a node stays in the graph although no other node takes its output."""
    return node.op in ("placeholder", "output")


# --- operations in place ------------------------------------------------------------------------------------------


def _refuse_overwritten(net: NetworkGraph) -> None:
    """Refuse an operation in place whose operand is read again: what conversion puts for it is not in place."""
    memory: dict[fx.Node, fx.Node] = {}  # of each node: the node whose memory it may share
    overwritten: dict[fx.Node, tuple[fx.Node, set[fx.Node]]] = {}  # memory -> the operation, and all that it made stale
    for node in net.graph.nodes:
        for source in node.all_input_nodes:
            by, stale = overwritten.get(memory[source], (None, set()))
            if by is not None and source in stale:
                raise ValueError(
                    f"cannot convert node {by.name!r}: it changes {source.name!r} in place, which node {node.name!r} "
                    "reads afterwards; use the operation that returns a new tensor"
                )
        memory[node] = memory[node.args[0]] if _may_share_memory(net, node) else node
        if _is_in_place(net, node):
            root = memory[node]
            overwritten[root] = (node, {other for other, of in memory.items() if of is root and other is not node})


def _is_in_place(net: NetworkGraph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module_of(net, node), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_named_so = name == "iadd" or (name.endswith("_") and not name.endswith("__"))
    return node.op in ("call_function", "call_method") and (is_named_so or bool(node.kwargs.get("inplace", False)))


def _may_share_memory(net: NetworkGraph, node: fx.Node) -> bool:
    """Whether the output may be the first operand's memory: changed in place, viewed, or handed through."""
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if _is_in_place(net, node):
        return True
    if node.op == "call_module":
        return is_kind(module_of(net, node), (nn.Flatten, nn.Unflatten, nn.Identity, *DROPOUTS))
    return node.target in MAY_BE_VIEWS


# --- batch-norm and max pooling -----------------------------------------------------------------------------------


def _fuse_batch_norm(net: NetworkGraph) -> None:
    """Fold each batch-norm behind a synapse into it."""
    calls = Counter(node.target for node in net.graph.nodes if node.op == "call_module")
    for node in list(net.graph.nodes):
        norm: Any = module_of(net, node)
        if not is_kind(norm, BATCH_NORMS):
            continue
        if norm.running_mean is None:
            raise ValueError(
                f"cannot convert node {node.name!r}: batch-norm without running statistics cannot be fused; "
                "build it with track_running_stats=True"
            )
        source = node.args[0]
        synapse: Any = module_of(net, source)
        if calls[node.target] > 1:
            raise refusal(net, node)
        if not is_kind(synapse, SYNAPSES) or len(source.users) > 1 or calls[source.target] > 1:
            continue  # perhaps it stands before a synapse
        if is_kind(synapse, CONVOLUTIONS):
            fused: nn.Module = fuse_conv_bn_eval(synapse, norm)
        elif synapse.out_features != norm.num_features:
            raise ValueError(f"cannot convert node {node.name!r}: {FLAT_NORM}")
        else:
            fused = fuse_linear_bn_eval(synapse, norm)
            source.meta[NORM] = node.name
        put_module(net, str(source.target), fused)
        _drop(node, source)


def _fold_batch_norm_forward(net: NetworkGraph) -> None:
    """Fold each batch-norm that is left into the synapse behind it: ``W (a x + c) + b = (W a) x + (W c + b)``."""
    for node in list(net.graph.nodes):
        norm: Any = module_of(net, node)
        if not is_kind(norm, BATCH_NORMS):
            continue
        user, synapse = node, None
        while len(user.users) == 1 and synapse is None:
            (user,) = user.users
            module = module_of(net, user)
            if is_kind(module, SYNAPSES):
                synapse = module
            elif not (isinstance(module, FrameDropout) or _is_flatten(net, user)):
                break
        if synapse is None:
            raise refusal(net, node)
        with torch.no_grad():
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else shift + norm.bias
            _fold_forward(node, synapse, scale, shift)
        if not is_kind(synapse, CONVOLUTIONS):
            user.meta[NORM] = node.name
        _drop(node, node.args[0])


def _fold_forward(node: fx.Node, synapse: Any, scale: Tensor, shift: Tensor) -> None:
    """``scale`` and ``shift`` (channels,) of what enters a synapse, into its weights and its bias."""
    weight, convolves = synapse.weight, is_kind(synapse, CONVOLUTIONS)
    inputs = synapse.in_channels if convolves else synapse.in_features
    padded = convolves and (synapse.padding == "same" if isinstance(synapse.padding, str) else any(synapse.padding))
    if padded and shift.any():
        raise ValueError(
            f"cannot convert node {node.name!r}: batch-norm in front of a layer folds into it only where the layer has "
            "no padding; place it behind a Linear or Conv layer"
        )
    if inputs % len(scale):
        raise ValueError(f"cannot convert node {node.name!r}: {FLAT_NORM}")
    repeats = inputs // len(scale)  # behind a Flatten, each channel has several inputs
    scale, shift = scale.repeat_interleave(repeats), shift.repeat_interleave(repeats)
    groups = synapse.groups if convolves else 1
    # (groups, outputs of the group, inputs of the group, kernel)
    grouped = weight.view(groups, weight.shape[0] // groups, inputs // groups, -1)
    shifts = torch.einsum("goik,gi->go", grouped, shift.view(groups, -1)).flatten()
    grouped.mul_(scale.view(groups, 1, -1, 1))
    bias = shifts if synapse.bias is None else synapse.bias + shifts
    synapse.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _pool_behind_relu(net: NetworkGraph) -> None:
    """Swap max pooling and the ReLU behind it, which changes no value: spikes are pooled then, not currents."""
    behind_relu: set[fx.Node] = set()
    for node in list(net.graph.nodes):
        if not _is_relu(net, node):
            if any(source in behind_relu for source in node.all_input_nodes):
                behind_relu.add(node)
            continue
        behind_relu.add(node)
        pool = node.all_input_nodes[0]
        while _is_max_pool(net, pool) and len(pool.users) == 1 and pool.all_input_nodes[0] in behind_relu:
            source = pool.all_input_nodes[0]
            node.replace_all_uses_with(pool)
            node.replace_input_with(pool, source)
            pool.replace_input_with(source, node)
            pool.prepend(node)
            pool = source


def _own_max_pool(net: NetworkGraph, node: fx.Node, source: fx.Node) -> None:
    """A max-pooling node with a module of its own, so that the spikes that it lets through can be counted."""
    if _is_behind_spikes(net, source) and not _takes_spikes(net, source):
        raise refusal(net, node)
    pool: Any = copy.deepcopy(module_of(net, node))
    if pool is None:
        kind = MAX_POOLING_FUNCTIONS[node.target]
        sizes = (
            ("output_size",)
            if "Adaptive" in kind.__name__
            else ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        )
        pool = kind(**dict(zip((*sizes, "return_indices"), node.args[1:], strict=False)), **node.kwargs)
    if pool.return_indices:
        raise ValueError(f"cannot convert node {node.name!r}: max pooling that returns indices; leave them out")
    name = _free_name(net, node, *MAX_POOLINGS)
    net.add_module(name, pool)
    _call_module(node, name, source)


def _takes_spikes(net: NetworkGraph, node: fx.Node) -> bool:
    """Whether each value on ``node`` is a spike of one LIF layer, or none."""
    module = module_of(net, node)
    if isinstance(module, LIF):
        return True
    passes = isinstance(module, FrameDropout) or is_kind(module, MAX_POOLINGS)
    return passes and _takes_spikes(net, node.all_input_nodes[0])


def _is_behind_spikes(net: NetworkGraph, node: fx.Node) -> bool:
    return isinstance(module_of(net, node), LIF) or any(_is_behind_spikes(net, n) for n in node.all_input_nodes)


# --- one spelling -------------------------------------------------------------------------------------------------


def _normalise(net: NetworkGraph, node: fx.Node, seen: dict[str, str]) -> None:
    """Leave a node that time can be folded into as it is, bring its other spellings to that, refuse the rest."""
    if node.op in ("placeholder", "output") or _is_batch_size(node):
        if node.op == "output" and not isinstance(node.args[0], fx.Node):
            raise ValueError("the network must return one tensor, not a tuple or dict; convert the part that does")
        return None
    if node.op == "get_attr":
        raise ValueError(
            f"cannot convert node {node.name!r}: the forward computes with {node.target!r} itself; {HOLDS_WEIGHTS}"
        )
    if node.target in CONCATENATIONS:
        return _normalise_concatenation(net, node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None:
        raise refusal(net, node)
    if _is_split(node):  # its parts, which are slices, are what is left of it
        if not all(user.target is operator.getitem for user in node.users):
            raise refusal(net, node)
        return None
    if node.target is operator.getitem:
        return _normalise_part(net, node, source)
    others = [arg for arg in node.all_input_nodes if arg is not source]
    if others and (_is_max_pool(net, node) or node.target in AVERAGE_POOLING_FUNCTIONS):
        raise ValueError(f"cannot convert node {node.name!r}: {SIZES}")
    if _is_max_pool(net, node):
        return _own_max_pool(net, node, source)
    if node.op == "call_module":
        return _normalise_module(net, node, source, seen)
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
        return _call_frame_dropout(net, node, source, float(p))  # type: ignore[arg-type]
    if node.target in AVERAGE_POOLING_FUNCTIONS:
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
        batch, *shape = sizes or (None,)
        keeps_batch = batch == -1 or (isinstance(batch, fx.Node) and _is_batch_size(batch))
        if keeps_batch and shape and all(isinstance(size, int) for size in shape):
            return _call_function(node, reshaped, source, *shape)
    if name == "unflatten" or node.target is torch.unflatten:
        dim, features = _arguments(node, "dim", "sizes")
        if _keeps_batch(dim) and isinstance(features, tuple | list) and all(isinstance(n, int) for n in features):
            return _call_function(node, torch.unflatten, source, dim, tuple(features))
    if name == "narrow" or node.target is torch.narrow:
        dim, start, length = _arguments(node, "dim", "start", "length")
        if _is_feature(dim) and isinstance(start, int) and isinstance(length, int) and start >= 0:
            return _call_slice(node, source, dim, start, start + length)
    if name == "mean" or node.target is torch.mean:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else dims
        if isinstance(dims, tuple | list) and all(isinstance(d, int) and _keeps_batch(d) for d in dims):
            keepdim = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
            return _call_function(node, torch.mean, source, tuple(dims), keepdim)
    raise refusal(net, node)


def _arguments(node: fx.Node, *names: str) -> Iterator[Any]:
    """What a function or method was given behind its first argument, by position or name; None where it was not."""
    for i, name in enumerate(names, start=1):
        yield node.kwargs.get(name, node.args[i] if len(node.args) > i else None)


def _normalise_concatenation(net: NetworkGraph, node: fx.Node) -> None:
    signals = node.kwargs.get("tensors", node.args[0] if node.args else None)
    dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
    whole = isinstance(signals, tuple | list) and all(isinstance(signal, fx.Node) for signal in signals)
    if not (whole and _keeps_batch(dim) and node.kwargs.keys() <= {"tensors", "dim", "axis"}):
        raise refusal(net, node)
    assert isinstance(signals, tuple | list)
    _call_function(node, torch.cat, list(signals), dim)


def _normalise_part(net: NetworkGraph, node: fx.Node, source: fx.Node) -> None:
    """Part of each observation: ``x[:, 2:5]``, ``x[:, 0]``, ``x[..., :3]``, or a part of ``x.split(...)``."""
    index = node.args[1]
    if _is_split(source):
        x, sizes, dim = _split(source)
        if isinstance(index, int) and index >= 0 and x is not None and _is_feature(dim):
            if isinstance(sizes, int):
                return _call_slice(node, x, dim, index * sizes, (index + 1) * sizes)
            if isinstance(sizes, tuple | list) and all(isinstance(n, int) for n in sizes) and index < len(sizes):
                start = sum(sizes[:index])
                return _call_slice(node, x, dim, start, start + sizes[index])
        raise refusal(net, source)
    if not isinstance(index, tuple):
        index = (index,)
    first, *others = index or (None,)
    keeps_batch = first == slice(None) or (first is Ellipsis and len(others) == 1)
    if not (keeps_batch and all(map(_is_plain_index, others)) and (first is not Ellipsis or Ellipsis not in others)):
        raise refusal(net, node)
    return _call_function(node, operator.getitem, source, index) if others else _drop(node, source)


def _is_plain_index(index: object) -> bool:
    if isinstance(index, slice):
        return all(n is None or isinstance(n, int) for n in (index.start, index.stop, index.step))
    return index is None or index is Ellipsis or (isinstance(index, int) and not isinstance(index, bool))


def _is_split(node: fx.Node) -> bool:
    return node.target is torch.split or (node.op == "call_method" and node.target == "split")


def _split(node: fx.Node) -> tuple[fx.Node | None, Any, Any]:
    """What is split, into which sizes, along which dimension."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    named = {"split_size", "split_size_or_sections"} & node.kwargs.keys()
    sizes = node.kwargs[named.pop()] if named else node.args[1] if len(node.args) > 1 else None
    return source, sizes, node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)


def _is_feature(dim: object) -> bool:
    """Whether it is a dimension of features in whatever rank: any but the first, or the last."""
    return isinstance(dim, int) and (dim > 0 or dim == -1)


def _call_slice(node: fx.Node, source: fx.Node, dim: int, start: int, stop: int) -> None:
    """Entries from ``start`` up to ``stop`` along a dimension of each observation."""
    whole = (Ellipsis,) if dim == -1 else (slice(None),) * dim
    _call_function(node, operator.getitem, source, (*whole, slice(start, stop)))


def reshaped(x: Tensor, *sizes: int) -> Tensor:
    """``x`` (batch, ...) as (batch, *sizes)."""
    return x.reshape(x.shape[0], *sizes)


def _normalise_module(net: NetworkGraph, node: fx.Node, source: fx.Node, seen: dict[str, str]) -> None:
    module: Any = module_of(net, node)
    kind = kind_of(module)
    if kind in SYNAPSES:
        if seen.setdefault(str(node.target), node.name) != node.name:
            raise ValueError(
                f"cannot convert node {node.name!r}: layer {node.target!r} is used twice; give each use its own layer"
            )
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"cannot convert node {node.name!r}: the weight of layer {node.target!r} is computed at each call; "
                "store it as a parameter"
            )
        return None
    if kind in AVERAGE_POOLINGS or kind in BATCH_NORMS or (kind is nn.Flatten and _keeps_batch(module.start_dim)):
        return None
    if kind is nn.Unflatten and _keeps_batch(module.dim) and all(isinstance(n, int) for n in module.unflattened_size):
        return None
    if kind in DROPOUTS:
        if kind is not nn.Dropout:
            raise ValueError(f"cannot convert node {node.name!r} ({type(module).__name__}): use nn.Dropout")
        return _call_frame_dropout(net, node, source, module.p)
    if kind is nn.Identity:
        return _drop(node, source)
    raise refusal(net, node)


def _is_relu(net: NetworkGraph, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in RELU_FUNCTIONS
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return is_kind(module_of(net, node), (nn.ReLU,))


def _is_max_pool(net: NetworkGraph, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in MAX_POOLING_FUNCTIONS
    return is_kind(module_of(net, node), MAX_POOLINGS)


def _is_flatten(net: NetworkGraph, node: fx.Node) -> bool:
    return node.target is torch.flatten or is_kind(module_of(net, node), (nn.Flatten,))


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


def _free_name(net: NetworkGraph, node: fx.Node, *kinds: type[nn.Module]) -> str:
    """The node's own name for what replaces it, unless the network uses it for something else than those ``kinds``."""
    name = node.name
    while hasattr(net, name) and not is_kind(getattr(net, name), kinds):
        name += "_lif" if nn.ReLU in kinds else "_pool"
    return name


def _call_frame_dropout(net: NetworkGraph, node: fx.Node, source: fx.Node, p: float) -> None:
    name = unused_name(net, f"{node.name}_frame")
    net.add_module(name, FrameDropout(p))
    _call_module(node, name, source)


def unused_name(net: NetworkGraph, name: str) -> str:
    """``name``, or one like it that no module of the network has."""
    while hasattr(net, name):
        name += "_"
    return name


def _call_module(node: fx.Node, name: str, source: fx.Node) -> None:
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def _call_function(node: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, kwargs


def _drop(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def refusal(net: NetworkGraph, node: fx.Node) -> ValueError:
    """Why ``node`` cannot be converted, by name, and what to use in its place."""
    module = module_of(net, node)
    what = getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__
    way_out = next((hint for key, hint in WAY_OUT.items() if key in what), DEFAULT_WAY_OUT)
    if isinstance(module, KNOWN) and kind_of(module) is None:
        way_out = "it computes its output in its own way; use PyTorch's own layer"
    return ValueError(f"cannot convert node {node.name!r} ({what}): {way_out}")
