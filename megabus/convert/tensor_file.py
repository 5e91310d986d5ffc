"""safetensors files that are read and written a slice at a time, so that memory holds one slice and not a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megabus.convert.dtypes import CODES

DTYPES: dict[str, tuple[str, torch.dtype]] = {name: (code, getattr(torch, name)) for name, code in CODES.items()}
ALIGNMENT = 8  # of the first tensor, as the format's own writer does it


class TensorFileWriter:
    """A new safetensors file; every tensor's shape is known at the start, its entries come in any order.

    shapes: name -> shape, in the order in which they lie in the file. dtype: a key of DTYPES, of all tensors.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        code, self.dtype = DTYPES[dtype]
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self.starts: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
            self.starts[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.path, self.nbytes = path, end
        self._base = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._base + end)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Put values at entry `start` of a tensor's row-major flattening."""
        flat = values.detach().to(self.dtype).contiguous().reshape(-1)
        self._file.seek(self._base + self.starts[name] + start * self.dtype.itemsize)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
