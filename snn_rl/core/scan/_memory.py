"""Spikes are not kept for the backward pass: what a scan keeps is enough to compute them again.

And once computed again, they are let go of as soon as their consumer has its weights' gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding, dilation


class SpikesRecomputed:
    """While `hooks` are on, a layer that saves spikes named by `add` for its backward pass saves where to get them.

    Memory is recognised by its storage, of which a weak reference is held, so that no other storage can take its place.
    """

    def __init__(self) -> None:
        self._sources: dict[int, tuple[StorageWeakRef, Any]] = {}

    def add(self, spikes: Tensor) -> None:
        """Remember the spikes of a LIF layer; without effect where no backward pass can come."""
        source = spikes.grad_fn
        # changed since, by a hook without gradients: what is computed again would be another tensor
        if source is not None and hasattr(source, "spikes_again") and spikes._version == 0:
            storage = spikes.untyped_storage()
            self._sources[storage._cdata] = StorageWeakRef(storage), source

    def hooks(self) -> AbstractContextManager[None]:
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, x: Tensor) -> Any:
        entry = self._sources.get(x.untyped_storage()._cdata)
        if entry is None:
            return x
        return entry[1], x.shape, x.stride(), x.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    source, *view = packed
    return source.spikes_again(source).as_strided(*view)


class SpikeConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` whose backward pass lets go of its input before it makes the gradient of that input.

    PyTorch's own holds both. Behind a LIF layer that has micro-steps, they are the largest tensors of a training step.
    """

    def forward(self, input: Tensor, let_go: bool = False) -> Tensor:
        """`torch.nn.Conv2d` where ``let_go`` is False, or where there is nothing to let go of."""
        ours = (
            let_go
            and torch.is_grad_enabled()
            and input.requires_grad
            and input.dim() == 4  # not a single image without a batch
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not torch.is_autocast_enabled(input.device.type)
        )
        if not ours:
            return super().forward(input)
        geometry = self.stride, self.padding, self.dilation
        return _Convolution.apply(input, self.weight, self.bias, geometry, self.groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups, ctx.shape = geometry, groups, x.shape
        return nn.functional.conv2d(x, weight, bias, *geometry, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # the forward pass has chosen the precision
            return _Convolution._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation = ctx.geometry
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x, weight = ctx.saved_tensors
        grad_weight = grad_bias = grad_x = None
        if needs_weight or needs_bias:
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, weight, [len(weight)], stride, padding, dilation, False, (0, 0), ctx.groups,
                (False, needs_weight, needs_bias),
            )  # fmt: skip
        del x
        if needs_x:
            left_over = [  # rows and columns of the input that the last stride does not reach
                size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
                for size, out, s, p, d, k in zip(
                    ctx.shape[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
                )
            ]
            grad_x = nn.functional.conv_transpose2d(
                grad, weight, None, stride, padding, left_over, ctx.groups, dilation
            )
        return grad_x, grad_weight, grad_bias, None, None
