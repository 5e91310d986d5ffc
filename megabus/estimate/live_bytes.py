"""Bytes of the tensors that a piece of code holds at a time, and bytes that it moves."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
NOTHING = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations read or make, from their first use until they are freed: `now`, and the `peak`
    since it was last set.

    known: tensors that were there before, not to be counted. device: the kind of device whose tensors count; those of
    `meta` take nothing, and have the sizes of what they stand for. Scratch memory inside an operation is not seen.
    moved: what operations have read and written, products of matrices and views aside: each reads its arguments from
    memory and writes its result there, as kernels do that come one after the other.
    """

    def __init__(self, known: Iterable[Tensor] = (), device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = self.moved = 0
        self.device = device
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's switch for a decorator of `__torch_dispatch__` that imports its compiler, a second of every start."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_iter((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        tensors = [tensor for tensor in tensors if tensor.device.type == self.device]
        for tensor in tensors:
            self.count(tensor)
        if not function.is_view and function.overloadpacket.__name__ not in (*PRODUCTS, *NOTHING):
            self.move(tensors)
        return found

    def move(self, tensors: Iterable[Tensor]) -> None:
        """An operation has read or written these."""
        for tensor in tensors:
            self.moved += min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

    def count(self, tensor: Tensor) -> None:
        """Count a tensor from now on, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
