"""A converted network run through time: layer by layer, state passed in and out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from snn_rl.core.layers import MAX_POOLINGS, is_kind
from snn_rl.core.neuron import LIF
from snn_rl.core.scan import SpikeConv2d, SpikesRecomputed

State = tuple[Tensor, ...]  # one carry (batch, ...) per LIF layer, in the order of `SpikingNetwork.lif_layers`


def check_timesteps(timesteps: int) -> None:
    """Raises ValueError where ``timesteps`` is no integer >= 1."""
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be an integer >= 1, got {timesteps!r}")


class NetworkGraph(nn.Module):
    """The modules of a network, and in ``graph`` the order in which they and functions are called.

    What `fx.GraphModule` is, without code generated from the graph, which PyTorch keeps for ever for each network.

    Args:
        root: where the modules that ``graph`` calls are.
        graph: of one input and one output.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        for node in graph.nodes:
            if node.op == "call_module":
                put_module(self, str(node.target), root.get_submodule(str(node.target)))


def module_of(net: NetworkGraph, node: Any) -> nn.Module | None:
    """The module that a node calls. None for any other node, and for a constant."""
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return net.get_submodule(str(node.target)) if is_call else None


def put_module(net: NetworkGraph, path: str, module: nn.Module) -> None:
    """Place a module at a dotted path, in place of the one that is there. ValueError for a name that is taken."""
    parent: nn.Module = net
    *above, name = path.split(".")
    for part in above:
        if part not in parent._modules:
            put_module(parent, part, nn.Module())  # type: ignore[arg-type]
        parent = parent.get_submodule(part)
    if name not in parent._modules and hasattr(parent, name):
        raise ValueError(f"cannot convert a layer of the name {name!r}, which is taken; rename the layer")
    parent.add_module(name, module)


class Gain(nn.Module):
    """Multiply by a constant: brings a branch without weights of its own to the scale of where it is added."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor: Tensor
        self.register_buffer("factor", torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class FrameDropout(nn.Module):
    """Dropout with one mask for all micro-steps of a frame, as DIET-SNN trains."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (frames, steps, batch, ...)."""
        if not self.training or self.p == 0:
            return x
        return x * nn.functional.dropout(torch.ones_like(x[:, :1]), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


@dataclass(frozen=True)
class _Value:
    """What an earlier step of the plan computed."""

    step: int
    every_micro_step: bool


@dataclass(frozen=True)
class _Step:
    """A node of the graph, with all that running it needs: `torch.compile` follows this, and not a graph's nodes."""

    op: str
    target: Any
    args: tuple[Any, ...]  # constants and `_Value`s
    kwargs: dict[str, Any]
    every_micro_step: bool  # or once per frame
    last_uses: tuple[int, ...]  # steps whose values nothing needs after this one


class SpikingNetwork(nn.Module):
    """A feed-forward graph of synapses and LIF layers, made by `snn_rl.to_spiking`.

    An observation drives the first synapse at each of the ``timesteps`` micro-steps of its frame (direct encoding),
    and the output is the mean over these micro-steps of a last synapse that neither leaks nor spikes. Synapses are
    stateless, so all micro-steps of all frames are folded into their batch; only LIF layers walk through time.
    The layers before the first LIF layer see the same input at every micro-step, so they run once per frame. The layers
    behind the last LIF layer are affine and commute with the mean, so they run once per frame too. Max pooling does not
    commute with the mean: behind a LIF layer it runs at every micro-step.

    The state is a tuple of membrane carries that the caller keeps. The network itself holds none.
    """

    def __init__(self, graph: NetworkGraph, timesteps: int) -> None:
        super().__init__()
        # The format in which convolutions are fastest, and which LIF layers keep.
        for parameter in graph.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.graph = graph
        self.timesteps = timesteps
        self._plan = _plan(graph)
        for step in self._plan:
            if step.every_micro_step and type(step.target) is nn.Conv2d:
                step.target.__class__ = SpikeConv2d
        self._lif_layers = {
            str(node.target): module
            for node in graph.graph.nodes
            if node.op == "call_module" and isinstance(module := graph.get_submodule(str(node.target)), LIF)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> SpikingNetwork:
        # The plan refers to this graph's own modules; a copied graph has new ones.
        twin = SpikingNetwork(copy.deepcopy(self.graph, memo), self.timesteps)
        return twin.train(self.training)

    @property
    def timesteps(self) -> int:
        """T, the micro-steps per frame."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: int) -> None:
        check_timesteps(value)
        self._timesteps = value

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(iter(self._lif_layers.values())).raw_threshold.device

    @property
    def lif_layers(self) -> dict[str, LIF]:
        """The LIF layers by name, in the order in which the signal reaches them."""
        return dict(self._lif_layers)

    @property
    def spike_pools(self) -> dict[str, nn.Module]:
        """The max-pooling layers that spikes go through, by name: each lets a spike through where any neuron fires."""
        steps = zip(self.graph.graph.nodes, self._plan, strict=True)
        return {
            str(node.target): step.target
            for node, step in steps
            if step.every_micro_step and is_kind(step.target, MAX_POOLINGS)
        }

    def forward(self, x: Tensor, state: State | None = None, *, with_state: bool = True) -> tuple[Tensor, State]:
        """One frame: ``x`` (batch, ...) -> output (batch, ...) and the state the next frame starts from.

        ``state=None`` is silence. Where no frame follows, ``with_state=False`` saves the writing of the state; an empty
        tuple is returned in its place. Raises ValueError where the state does not fit the network or the batch.
        """
        out, state = self.unroll(x.unsqueeze(0), state, with_state=with_state)
        return out.squeeze(0), state

    def unroll(
        self,
        x: Tensor,
        state: State | None = None,
        episode_start: Tensor | None = None,
        *,
        with_state: bool = True,
    ) -> tuple[Tensor, State]:
        """A sequence of frames: ``x`` (frames, batch, ...) -> outputs (frames, batch, ...) and the last state.

        ``episode_start`` (frames, batch) is 1 or True where membranes are cleared before the frame, whatever they hold.
        """
        if x.shape[0] < 1:
            raise ValueError("a sequence must have at least one frame, got 0")
        if state is not None and len(state) != len(self._lif_layers):
            raise ValueError(f"state must hold {len(self._lif_layers)} carries, one per LIF layer, got {len(state)}")
        keep = None if episode_start is None else (episode_start == 0).to(x.dtype)  # (frames, batch)
        # One micro-step has no more spikes than an ANN has activations: keeping them is faster.
        if self.timesteps == 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._run(x, state, keep, None, with_state)
        spikes = SpikesRecomputed()
        with spikes.hooks():
            return self._run(x, state, keep, spikes, with_state)

    def _run(
        self,
        x: Tensor,
        state: State | None,
        keep: Tensor | None,
        recomputed: SpikesRecomputed | None,
        with_state: bool,
    ) -> tuple[Tensor, State]:
        frames, batch = x.shape[:2]
        new_state: list[Tensor] = []
        values: list[Any] = []
        for step in self._plan:
            target = step.target
            if step.op == "placeholder":
                value: Any = x.flatten(0, 1)  # (frames * batch, ...)
            elif isinstance(target, LIF):
                (source,) = step.args
                steps = self.timesteps if source.every_micro_step else 1
                current = values[source.step]  # (frames * steps * batch, ...) -> (frames * steps, batch, ...)
                current = current.view(frames * steps, batch, *current.shape[1:])
                carry = None if state is None else state[len(new_state)]
                value, carry = target(current, carry, keep, hold=self.timesteps // steps, with_carry=with_state)
                if recomputed is not None:
                    recomputed.add(value)
                new_state.append(carry)
                value = value.flatten(0, 1)
                del current
            else:
                args = self._filled(step.args, values, step.every_micro_step, frames, batch)
                if step.op == "output":
                    return args[0].unflatten(0, (frames, batch)), tuple(new_state) if with_state else ()
                if isinstance(target, FrameDropout):
                    steps = self.timesteps if step.every_micro_step else 1
                    value = target(args[0].unflatten(0, (frames, steps, batch))).flatten(0, 2)
                elif recomputed is not None and isinstance(target, SpikeConv2d):
                    value = target(*args, let_go=True)
                elif step.kwargs:
                    value = target(*args, **self._filled(step.kwargs, values, step.every_micro_step, frames, batch))
                else:  # modules, and functions alone: conversion rewrites methods
                    value = target(*args)
                del args
            values.append(value)
            del value
            for i in step.last_uses:
                values[i] = None
        raise AssertionError("a traced graph ends in an output node")

    def _filled(self, template: Any, values: list[Any], every_micro_step: bool, frames: int, batch: int) -> Any:
        """Arguments with each `_Value` replaced by its value, at the rate of who takes it."""
        if isinstance(template, _Value):
            value = values[template.step]
            return self._at_rate(value, template.every_micro_step, every_micro_step, frames, batch)
        if isinstance(template, tuple | list):
            return type(template)([self._filled(x, values, every_micro_step, frames, batch) for x in template])
        if isinstance(template, dict):
            return {k: self._filled(x, values, every_micro_step, frames, batch) for k, x in template.items()}
        return template

    def _at_rate(self, value: Any, has_steps: bool, wants_steps: bool, frames: int, batch: int) -> Any:
        """Bring a folded value to the rate of its consumer: repeat it per micro-step, or average over them."""
        if has_steps == wants_steps or self.timesteps == 1 or not isinstance(value, Tensor):
            return value
        if wants_steps:  # (frames * batch, ...) -> (frames * steps * batch, ...)
            value = value.unflatten(0, (frames, 1, batch))
            return value.expand(-1, self.timesteps, *value.shape[2:]).flatten(0, 2)
        return value.unflatten(0, (frames, self.timesteps, batch)).mean(1).flatten(0, 1)

    @torch.no_grad()
    def check_observation(self, observation: Tensor) -> None:
        """Raise ValueError where the network cannot take an observation (...), without batch, of this shape."""
        parameter = next(self.parameters())
        try:
            self(torch.zeros(1, *observation.shape, device=parameter.device, dtype=parameter.dtype), with_state=False)
        except (RuntimeError, IndexError) as error:  # of PyTorch, whose message names the shapes that do not fit
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the network cannot take observations of shape {tuple(observation.shape)} ({reason}); "
                "give those it was trained on"
            ) from error

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"


def _plan(graph: NetworkGraph) -> tuple[_Step, ...]:
    nodes = list(graph.graph.nodes)
    targets = {n: graph.get_submodule(str(n.target)) if n.op == "call_module" else n.target for n in nodes}
    every_micro_step = _every_micro_step(
        nodes,
        {node for node in nodes if isinstance(targets[node], LIF)},
        {node for node in nodes if isinstance(targets[node], MAX_POOLINGS)},
    )
    index = {node: i for i, node in enumerate(nodes)}
    last_uses = {source: node for node in nodes for source in node.all_input_nodes}

    def value(node: fx.Node) -> Any:
        return _Value(index[node], node in every_micro_step)

    return tuple(
        _Step(
            node.op,
            targets[node],
            tuple(fx.node.map_arg(arg, value) for arg in node.args),  # in containers of Python's own
            {name: fx.node.map_arg(arg, value) for name, arg in node.kwargs.items()},
            node in every_micro_step,
            tuple(index[source] for source, user in last_uses.items() if user is node),
        )
        for node in nodes
    )


def _every_micro_step(nodes: list[fx.Node], lif: set[fx.Node], max_pools: set[fx.Node]) -> set[fx.Node]:
    """The nodes that must be computed at every micro-step: from a LIF layer on, up to the last that is not affine."""
    after: set[fx.Node] = set()
    for node in nodes:
        if node in lif or any(parent in after for parent in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in max_pools or any(user in before or user in lif for user in node.users):
            before.add(node)
    return lif | (after & before)
