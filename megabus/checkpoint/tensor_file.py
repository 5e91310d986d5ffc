"""safetensors files that are written a slice at a time: memory holds some slices and not a file.

Hashing takes half of the time of writing, and the disk longer than the page cache, so threads do both while the next
slice is read: whoever writes a file has its digest when it is written, and does not read it again.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megabus.checkpoint.digests import Digest
from megabus.checkpoint.dtypes import CODES
from megabus.checkpoint.manifest import Heartbeat, idle

DTYPES: dict[str, tuple[str, torch.dtype]] = {name: (code, getattr(torch, name)) for name, code in CODES.items()}
ALIGNMENT = 8  # of the first tensor, as the format's own writer does it
SLICE = 1 << 23  # bytes that are hashed and written at once
AHEAD = 4  # slices that may be written and not hashed yet
UNSYNCED = 1 << 26  # bytes written until the disk is asked for those that it has not


class TensorFileWriter:
    """A new safetensors file. Every tensor's shape is known at the start, and its entries come in the order in which
    they lie in the file.

    shapes: name -> shape, in that order. dtype: a key of DTYPES, of all tensors. hashed: whether `digest` is wanted.
    heartbeat: called whenever some of it is written. The file is synced by whoever makes it durable (`settle`).
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        metadata: Mapping[str, str] | None = None,
        hashed: bool = True,
        heartbeat: Heartbeat = idle,
    ) -> None:
        code, self.dtype = DTYPES[dtype]
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._starts: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.path, self.nbytes = path, end
        self._at, self._synced = 0, 0
        self._digest, self._hashed = Digest(), hashed
        self._heartbeat = heartbeat
        self._ahead: deque[Future[object]] = deque()
        self._sync: Future[None] | None = None
        self._file = path.open("wb")
        self._hashing, self._disk = (ThreadPoolExecutor(1, f"{what} {path.name}") for what in ("hash", "sync"))
        head = struct.pack("<Q", len(text)) + text
        self._file.write(head)
        self._digest.update(head)

    @property
    def digest(self) -> str:
        """Of the whole file, once it is closed."""
        assert self._hashed
        assert self._file.closed
        return self._digest.text

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Put values at entry `start` of a tensor's row-major flattening. They must not change until the file is
        closed."""
        at = self._starts[name] + start * self.dtype.itemsize
        if at != self._at:
            raise ValueError(f"{name} from entry {start} on is not what comes next in {self.path}")
        flat = values.detach().to(self.dtype).contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().data
        for first in range(0, len(raw), SLICE):
            self._put(raw[first : first + SLICE])

    def _put(self, part: memoryview) -> None:
        while len(self._ahead) >= AHEAD:
            self._ahead.popleft().result()
        if self._hashed:
            self._ahead.append(self._hashing.submit(self._digest.update, part))
        self._file.write(part)
        self._at += len(part)
        if self._at - self._synced >= UNSYNCED and (self._sync is None or self._sync.done()):
            self._end_sync()
            self._synced = self._at
            self._sync = self._disk.submit(os.fdatasync, self._file.fileno())
        self._heartbeat()

    def _end_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()  # where the disk is full, or broken

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._hashing.shutdown()
            self._disk.shutdown()  # before the file's descriptor is another's
        finally:
            self._file.close()
        if kind is not None:
            return
        for each in self._ahead:
            each.result()
        self._end_sync()
        if self._at != self.nbytes:
            raise ValueError(f"{self.path} has {self._at} of its {self.nbytes} bytes")
