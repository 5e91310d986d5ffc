"""Where logical tensors are read from, by name and interval, whatever files hold them.

Every form that weights come in is a `Source`; every form they are written in takes one. So each converts to each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabus.checkpoint.contents import Found, listed_tokenizer, tensor_key
from megabus.checkpoint.shards import files_by_rank
from megabus.checkpoint.state import SavedState
from megabus.errors import UserError
from megabus.model.params import global_shape
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Placement
from megabus.plain_file import NotPlainError, check_regular


class HasState(Protocol):
    """What says which model it is."""

    @property
    def state(self) -> SavedState: ...


class Source(Protocol):
    """state: the model and all else that goes with it; tokenizer: its file or directory, if there is one."""

    state: SavedState
    tokenizer: Path | None

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of a parameter's row-major flattening, fp32, (stop - start,). Not to be written to: it
        may be the file itself, mapped."""


class FolderSource(Source, Protocol):
    """One that lies in a directory."""

    folder: Path


def whole(source: Source, name: str) -> Tensor:
    """A parameter's weight in its logical shape."""
    placement = Placement(source.state.model, source.state.layout)
    values = source.read("weight", name, 0, placement.numel(name))
    return values.view(global_shape(placement.specs[name], source.state.model))


BLOCK = 1 << 21  # entries copied or compared at once: small enough that the allocator reuses their memory


def blocks(start: int, stop: int, width: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) in pieces of about BLOCK entries, all but the last a multiple of `width`."""
    step = max(1, BLOCK // width) * width
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


class OpenFiles:
    """safetensors files by path, opened when they are first read (that maps them, and loads nothing)."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __getitem__(self, path: Path) -> Any:
        if path not in self._files:
            try:
                check_regular(path, links=True)  # the hub's cache holds links
                self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, NotPlainError, SafetensorError) as error:
                problem = f"cannot be read ({error})"
                raise UserError("source", path, problem, "restore it from another copy") from error
        return self._files[path]

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()


class CheckpointSource:
    """A checkpoint, of which nothing that its tensors hold has been checked yet (see `opened`)."""

    def __init__(self, found: Found, files: OpenFiles, with_tokenizer: bool = True) -> None:
        self.folder, self.files, self.state, self.placement = found.folder, files, found.state, found.placement
        self.names, self.kinds = files_by_rank(found.entries), found.state.kinds
        for name in (name for names in self.names.values() for name in names):
            self.files[self.folder / name]  # open from here on: a run that goes on may remove it
        self.tokenizer = listed_tokenizer(self.folder, found.entries) if with_tokenizer else None

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        parts = []
        for rank, part in self.placement.owners(name, start, stop, tp=0):
            chunk = self.placement.share(name, rank)
            file = self.files[self.folder / self.names[rank][self.kinds.index(kind)]]
            parts.append(file.get_slice(tensor_key(kind, name))[part.start - chunk.start : part.stop - chunk.start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # one is the file itself, mapped: nothing is copied
