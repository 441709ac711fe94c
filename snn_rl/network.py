"""A converted network run through time: layer by layer, state passed in and out."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from snn_rl.neuron import LIF
from snn_rl.scan import SpikeConv2d, SpikesRecomputed

State = tuple[Tensor, ...]  # one carry (batch, ...) per LIF layer, in the order of `SpikingNetwork.lif_layers`


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


class SpikingNetwork(nn.Module):
    """A feed-forward graph of synapses and LIF layers, made by `snn_rl.to_spiking`.

    An observation drives the first synapse at each of the ``timesteps`` micro-steps of its frame (direct encoding),
    and the output is the mean over these micro-steps of a last synapse that neither leaks nor spikes. Synapses are
    stateless, so all micro-steps of all frames are folded into their batch; only LIF layers walk through time.
    Whatever stands before the first LIF layer is the same at every micro-step and is computed once per frame;
    whatever stands behind the last one is affine, commutes with the mean, and is computed once per frame too.

    The state is a tuple of membrane carries that the caller keeps. The network itself holds none.
    """

    def __init__(self, graph: fx.GraphModule, timesteps: int) -> None:
        super().__init__()
        # The format in which convolutions are fastest, and which LIF layers keep.
        for parameter in graph.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        for module in graph.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = SpikeConv2d
        self.graph = graph
        self.timesteps = timesteps
        nodes = list(graph.graph.nodes)
        self._lif_nodes = {n: str(n.target) for n in nodes if n.op == "call_module" and self._is_lif(n)}
        self._every_step = self._between_lif_layers(nodes)
        self._last_used = self._last_uses(nodes)
        # What each node calls: looking modules up by name costs more than a small layer itself.
        self._targets = {n: graph.get_submodule(str(n.target)) if n.op == "call_module" else n.target for n in nodes}

    def _between_lif_layers(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """The nodes that must be computed at every micro-step."""
        after: set[fx.Node] = set()
        for node in nodes:
            if node in self._lif_nodes or any(parent in after for parent in node.all_input_nodes):
                after.add(node)
        before: set[fx.Node] = set()
        for node in reversed(nodes):
            if any(user in before or user in self._lif_nodes for user in node.users):
                before.add(node)
        return set(self._lif_nodes) | (after & before)

    @staticmethod
    def _last_uses(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """The values that nothing needs once a node is computed."""
        last = {source: node for node in nodes for source in node.all_input_nodes}
        uses: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for source, node in last.items():
            uses[node].append(source)
        return uses

    def _is_lif(self, node: fx.Node) -> bool:
        return isinstance(self.graph.get_submodule(str(node.target)), LIF)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpikingNetwork:
        # The plan is keyed by this graph's own nodes; a copied graph has new ones.
        twin = SpikingNetwork(copy.deepcopy(self.graph, memo), self.timesteps)
        return twin.train(self.training)

    @property
    def timesteps(self) -> int:
        """T, the micro-steps per frame."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"timesteps must be an integer >= 1, got {value!r}")
        self._timesteps = value

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return cast(LIF, self._targets[next(iter(self._lif_nodes))]).raw_threshold.device

    @property
    def lif_layers(self) -> dict[str, LIF]:
        """The LIF layers by name, in the order in which the signal reaches them."""
        return {name: cast(LIF, self.graph.get_submodule(name)) for name in self._lif_nodes.values()}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One frame: ``x`` (batch, ...) -> output (batch, ...) and the state the next frame starts from.

        ``state=None`` is silence. Raises ValueError where the state does not fit the network or the batch.
        """
        out, state = self.unroll(x.unsqueeze(0), state)
        return out.squeeze(0), state

    def unroll(
        self, x: Tensor, state: State | None = None, episode_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """A sequence of frames: ``x`` (frames, batch, ...) -> outputs (frames, batch, ...) and the last state.

        ``episode_start`` (frames, batch) is 1 or True where membranes are cleared before the frame.
        """
        if x.shape[0] < 1:
            raise ValueError("a sequence must have at least one frame, got 0")
        if state is not None and len(state) != len(self._lif_nodes):
            raise ValueError(f"state must hold {len(self._lif_nodes)} carries, one per LIF layer, got {len(state)}")
        keep = None if episode_start is None else 1 - episode_start.to(x.dtype)  # (frames, batch)
        # One micro-step has no more spikes than an ANN has activations: keeping them is faster.
        if self.timesteps == 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._run(x, state, keep, None)
        spikes = SpikesRecomputed()
        with spikes.hooks():
            return self._run(x, state, keep, spikes)

    def _run(
        self, x: Tensor, state: State | None, keep: Tensor | None, recomputed: SpikesRecomputed | None
    ) -> tuple[Tensor, State]:
        frames, batch = x.shape[:2]
        new_state: list[Tensor] = []
        values: dict[fx.Node, Any] = {}
        for node, target in self._targets.items():
            every_step = node in self._every_step

            def at_rate(source: fx.Node, every_step: bool = every_step) -> Any:
                return self._at_rate(values[source], source in self._every_step, every_step, frames, batch)

            if node.op == "placeholder":
                values[node] = x.flatten(0, 1)  # (frames * batch, ...)
            elif node in self._lif_nodes:
                source = node.args[0]
                steps = self.timesteps if source in self._every_step else 1
                current = values[source]  # (frames * steps * batch, ...) -> (frames * steps, batch, ...)
                current = current.view(frames * steps, batch, *current.shape[1:])
                carry = None if state is None else state[len(new_state)]
                spikes, carry = target(current, carry, keep, hold=self.timesteps // steps)
                if recomputed is not None:
                    recomputed.add(spikes)
                new_state.append(carry)
                values[node] = spikes.flatten(0, 1)
                del current, spikes
            else:
                args = [at_rate(a) if isinstance(a, fx.Node) else fx.node.map_arg(a, at_rate) for a in node.args]
                kwargs = fx.node.map_arg(node.kwargs, at_rate) if node.kwargs else {}
                if node.op == "output":
                    return args[0].unflatten(0, (frames, batch)), tuple(new_state)
                if isinstance(target, FrameDropout):
                    steps = self.timesteps if every_step else 1
                    values[node] = target(args[0].unflatten(0, (frames, steps, batch))).flatten(0, 2)
                elif recomputed is not None and isinstance(target, SpikeConv2d):
                    values[node] = target(*args, let_go=True)
                else:  # modules, and functions alone: conversion rewrites methods
                    values[node] = target(*args, **kwargs)
                del args, kwargs
            for source in self._last_used[node]:
                del values[source]
        raise AssertionError("a traced graph ends in an output node")

    def _at_rate(self, value: Any, has_steps: bool, wants_steps: bool, frames: int, batch: int) -> Any:
        """Bring a folded value to the rate of its consumer: repeat it per micro-step, or average over them."""
        if has_steps == wants_steps or self.timesteps == 1 or not isinstance(value, Tensor):
            return value
        if wants_steps:  # (frames * batch, ...) -> (frames * steps * batch, ...)
            value = value.unflatten(0, (frames, 1, batch))
            return value.expand(-1, self.timesteps, *value.shape[2:]).flatten(0, 2)
        return value.unflatten(0, (frames, self.timesteps, batch)).mean(1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"
