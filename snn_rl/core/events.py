"""Event-driven inference: a frame of a chain of layers in which only spikes cost anything. For acting on the CPU.

Played one frame at a time, a small network spends its time in calls and in reading weights that are multiplied by zero.
Here all layers and micro-steps of a frame are one compiled call, and a synapse adds up the weights of those neurons
that fired: with a tenth of them firing, a tenth of the weights is read. These are the sums of `SpikingNetwork`, taken
in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, fx, nn

from snn_rl.core.network import FrameDropout, SpikingNetwork
from snn_rl.core.scan import MIN_THRESHOLD
from snn_rl.core.scan._cpu import compiled, pointer

# Weights are copied anew after a change, which takes as long as some frames do: not while they are being trained.
CALLS_BEFORE_LAYOUT = 8

# A synapse is a row of integers: the shapes of its images (height, width, channels), its kernel, and where its weights
# and biases lie. To a Linear layer the image is one pixel; FLAT is the number of pixels, which come channel by channel.
# ACROSS is how many outputs of a line an input reaches.
(
    IN_H, IN_W, IN_C, OUT_H, OUT_W, OUT_C, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ACROSS, FLAT, WEIGHT,
    BIAS,
) = range(16)  # fmt: skip


@compiled(fastmath={"reassoc", "contract"})
def _add_rows(out: Any, weight: Any, rows: Any) -> None:
    """The rows of ``weight`` that fired, added to ``out``."""
    whole = rows.size // 4 * 4
    for i in range(0, whole, 4):
        w_a, w_b, w_c, w_d = weight[rows[i]], weight[rows[i + 1]], weight[rows[i + 2]], weight[rows[i + 3]]
        for j in range(out.size):
            out[j] += (w_a[j] + w_b[j]) + (w_c[j] + w_d[j])
    for i in range(whole, rows.size):
        w_a = weight[rows[i]]
        for j in range(out.size):
            out[j] += w_a[j]


@compiled()
def _add(out: Any, weight: Any) -> None:
    for j in range(out.size):
        out[j] += weight[j]


@compiled()
def _scatter(events: Any, row: Any, weight: Any, out: Any) -> None:
    """Spikes, as indices into a flat image (height, width, channels), through a synapse; added to ``out``."""
    one_pixel = row[IN_H] * row[IN_W] * row[OUT_H] * row[OUT_W] * row[KERNEL_H] * row[KERNEL_W] == 1
    if one_pixel and row[PAD_H] + row[PAD_W] == 0:
        _add_rows(out, weight, events)
        return
    channels = row[OUT_C]
    across = row[ACROSS]
    flat = weight.reshape(weight.size)
    for event in events:
        pixel, c = divmod(event, row[IN_C])
        y, x = divmod(pixel, row[IN_W])
        y, x = y + row[PAD_H], x + row[PAD_W]
        low_y, high_y = max(0, (y - row[KERNEL_H]) // row[STRIDE_H] + 1), min(row[OUT_H] - 1, y // row[STRIDE_H])
        low_x, high_x = max(0, (x - row[KERNEL_W]) // row[STRIDE_W] + 1), min(row[OUT_W] - 1, x // row[STRIDE_W])
        size = (high_x - low_x + 1) * channels
        if size <= 0:
            continue
        skipped, phase = divmod(x - low_x * row[STRIDE_W], row[STRIDE_W])
        for oy in range(low_y, high_y + 1):
            ky = y - oy * row[STRIDE_H]
            to = (oy * row[OUT_W] + low_x) * channels
            at = (((ky * row[STRIDE_W] + phase) * row[IN_C] + c) * across + across - 1 - skipped) * channels
            _add(out[to : to + size], flat[at : at + size])


@compiled()
def _fire(current: Any, carry: Any, events: Any, v: Any, leak: Any, reset: Any) -> int:
    """One micro-step of a LIF layer, on its carry; the neurons that fire into ``events``, their number back."""
    fired = 0
    zero = carry.dtype.type(0)
    for j in range(current.size):
        u = carry[j] + current[j]
        fires = u > v
        carry[j] = leak * u - (reset if fires else zero)
        events[fired] = j
        fired += fires
    return fired


@compiled()
def _channel_by_channel(events: Any, channels: int, pixels: int) -> None:
    """Indices into an image (pixels, channels), in place, as indices into (channels, pixels)."""
    for k in range(events.size):
        pixel, c = divmod(events[k], channels)
        events[k] = c * pixels + pixel


@compiled()
def _frames(
    current_0: Any, synapses: Any, lifs: Any, carries: Any, current_i: Any, events: Any, out: Any, steps: int
) -> None:
    """What the first synapse makes of a frame, ``current_0`` (batch, ...), -> ``out`` (batch, ...).

    ``synapses`` are those behind LIF layers. ``lifs`` holds the addresses of threshold and leak of the layers before
    them, and whether their reset leaks; ``carries`` the addresses of their carries (batch, ...), which are changed in
    place. The rest is scratch.
    """
    per_step = out.dtype.type(1) / out.dtype.type(steps)
    zero, one, least = out.dtype.type(0), out.dtype.type(1), out.dtype.type(MIN_THRESHOLD)
    for b in range(len(current_0)):
        total = out[b]
        total[:] = 0
        for _ in range(steps):
            current = current_0[b]
            for i in range(len(synapses)):
                carry = numba.carray(pointer(carries[i], per_step), (len(current_0), current.size))[b]
                v = numba.carray(pointer(lifs[i, 0], per_step), 1)[0]
                leak = numba.carray(pointer(lifs[i, 1], per_step), 1)[0]
                v = least if v < least else v  # as `bounded_threshold` and `bounded_leak`
                leak = zero if leak < zero else one if leak > one else leak
                fired = events[: _fire(current, carry, events, v, leak, v * leak if lifs[i, 2] else v)]
                row = synapses[i]
                if row[FLAT] > 1:
                    _channel_by_channel(fired, current.size // row[FLAT], row[FLAT])
                channels, pixels = row[OUT_C], row[OUT_H] * row[OUT_W]
                inputs = row[KERNEL_H] * row[STRIDE_W] * row[IN_C] * row[ACROSS]
                weight = numba.carray(pointer(row[WEIGHT], per_step), (inputs, channels))
                if i == len(synapses) - 1:
                    _scatter(fired, row, weight, total)
                    continue
                bias = numba.carray(pointer(row[BIAS], per_step), channels)
                current = current_i[: pixels * channels]
                for p in range(pixels):
                    for c in range(channels):
                        current[p * channels + c] = bias[c]
                _scatter(fired, row, weight, current)
        bias = numba.carray(pointer(synapses[-1, BIAS], per_step), total.size)
        for j in range(total.size):
            total[j] = total[j] * per_step + bias[j]


@compiled()
def _differ(a: Any, b: Any) -> int:
    """In how many numbers two arrays differ."""
    count = 0
    for j in range(a.size):
        count += a[j] != b[j]
    return count


class EventDriven:
    """Runs frames of a `SpikingNetwork` that is a chain: Linear or Conv2d, LIF, and so on, a Linear layer last.

    It acts by the weights as they are, however they were written. Biases, thresholds and leaks are read where they are
    stored. Weights are copied into another order, and compared with their copies before each frame. Behind
    convolutions, Linear layers are too large for that: their weights are stored column by column, and read there.

    Raises:
        ValueError: a network of another form.
    """

    def __init__(self, network: SpikingNetwork) -> None:
        self.network = network
        self.synapses = _chain(network)
        for before, synapse in pairwise(self.synapses):
            if isinstance(synapse, nn.Linear) and isinstance(before, nn.Conv2d):
                synapse.weight.data = synapse.weight.data.t().contiguous().t()
        self._modules = list(network.modules())
        self._owners = [
            (m._parameters, name) for m in self._modules for name, p in m._parameters.items() if p is not None
        ]
        self._waited = 0  # calls without a layout
        self._layout: _Layout | None = None

    def __reduce__(self) -> tuple[type[EventDriven], tuple[SpikingNetwork]]:
        return EventDriven, (self.network,)  # a copy lays out its own weights: addresses are not to be copied

    def ready(self) -> bool:
        """Whether the next frame is to run here: in single precision on the CPU, weights have rested, none watches."""
        if self.network.training:
            return False
        parameters = [of.get(name) for of, name in self._owners]
        layout = self._layout
        if layout is not None and not layout.holds(parameters):
            self._layout, self._waited = None, 0
        if self._layout is None:
            self._waited += 1
            if self._waited <= CALLS_BEFORE_LAYOUT or not all(p is not None and _fits(p) for p in parameters):
                return False
        return not any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)

    def __call__(
        self, x: Tensor, state: Sequence[np.ndarray] | None = None, episode_start: np.ndarray | None = None
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """One frame: ``x`` (batch, ...) -> output (batch, ...) and new state, as `SpikingNetwork.forward` has them.

        Where ``episode_start`` (batch,) is True, membranes are cleared before.
        """
        with torch.no_grad():  # the first synapse is dense, and PyTorch's
            first = self.synapses[0]
            current = first(x.flatten(1) if isinstance(first, nn.Linear) else x)
        batch = len(current)
        layout = self._layout  # read once: in another thread `ready` may drop it
        if layout is None:
            parameters = [of[name] for of, name in self._owners]
            layout = self._layout = _Layout(self.network, self.synapses[1:], parameters, current.shape[1:])
        current_0 = np.ascontiguousarray(_channels_last(current.numpy())).reshape(batch, -1)
        carries = [np.zeros((batch, *shape), np.float32) for shape in layout.carry_shapes]
        if state is not None:
            if len(state) != len(carries):
                raise ValueError(f"state must hold {len(carries)} carries, one per LIF layer, got {len(state)}")
            for i, (carry, before) in enumerate(zip(carries, state, strict=True)):
                if before.shape != _channels_first(carry).shape:
                    name, shape = list(self.network.lif_layers)[i], _channels_first(carry).shape
                    raise ValueError(f"the carry of {name!r} must have shape {shape}, got {before.shape}")
                _channels_first(carry)[...] = before
                if episode_start is not None:
                    carry[episode_start] = 0
        out = np.empty((batch, layout.outputs), np.float32)
        addresses = np.array([carry.ctypes.data for carry in carries])
        # scratch of its own: another thread may be in the midst of a frame
        scratch = np.empty(layout.neurons, np.float32), np.empty(layout.neurons, np.int64)
        _frames(current_0, layout.table, layout.lifs, addresses, *scratch, out, self.network.timesteps)
        return out, tuple(map(_channels_first, carries))


def _channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def _channels_first(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _by_column(weight: Tensor) -> bool:
    """Whether the weights of an input of a Linear layer lie side by side."""
    return weight.t().is_contiguous()


def _fits(parameter: Tensor) -> bool:
    """Whether a parameter is single precision on the CPU, in one of the orders that are read here."""
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return False
    by_column = parameter.dim() == 2 and _by_column(parameter)
    return parameter.is_contiguous() or by_column or _is_channels_last(parameter)


class _Layout:
    """The synapses behind LIF layers as `_frames` reads them: the weights of one input side by side."""

    def __init__(
        self,
        network: SpikingNetwork,
        synapses: list[nn.Linear | nn.Conv2d],
        parameters: Sequence[Tensor | None],
        shape: tuple[int, ...],
    ) -> None:
        """``shape``: of the first layer's current, (channels,) or (channels, height, width)."""
        # Of these parameters no other can come to have the memory, as long as they are kept here.
        self._parameters = [(parameter, _memory(parameter)) for parameter in parameters]
        self._kept: list[Any] = [None if p is None else p.detach() for p in parameters]  # what the table points at
        self._copied: list[tuple[np.ndarray, np.ndarray]] = []  # weights where they are stored, and as they were
        self.carry_shapes: list[tuple[int, ...]] = []
        rows = []
        channels, *image = shape
        for synapse in synapses:
            self.carry_shapes.append((*image, channels))
            weight = synapse.weight.detach()
            flat = 1
            if isinstance(synapse, nn.Linear):
                flat, (channels, image) = int(np.prod(image)), (weight.shape[1], [1, 1])
                kernel, stride, padding = (1, 1), (1, 1), (0, 0)
            else:
                kernel, stride, padding = weight.shape[2:], synapse.stride, synapse.padding  # type: ignore[assignment]
            sizes = zip(image, padding, kernel, stride, strict=True)
            out = [(size + 2 * pad - k) // step + 1 for size, pad, k, step in sizes]
            across = -(-kernel[1] // stride[1])
            if not (isinstance(synapse, nn.Linear) and _by_column(weight)):
                stored = _in_memory(weight)
                self._copied.append((stored, stored.copy()))
                weight = _by_input(weight.reshape(*weight.shape[:2], *kernel), stride[1], across)
            bias = weight.new_zeros(len(synapse.weight)) if synapse.bias is None else synapse.bias.detach()
            self._kept += [weight, bias]
            addresses = weight.data_ptr(), bias.data_ptr()
            rows.append((*image, channels, *out, len(bias), *kernel, *stride, *padding, across, flat, *addresses))
            channels, image = len(bias), [] if isinstance(synapse, nn.Linear) else out
        self.outputs = channels
        self.table = np.array(rows, np.int64)
        self.lifs = np.array(
            [
                (lif.raw_threshold.data_ptr(), lif.raw_leak.data_ptr(), lif.leak_reset)
                for lif in network.lif_layers.values()
            ],
            np.int64,
        )
        self.neurons = max(int(np.prod(shape)) for shape in self.carry_shapes)  # of the largest layer

    def holds(self, parameters: Sequence[Tensor | None]) -> bool:
        """Whether these are still the parameters, where they were, and the copied ones as they were."""
        for parameter, (before, memory) in zip(parameters, self._parameters, strict=True):
            if parameter is not before or _memory(parameter) != memory:
                return False
        return not any(_differ(stored, then) for stored, then in self._copied)


def _memory(parameter: Tensor | None) -> tuple[Any, ...]:
    """Where a parameter is, and in which order."""
    return () if parameter is None else (parameter.data_ptr(), parameter.shape, parameter.stride())


def _in_memory(weight: Tensor) -> np.ndarray:
    """A dense tensor as its memory holds it, flat."""
    return (weight.permute(0, 2, 3, 1) if _is_channels_last(weight) else weight).view(-1).numpy()


def _by_input(weight: Tensor, stride: int, across: int) -> Tensor:
    """Weights (outputs, inputs, height, width) as (height, stride, inputs, across, outputs).

    The neighbours of a line that an input reaches are ``stride`` columns of the kernel apart, from right to left: here
    they lie side by side in their own order, so that one run of additions serves them all.
    """
    weight = nn.functional.pad(weight, (0, across * stride - weight.shape[3]))
    outputs, inputs, height, _ = weight.shape
    by_phase = weight.view(outputs, inputs, height, across, stride).flip(3)
    return by_phase.permute(2, 4, 1, 3, 0).contiguous()


def _chain(network: SpikingNetwork) -> list[nn.Linear | nn.Conv2d]:
    """The synapses of a chain in which each but the last feeds a LIF layer, and each but the first is fed by one."""
    synapses: list[nn.Linear | nn.Conv2d] = []
    wants_lif = False
    previous: fx.Node | None = None
    for node in network.graph.graph.nodes:
        if previous is not None and (tuple(node.all_input_nodes) != (previous,) or len(previous.users) != 1):
            raise ValueError(f"event-driven inference runs chains, and {node.name!r} is part of a branch")
        previous = node
        module: Any = network.graph.get_submodule(node.target) if node.op == "call_module" else node.target
        if node.op in ("placeholder", "output") or isinstance(module, nn.Flatten | FrameDropout):
            fits = not (isinstance(module, FrameDropout) and network.training) and not (
                isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1)
            )
        elif module is torch.flatten:
            fits = tuple(node.args[1:]) == (1,) and not node.kwargs
        elif node.op == "call_module" and str(node.target) in network.lif_layers:
            fits, wants_lif = wants_lif, False
        else:
            fits, wants_lif = not wants_lif and _is_plain(module), True
            synapses.append(module)
        if not fits:
            raise ValueError(f"event-driven inference does not know the layer {node.name!r} where it stands")
    if len(synapses) != len(network.lif_layers) + 1 or not isinstance(synapses[-1], nn.Linear):
        raise ValueError("event-driven inference runs chains that end in a Linear layer behind the last LIF layer")
    return synapses


def _is_plain(module: Any) -> bool:
    if isinstance(module, nn.Conv2d):
        return (module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros") and not isinstance(
            module.padding, str
        )
    return isinstance(module, nn.Linear)
