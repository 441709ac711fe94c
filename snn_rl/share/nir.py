"""NIR, the neuromorphic intermediate representation (Pedersen et al. 2024): a network's graph, and back.

A NIR neuron is a differential equation, ours one Euler step of it: with time step ``DT``, leak ``l`` and threshold
``v``, an LIF of ``tau = DT / (1 - l)``, ``r = 1`` and ``v_threshold = (1 - l) v``, whose potential is ``(1 - l)`` times
ours. A leak of 1 is an IF, which adds up its input without ``DT``, as simulators take it.
NIR names no reset by subtraction: that, and T, stand in the graph's metadata, and a
simulator has to be told. What holds for which one: docs/export.md.
"""

from __future__ import annotations

import copy
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from snn_rl.base.files import atomic
from snn_rl.core.network import FrameDropout, Gain, NetworkGraph, SpikingNetwork
from snn_rl.core.neuron import LIF, MIN_THRESHOLD

if TYPE_CHECKING:
    import nir

DT = 1e-4  # seconds; snnTorch's importer knows no other
MAX_THRESHOLD = float(np.finfo(np.float32).max)
ROUNDING = float(np.finfo(np.float32).eps)  # relative, of a tau or dt that someone kept in single precision


def write_nir(network: SpikingNetwork, observation_shape: tuple[int, ...], path: str | Path) -> None:
    """Write `to_nir` of a network to a ``.nir`` file, atomically."""
    graph = to_nir(network, observation_shape)
    with atomic(Path(path)) as temporary:
        _nir().write(str(temporary), graph)


def read_nir(path: str | Path, timesteps: int | None = None) -> SpikingNetwork:
    """`from_nir` of a file. Raises ValueError where it cannot be read."""
    if not Path(path).is_file():
        raise ValueError(f"no file at {path}")
    try:
        graph = _nir().read(str(path))
    except Exception as error:  # a foreign file may raise anything
        raise ValueError(f"{path} is not a readable NIR file: {type(error).__name__}: {error}") from error
    return from_nir(graph, timesteps)


def _nir() -> Any:
    try:
        import nir
    except ImportError as error:
        raise ValueError("NIR needs the package nir: pip install 'snn_rl[nir]'") from error
    return nir


# --- export -------------------------------------------------------------------------------------------------------


def to_nir(network: SpikingNetwork, observation_shape: tuple[int, ...]) -> nir.NIRGraph:
    """The NIR graph of one micro-step, from an observation (without batch) to what is averaged over the T micro-steps.

    Average pooling becomes sum pooling, which more simulators know, its factor folded into the next weights. Scalars of
    a layer are repeated for each of its neurons, and a missing bias is one of zeros. Weights of any precision are
    written in single precision, in which simulators compute.

    Raises:
        ValueError: a layer that NIR cannot express, by name; a shape the network cannot take; nir is not installed.
    """
    nir = _nir()
    network = copy.deepcopy(network).cpu().float().eval()  # in which dropout is the identity
    walk = _Export(network, nir)
    empty = torch.zeros(1, *observation_shape)
    network.check_observation(empty[0])
    with torch.no_grad():
        walk.run(empty)
    resets = {lif.leak_reset for lif in network.lif_layers.values()}
    if len(resets) > 1:
        raise ValueError("layers with and without leak_reset in one network cannot be expressed in NIR")
    metadata = {"timesteps": network.timesteps, "dt": DT, "reset": "subtract", "leak_reset": int(resets.pop())}
    return walk.nir.NIRGraph(walk.nodes, walk.edges, metadata=metadata)


class _Export(fx.Interpreter):
    """Run an empty observation through the graph, and make a NIR node of each node on the way."""

    def __init__(self, network: SpikingNetwork, nir: Any) -> None:
        super().__init__(network.graph)
        self.extra_traceback = False  # errors are one line
        self.nir = nir
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.names: dict[fx.Node, list[str]] = {}  # the NIR nodes whose sum is this node's output
        self.factor: dict[fx.Node, float] = {}  # by which it is too large: what pooling would have divided by

    def run_node(self, n: fx.Node) -> Any:
        sources = n.all_input_nodes
        x: Any = self.env[sources[0]] if sources else None
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        out = x if isinstance(module, LIF) or n.op == "output" else super().run_node(n)
        factors = {self.factor[source] for source in sources}
        if n.target is operator.add:  # several edges into one node are a sum
            if factors != {1.0}:
                raise _refusal(n, "a sum behind average pooling: put a convolution between them")
            terms = [name for arg in n.args if isinstance(arg, fx.Node) for name in self.names[arg]]
            if len(set(terms)) < len(terms):
                raise _refusal(n, "a signal that is added to itself: NIR has one edge between two nodes")
            self.names[n], self.factor[n] = [name for source in sources for name in self.names[source]], 1.0
            return out
        if isinstance(module, FrameDropout):
            self.names[n], self.factor[n] = self.names[sources[0]], self.factor[sources[0]]
            return out
        factor = factors.pop() if factors else 1.0
        self.factor[n] = 1.0
        node: Any
        if n.op == "placeholder":
            node = self.nir.Input(np.array(out.shape[1:]))
        elif n.op == "output":
            if factor != 1.0:
                raise _refusal(n, "average pooling right before it: put a linear layer behind the pooling")
            node = self.nir.Output(np.array(out.shape[1:]))
        elif isinstance(module, LIF):
            if factor != 1.0:
                raise _refusal(n, "average pooling right before it: put a convolution or linear layer between them")
            node = self._neurons(module, tuple(out.shape[1:]))
        elif type(module) is nn.Linear:
            node = self.nir.Affine(_array(module.weight) * factor, _bias(module))
        elif isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise _refusal(n, f"padding with {module.padding_mode}: use zeros")
            node = self.nir.Conv2d(
                tuple(x.shape[2:]),
                _array(module.weight) * factor,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
                _bias(module),
            )
        elif isinstance(module, nn.AvgPool2d):
            kernel, stride = (np.broadcast_to(s, 2).copy() for s in (module.kernel_size, module.stride))
            if np.any(np.asarray(module.padding)) or module.ceil_mode:
                raise _refusal(n, "pooling with padding or ceil_mode: pool without")
            self.factor[n] = factor / (module.divisor_override or int(kernel.prod()))
            node = self.nir.SumPool2d(kernel, stride, np.zeros(2, dtype=int))
        elif isinstance(module, nn.Flatten) or n.target is torch.flatten:
            if out.dim() != 2:
                raise _refusal(n, "flattening a part of the dimensions: flatten all")
            self.factor[n] = factor
            node = self.nir.Flatten(np.array(x.shape[1:]), start_dim=0)  # without the batch, which NIR does not know
        elif isinstance(module, Gain):
            node = self.nir.Scale(np.full(tuple(out.shape[1:]), float(module.factor) * factor, dtype=np.float32))
        else:
            what = type(module).__name__ if module is not None else getattr(n.target, "__name__", str(n.target))
            raise _refusal(n, f"{what}: use Linear, Conv2d, AvgPool2d, Flatten and additions")
        own = f"{n.name}_layer" if n.name in ("input", "output") else n.name
        name = {"placeholder": "input", "output": "output"}.get(n.op, own)
        self.nodes[name] = node
        self.edges += [(source, name) for source in (self.names[sources[0]] if sources else ())]
        self.names[n] = [name]
        return out

    def _neurons(self, lif: LIF, shape: tuple[int, ...]) -> Any:
        def of_all(value: float) -> np.ndarray:
            return np.full(shape, value, dtype=np.float64)

        leak, threshold = lif.leak.item(), lif.threshold.item()
        if leak == 1:
            return self.nir.IF(r=of_all(1.0), v_threshold=of_all(threshold))
        return self.nir.LIF(
            tau=of_all(DT / (1 - leak)),
            r=of_all(1.0),
            v_leak=of_all(0.0),
            v_threshold=of_all(threshold * (1 - leak)),
        )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _bias(module: nn.Linear | nn.Conv2d) -> np.ndarray:
    bias = module.weight.new_zeros(module.weight.shape[0]) if module.bias is None else module.bias
    return _array(bias)


def _refusal(node: fx.Node, what: str) -> ValueError:
    return ValueError(f"node {node.name!r} cannot be expressed in NIR: {what}")


# --- import -------------------------------------------------------------------------------------------------------


def from_nir(graph: nir.NIRGraph, timesteps: int | None = None) -> SpikingNetwork:
    """A NIR graph of feed-forward synapses and (leaky) integrate-and-fire neurons as a `SpikingNetwork`.

    Its neurons are reset by subtraction, whatever wrote the graph. ``timesteps`` default to the graph's own metadata,
    and to 1 where there are none; so do the time step and ``leak_reset``.

    A ``tau`` of the time step is a leak of 0, also where either was rounded to single precision. Where ``tau`` and
    ``r`` are both infinite, as snnTorch writes a ``beta`` of 1, the leak is 1 and the input is added up as it is.

    Raises:
        ValueError: a node that has no counterpart or whose numbers make no neuron or synapse, by name; a loop; neurons
            of one layer that differ.
    """
    nir = _nir()
    meta = graph.metadata if isinstance(graph.metadata, dict) else {}
    if timesteps is None:
        number = _number(meta, "timesteps", 1)
        if not number.is_integer():
            raise ValueError(f"timesteps in the graph's metadata must be an integer, got {number:g}")
        timesteps = int(number)
    dt, leak_reset = _number(meta, "dt", DT), bool(_number(meta, "leak_reset", 0))
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        if missing := {source, target} - sources.keys():
            raise ValueError(f"the graph has an edge {source!r} -> {target!r}, but no node {missing.pop()!r}")
        sources[target].append(source)
    if not dt > 0:
        raise ValueError(f"the graph's time step dt must be > 0, got {dt}")
    for kind in (nir.Input, nir.Output):
        if (number := sum(isinstance(node, kind) for node in graph.nodes.values())) != 1:
            raise ValueError(f"the graph must have exactly one {kind.__name__}, got {number}")
    root, built, made = nn.Module(), fx.Graph(), dict[str, fx.Node]()
    waiting = dict(graph.nodes)
    while waiting:
        ready = [name for name in waiting if all(source in made for source in sources[name])]
        if not ready:
            raise ValueError(f"NIR nodes {sorted(waiting)} form a loop; only feed-forward graphs can be imported")
        for name in ready:
            node = waiting.pop(name)
            if isinstance(node, nir.Input):
                made[name] = built.placeholder("input")
                continue
            if not sources[name]:
                raise ValueError(f"NIR node {name!r} has no input")
            x = made[sources[name][0]]
            for other in sources[name][1:]:
                x = built.call_function(operator.add, (x, made[other]))
            if isinstance(node, nir.Output):
                made[name] = built.output(x)
            elif isinstance(node, nir.Flatten):
                if (
                    node.start_dim not in (0, 1)
                    or node.end_dim != -1
                    or (node.start_dim and len(node.output_type["output"]) > 1)
                ):
                    raise ValueError(f"NIR node {name!r} flattens a part of the dimensions; only all of them can be")
                made[name] = built.call_function(torch.flatten, (x, 1))
            else:
                legal = f"node{len(made)}_" + "".join(c if c.isalnum() else "_" for c in name)
                module = _module(name, node, nir, dt, leak_reset=leak_reset)
                if not all(bool(value.isfinite().all()) for value in module.state_dict().values()):
                    raise ValueError(f"NIR node {name!r} holds numbers that are not finite in single precision")
                root.add_module(legal, module)
                made[name] = built.call_module(legal, (x,))
    return SpikingNetwork(NetworkGraph(root, built), timesteps)


def _module(name: str, node: Any, nir: Any, dt: float, *, leak_reset: bool) -> nn.Module:
    if isinstance(node, nir.Affine | nir.Linear):
        weight = _floats(name, "weight", node.weight, dims=2)
        bias = getattr(node, "bias", None)
        return _filled(name, nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight, bias)
    if isinstance(node, nir.Conv2d):
        weight = _floats(name, "weight", node.weight, dims=4)
        padding = node.padding if isinstance(node.padding, str) else _pair(name, "padding", node.padding, least=0)
        if padding not in ("same", "valid") and isinstance(padding, str):
            raise ValueError(f"NIR node {name!r} must have padding of same, valid or numbers, got {padding!r}")
        stride, dilation = (_pair(name, key, getattr(node, key), least=1) for key in ("stride", "dilation"))
        groups = _pair(name, "groups", node.groups, least=1)[0]
        if weight.shape[0] % groups:
            raise ValueError(f"NIR node {name!r} must have groups that divide {weight.shape[0]} channels, got {groups}")
        channels, kernel = (weight.shape[1] * groups, weight.shape[0]), (weight.shape[2], weight.shape[3])
        conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias=node.bias is not None)
        return _filled(name, conv, weight, node.bias)
    if isinstance(node, nir.SumPool2d | nir.AvgPool2d):
        kernel, stride = (_pair(name, key, getattr(node, key), least=1) for key in ("kernel_size", "stride"))
        divisor = 1 if isinstance(node, nir.SumPool2d) else None
        padding = _pair(name, "padding", node.padding, least=0)
        return nn.AvgPool2d(kernel, stride, padding, divisor_override=divisor)
    if isinstance(node, nir.Scale):
        return Gain(_one(name, "scale", node.scale))
    if isinstance(node, nir.LIF | nir.IF):
        for key in ("v_leak", "v_reset"):
            if np.any(np.asarray(getattr(node, key, 0.0))):
                raise ValueError(f"NIR node {name!r} has {key} other than 0, which a LIF layer here does not")
        threshold, r = (_one(name, key, getattr(node, key)) for key in ("v_threshold", "r"))
        leak, gain = 1.0, r
        if isinstance(node, nir.LIF):
            leak, gain = _leak_and_gain(name, _one(name, "tau", node.tau), r, dt)
        if not 0 < gain < np.inf:
            raise ValueError(f"NIR node {name!r} must have r > 0 and finite, got {r:g}")
        if not MIN_THRESHOLD * (1 - 2 * ROUNDING) <= threshold / gain <= MAX_THRESHOLD:
            raise ValueError(
                f"NIR node {name!r} must have a v_threshold of {MIN_THRESHOLD * gain:g} to {MAX_THRESHOLD * gain:g}, "
                f"got {threshold:g}"
            )
        return LIF(max(threshold / gain, MIN_THRESHOLD), leak, leak_reset=leak_reset)
    raise ValueError(
        f"NIR node {name!r} ({type(node).__name__}) has no counterpart here; there are Affine, Linear, Conv2d, "
        "SumPool2d, AvgPool2d, Flatten, Scale, LIF and IF"
    )


def _leak_and_gain(name: str, tau: float, r: float, dt: float) -> tuple[float, float]:
    """What a time step leaves of the membrane potential, and by what it multiplies the current."""
    if tau == np.inf:
        if r != np.inf:
            raise ValueError(f"NIR node {name!r} has tau = inf and r = {r:g}, so that no input reaches it; use an IF")
        return 1.0, 1.0
    share = dt / tau if tau > 0 else np.inf
    if abs(share - 1) <= ROUNDING:
        return 0.0, r
    if not share < 1:
        raise ValueError(f"NIR node {name!r} must have tau >= {dt:g}, the time step, got {tau:g}")
    return 1 - share, share * r


def _number(metadata: dict[str, Any], key: str, default: float) -> float:
    value = np.asarray(metadata.get(key, default))
    if value.shape or value.dtype.kind not in "fiub" or not np.isfinite(value):
        raise ValueError(f"{key} in the graph's metadata must be a finite number, got {metadata[key]!r}")
    return float(value)


def _filled(name: str, module: Any, weight: np.ndarray, bias: Any) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.as_tensor(weight))
        if bias is not None:
            bias = _floats(name, "bias", bias, dims=1)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"NIR node {name!r} must have a bias for each of {len(weight)}, got {len(bias)}")
            module.bias.copy_(torch.as_tensor(bias))
    return module


def _floats(name: str, key: str, value: Any, dims: int | None = None) -> np.ndarray:
    """``value`` as an array of ``dims`` dimensions, none of them empty."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or not array.size or dims not in (None, array.ndim):
        what = f"of {dims} dimensions" if dims else "of numbers"
        raise ValueError(f"NIR node {name!r} must have an array {what} as {key}, got {array.dtype} {array.shape}")
    return array.astype(np.float64)


def _pair(name: str, key: str, value: Any, least: int) -> tuple[int, int]:
    numbers = _floats(name, key, value).flatten()
    if numbers.size > 2 or np.any(numbers != np.floor(numbers)) or not np.all((least <= numbers) & (numbers < 2**31)):
        raise ValueError(f"NIR node {name!r} must have one or two integers >= {least} as {key}, got {value!r}")
    return int(numbers[0]), int(numbers[-1])


def _one(name: str, key: str, values: Any) -> float:
    unique = np.unique(_floats(name, key, values))
    if unique.size != 1:
        raise ValueError(f"the neurons of NIR node {name!r} differ in {key}; a layer here has one for all of them")
    return float(unique[0])
