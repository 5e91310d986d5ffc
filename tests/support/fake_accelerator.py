"""The GPU of shapes as DeepSpeed sees it: an accelerator whose streams run beside the CPU, as CUDA's do."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from typing import Any

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from tests.support.fake_gpu import Watch, place

EVENTS: weakref.WeakSet[Event] = weakref.WeakSet()  # that somebody still holds
RESETS: Counter[str] = Counter()  # of peak-memory counters, by place


def _wait(how: str) -> None:
    if Watch.now is not None:
        Watch.now.wait(how)


class Event:
    def __init__(self, **_: Any) -> None:
        EVENTS.add(self)

    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("event.synchronize")

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Stream) -> None: ...
    def wait_event(self, _: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        _wait("stream.synchronize")


def _new(dtype: torch.dtype) -> Any:
    return property(lambda _: functools.partial(torch.tensor, dtype=dtype, device="gpu"))


class Accelerator(CPU_Accelerator):
    Stream, Event = Stream, Event
    ByteTensor, IntTensor, LongTensor = _new(torch.uint8), _new(torch.int), _new(torch.long)
    HalfTensor, BFloat16Tensor = _new(torch.half), _new(torch.bfloat16)
    FloatTensor, DoubleTensor = _new(torch.float), _new(torch.double)

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = "gpu", "fake"

    # DeepSpeed takes other paths on a device that computes while it is asked.
    def is_synchronized_device(self) -> bool:
        return False

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def device_name(self, device_index: int | None = None) -> str:
        return "gpu" if device_index is None else f"gpu:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("gpu", device_index or 0)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return "gpu:0"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None:
        _wait("synchronize")

    def stream(self, stream: Stream) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> Stream:
        return Stream()

    default_stream = current_stream

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == "gpu"

    def is_available(self) -> bool:
        return True

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        RESETS[place()] += 1

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def install() -> None:
    """Let this process's DeepSpeed compute on the GPU of shapes."""
    real_accelerator.set_accelerator(Accelerator())
