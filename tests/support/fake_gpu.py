"""A GPU of shapes: a device that is not the CPU, whose tensors have no entries. No GPU, no CUDA, no compiler.

PyTorch's spare device type (PrivateUse1) under the name `gpu`, with a guard that does nothing, so that autograd takes
it; FakeTensorMode, which runs operations on shapes, and refuses tensors of several devices and operations whose shapes
depend on values (nonzero, masks), which would wait; and `Watch`, which sees every operation. What it cannot see:
values, Triton, NCCL, which attention kernels PyTorch takes.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

READ = 0.5  # what any entry reads as
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # which copy indices of the CPU, and wait
VIEWS = "view _unsafe_view t transpose expand slice select unsqueeze squeeze permute detach alias as_strided split \
split_with_sizes chunk narrow _reshape_alias unbind unfold diagonal reshape"
NOTHING = (
    "lift_fresh lift empty empty_like new_empty empty_strided new_empty_strided set_ is_same_size resize_ is_pinned \
scalar_tensor"
)
NO_KERNEL = frozenset(f"{VIEWS} {NOTHING}".split())


class FakeGpu(FakeTensorMode):
    avoid_device_init = True  # else torch.tensor(..., device="gpu") would ask for a real one

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks of torch.gpu; recomputation asks for a dtype of autocast."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def make_gpu() -> None:
    """Give this process the device `gpu`, for good: call it in a fork."""
    _setup_privateuseone_for_python_backend("gpu", backend_module=_Backend())
    nn.Module._apply = _apply
    torch.Tensor.tolist = FakeTensor.tolist = _tolist
    torch.Tensor.pin_memory = lambda x, *_: _pinned(x)
    F.scaled_dot_product_attention = _Attention.call
    torch.autograd.set_multithreading_enabled(False)  # a dispatch mode is its thread's own


def place() -> str:
    """The function of megabus or DeepSpeed that computes: file:function."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for package in ("/megabus/", "/deepspeed/"):
            if package in name:
                return f"{package[1:]}{name.rsplit(package, 1)[1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "tests"


class Watch(TorchDispatchMode):
    """What a GPU would be asked for.

    kernels: launches by operation. bytes: that they read and write. waits: what makes the CPU wait until the GPU has
    done all that is queued, by (how, place). messages: collectives and p2p in the order of calls. quadratic: calls of
    attention that PyTorch answers with a kernel that holds all scores.
    """

    now: Watch | None = None

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.bytes_by: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.messages: list[tuple[Any, ...]] = []
        self.quadratic = 0

    def __enter__(self) -> Watch:
        Watch.now = self
        return super().__enter__()

    def wait(self, how: str) -> None:
        self.waits[how, place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "c10d"):  # a question, such as for a tensor's device
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device.type == "gpu":
            self.wait("item")
            return _scalar(args[0])
        if func.namespace == "c10d":
            self._message(name, args)
        pinned = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if pinned:
            _PINNED.add(out.untyped_storage())
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        devices = {x.device.type for x in (*inputs, *outputs)}
        if name in ("_to_copy", "copy_") and devices == {"cpu", "gpu"}:
            self._copy(args, kwargs, inputs, outputs)
        elif name in INDEXED and "gpu" in devices and any(i is not None and i.device.type == "cpu" for i in args[1]):
            self.wait("copy of indices")
        if "gpu" in devices and name not in NO_KERNEL and func.namespace != "c10d":
            self.count(name, [x for x in (*inputs, *outputs) if x.device.type == "gpu"])
        return out

    def count(self, name: str, tensors: list[Tensor]) -> None:
        """A kernel that reads or writes these."""
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        self.kernels[name] += 1
        self.bytes += moved
        self.bytes_by[name] += moved

    def _copy(self, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        to_gpu = outputs[0].device.type == "gpu"
        host = inputs[-1] if to_gpu else outputs[0]
        if not (asynchronous and any(host.untyped_storage()._cdata == storage._cdata for storage in _PINNED)):
            self.wait("copy to GPU" if to_gpu else "copy to CPU")

    def _message(self, name: str, args: Any) -> None:
        tensors = [x for x in tree_iter(args) if isinstance(x, Tensor)]
        numbers = tuple(x for x in args if isinstance(x, int))
        self.messages.append((name, sum(x.numel() for x in tensors), *numbers))


def _scalar(x: Tensor) -> Any:
    return False if x.dtype == torch.bool else READ if x.dtype.is_floating_point else int(READ)


_own_tolist = torch.Tensor.tolist


def _tolist(x: Tensor) -> Any:
    """One copy and one wait, as on a GPU; torch would read fake tensors entry by entry."""
    if x.device.type != "gpu":
        return _own_tolist(x)
    assert Watch.now is not None
    Watch.now.wait("tolist")

    def nested(shape: tuple[int, ...]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else _scalar(x)

    return nested(tuple(x.shape))


_PINNED: set[torch.UntypedStorage] = set()  # for good: of what is gone another could take the address


def _pinned(x: Tensor) -> Tensor:
    copy = x.clone()
    _PINNED.add(copy.untyped_storage())
    return copy


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which would swap fake tensors; a weak reference to them forbids that."""
    for child in self.children():
        child._apply(fn)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                moved = fn(parameter)
            if moved is not parameter:
                parameter.data = moved
                if isinstance(parameter, FakeTensor):
                    parameter.fake_device = moved.fake_device
    return self


class _Attention(torch.autograd.Function):
    """A kernel that never holds the scores: q, k, v, the result and a logarithm a query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        _Attention.count(q, k, v, y)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        found = tuple(map(torch.empty_like, saved[:3]))
        _Attention.count(*saved, *grads, *found)
        return found

    @staticmethod
    def count(*tensors: Tensor) -> None:
        assert Watch.now is not None
        Watch.now.count("attention", list(tensors))

    @staticmethod
    def call(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        if enable_gqa and query.dtype == torch.float32 and Watch.now is not None:
            Watch.now.quadratic += 1
        return _Attention.apply(query, key, value)


@contextlib.contextmanager
def on_fake_gpu() -> Iterator[Watch]:
    with FakeGpu(), Watch() as watch:
        yield watch
