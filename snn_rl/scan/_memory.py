"""Spikes are not kept for the backward pass: what a scan keeps is enough to compute them again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class SpikesRecomputed:
    """While `hooks` are on, a layer that saves spikes named by `add` for its backward pass saves where to get them.

    Memory is recognised by its storage, of which a weak reference is held, so that no other storage can take its place.
    """

    def __init__(self) -> None:
        self._sources: dict[int, tuple[StorageWeakRef, Any]] = {}

    def add(self, spikes: Tensor) -> None:
        """Remember the spikes of a LIF layer; without effect where no backward pass can come."""
        source = spikes.grad_fn
        if source is not None and hasattr(source, "spikes_again"):
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
