"""Event-driven inference: a frame of a chain of layers in which only spikes cost anything. For acting on the CPU.

Played one frame at a time, a small network spends its time in calls and in reading weights that are multiplied by zero.
Here all layers and micro-steps of a frame are one compiled call, and a synapse adds up the weights of those neurons
that fired: with a tenth of them firing, a tenth of the weights is read. These are the sums of `SpikingNetwork`, taken
in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from snn_rl.network import FrameDropout, SpikingNetwork
from snn_rl.neuron import LIF
from snn_rl.scan._cpu import compiled, pointer

# Weights are laid out anew after a change, which takes as long as some frames do: not while they are being trained.
CALLS_BEFORE_LAYOUT = 8

# A synapse is a row of integers: the shapes of its images (height, width, channels), its kernel, and where its weights
# and biases lie. To a Linear layer the image is one pixel. ACROSS is how many outputs of a line an input reaches.
(
    IN_H, IN_W, IN_C, OUT_H, OUT_W, OUT_C, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ACROSS, WEIGHT, BIAS,
) = range(15)  # fmt: skip


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
def _frames(
    current_0: Any, synapses: Any, lifs: Any, carries: Any, current_i: Any, events: Any, out: Any, steps: int
) -> None:
    """What the first synapse makes of a frame, ``current_0`` (batch, ...), -> ``out`` (batch, ...).

    ``synapses`` are those behind LIF layers, ``lifs`` the threshold, leak and reset of the layers before them,
    ``carries`` the addresses of their carries (batch, ...), which are changed in place. The rest is scratch.
    """
    per_step = out.dtype.type(1) / out.dtype.type(steps)
    for b in range(len(current_0)):
        total = out[b]
        total[:] = 0
        for _ in range(steps):
            current = current_0[b]
            for i in range(len(synapses)):
                carry = numba.carray(pointer(carries[i], per_step), (len(current_0), current.size))[b]
                fired = events[: _fire(current, carry, events, lifs[i, 0], lifs[i, 1], lifs[i, 2])]
                row = synapses[i]
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


def _count_as_changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused optimisers change parameters without counting it in their versions, by which `EventDriven` knows of it."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_as_changed)


class EventDriven:
    """Runs frames of a `SpikingNetwork` that is a chain: Linear or Conv2d, LIF, and so on, a Linear layer last.

    Parameters changed through ``.data`` are seen once the network was in training mode, all other changes at once.

    Raises:
        ValueError: a network of another form.
    """

    def __init__(self, network: SpikingNetwork) -> None:
        self.network = network
        self.synapses = _chain(network)
        self._modules = list(network.modules())
        self._owners = [
            (m._parameters, name) for m in self._modules for name, p in m._parameters.items() if p is not None
        ]
        self._seen: list[Any] = []  # the parameters of this version, so that no others can have their identities
        self._version: list[tuple[int, int, int]] = []
        self._calls = 0  # at this version of the parameters
        self._layout: _Layout | None = None

    def __reduce__(self) -> tuple[type[EventDriven], tuple[SpikingNetwork]]:
        return EventDriven, (self.network,)  # a copy lays out its own weights: addresses are not to be copied

    def ready(self) -> bool:
        """Whether the next frame is to run here: in single precision on the CPU, weights have rested, none watches."""
        if self.network.training:
            self._version, self._layout = [], None
            return False
        parameters = [of[name] for of, name in self._owners]
        try:
            version = [(id(p), p.data_ptr(), p._version) for p in parameters]  # type: ignore[union-attr]
        except RuntimeError:  # tensors of inference mode have no version
            return False
        if version != self._version:
            self._seen, self._version, self._calls, self._layout = parameters, version, 0, None
            self._fits = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)  # type: ignore[union-attr]
        self._calls += 1
        if not self._fits or self._calls <= CALLS_BEFORE_LAYOUT:
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
            layout = self._layout = _Layout(self.network, self.synapses[1:], current.shape[1:])
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


class _Layout:
    """The synapses behind LIF layers as `_frames` reads them: the weights of one input side by side."""

    def __init__(self, network: SpikingNetwork, synapses: list[nn.Linear | nn.Conv2d], shape: tuple[int, ...]) -> None:
        """``shape``: of the first layer's current, (channels,) or (channels, height, width)."""
        self.arrays: list[np.ndarray] = []  # what the table points at
        self.carry_shapes: list[tuple[int, ...]] = []
        rows = []
        channels, *image = shape
        for synapse in synapses:
            self.carry_shapes.append((*image, channels))
            weight = synapse.weight.detach()
            if isinstance(synapse, nn.Linear):  # its inputs are flat (channels, height, width), here channels are last
                weight = weight.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)[:, :, None, None]
                channels, image = weight.shape[1], [1, 1]
                stride, padding = (1, 1), (0, 0)
            else:
                stride, padding = synapse.stride, synapse.padding  # type: ignore[assignment]
            out_channels, _, *kernel = weight.shape
            sizes = zip(image, padding, kernel, stride, strict=True)
            out = [(size + 2 * pad - k) // step + 1 for size, pad, k, step in sizes]
            across = -(-kernel[1] // stride[1])
            by_input = _by_input(weight, stride[1], across)
            bias = np.zeros(out_channels, np.float32) if synapse.bias is None else synapse.bias.detach().numpy().copy()
            self.arrays += [by_input, bias]
            addresses = by_input.ctypes.data, bias.ctypes.data
            rows.append((*image, channels, *out, out_channels, *kernel, *stride, *padding, across, *addresses))
            channels, image = out_channels, [] if isinstance(synapse, nn.Linear) else out
        self.outputs = channels
        self.table = np.array(rows, np.int64)
        self.lifs = np.array([_constants(lif) for lif in network.lif_layers.values()], np.float32)
        self.neurons = max(int(np.prod(shape)) for shape in self.carry_shapes)  # of the largest layer


def _by_input(weight: Tensor, stride: int, across: int) -> np.ndarray:
    """Weights (outputs, inputs, height, width) as (height, stride, inputs, across, outputs).

    The neighbours of a line that an input reaches are ``stride`` columns of the kernel apart, from right to left: here
    they lie side by side in their own order, so that one run of additions serves them all.
    """
    weight = nn.functional.pad(weight, (0, across * stride - weight.shape[3]))
    outputs, inputs, height, _ = weight.shape
    by_phase = weight.view(outputs, inputs, height, across, stride).flip(3)
    return by_phase.permute(2, 4, 1, 3, 0).contiguous().numpy()


def _constants(lif: LIF) -> tuple[float, float, float]:
    v, leak = lif.threshold.item(), lif.leak.item()
    return v, leak, v * leak if lif.leak_reset else v


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
