"""Tensors of a checkpoint, through torch.distributed.checkpoint, in safetensors files: no pickle is on the disk.

The logical tensor `weight/layers.0.attn.q` is that parameter's row-major flattening, and a rank's part of it is one
interval. DCP calls such a part a chunk and cuts and joins chunks as a load asks, so any layout reads any other's.
A rank writes one file a kind of tensor. Which rank wrote which chunk is not read from the files' headers, which
would cost every rank as many opens as there are files: `Placement` of the saved layout tells.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megabus.checkpoint.contents import Found, shard_name, tensor_key, written_by
from megabus.checkpoint.manifest import Entry, Heartbeat, idle
from megabus.checkpoint.tensor_file import TensorFileWriter
from megabus.errors import UserError
from megabus.parallel.fragments import Fragments, Kind
from megabus.parallel.placement import Placement


def write_shards(
    folder: Path,
    placement: Placement,
    fragments: Fragments,
    kinds: tuple[Kind, ...],
    group: dist.ProcessGroup,
    heartbeat: Heartbeat = idle,
) -> dict[Path, str]:
    """Write this rank's part of the fragments (on the CPU). Collective over `group`. This rank's files, each with its
    digest.

    Raises OSError on all ranks where any of them cannot write.
    """
    rank = dist.get_rank()
    chunks = {
        tensor_key(kind, piece.name): _Chunk(fragments[piece][kind], piece.start, placement.numel(piece.name))
        for piece in written_by(placement, rank, fragments)
        for kind in kinds
    }
    writer = _Writer(folder, rank, kinds, heartbeat)
    try:
        save(chunks, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # DCP raises it on all ranks
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, OSError) for cause in causes):
            raise
        raise causes[0] from error
    return writer.written


def read_shards(found: Found, into: Fragments, alone: bool = False) -> None:
    """Fill `into` from a checkpoint, whatever layout it was saved under. Collective, unless `alone`.

    Raises `UserError` where a file is not what the manifest and the placement say.
    """
    chunks = {
        tensor_key(kind, piece.name): _Chunk(values, piece.start, found.placement.numel(piece.name))
        for piece, tensors in into.items()
        for kind, values in tensors.items()
    }
    reader = _Reader(found, list(chunks))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which `alone` says
            load(chunks, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        _, (cause, _) = next(iter(error.failures.items()))
        problem = f"cannot be read ({cause})"
        raise UserError("checkpoint", found.folder, problem, "restore it from another copy") from error


def files_by_rank(entries: Iterable[Entry]) -> dict[int, list[str]]:
    """The files of tensors that each rank wrote: one a kind, in the state's order, which is that of names."""
    files: dict[int, list[str]] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name.endswith(".safetensors"):
            files.setdefault(entry.rank, []).append(entry.name)
    return files


def _parts(key: str) -> tuple[Kind, str]:
    kind, _, name = key.partition("/")
    return kind, name


class _File(NamedTuple):
    """What DCP's reader asks of a chunk's place."""

    relative_path: str


class _Writer(HuggingFaceStorageWriter):
    """Writes a file a kind straight from the tensors, hashed on the way. DCP's own way copies the file in memory while
    it holds the interpreter's lock, which stops training for seconds a GB, and it opens GPU 0 from every rank."""

    def __init__(self, folder: Path, rank: int, kinds: tuple[Kind, ...], heartbeat: Heartbeat) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.own_rank, self.kinds, self.heartbeat = folder, rank, kinds, heartbeat
        self.written: dict[Path, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, kind in enumerate(self.kinds, 1):
            items = [item for item in plan.items if _parts(item.index.fqn)[0] == kind]
            if not items:
                continue
            path = self.folder / shard_name(self.own_rank, number, len(self.kinds))
            tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in items}
            offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in items}
            # The header by which DCP's own reader finds its way, without us.
            header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
            shapes = {key: tuple(values.shape) for key, values in tensors.items()}
            with TensorFileWriter(path, shapes, "float32", header, heartbeat=self.heartbeat) as file:
                for key, values in tensors.items():
                    file.write(key, values)
            self.written[path] = file.digest
            results += [WriteResult(item.index, tensors[item.index.fqn].nbytes, _File(str(path))) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Reader(HuggingFaceStorageReader):
    """Knows from the placement which file holds which chunk."""

    def __init__(self, found: Found, keys: list[str]) -> None:
        super().__init__(str(found.folder))
        self.folder, self.saved, self.keys = found.folder, found.placement, keys
        self.files, self.kinds = files_by_rank(found.entries), found.state.kinds

    def read_metadata(self) -> Metadata:
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, _File] = {}
        for key in self.keys:
            kind, name = _parts(key)
            total, chunks = torch.Size((self.saved.numel(name),)), []
            for rank, piece in self.saved.owners(name, 0, self.saved.numel(name), tp=0):
                start, length = torch.Size((piece.start,)), torch.Size((len(piece),))
                file = self.folder / self.files[rank][self.kinds.index(kind)]
                chunks.append(ChunkStorageMetadata(start, length))
                storage[MetadataIndex(key, start)] = _File(str(file))
            tensors[key] = TensorStorageMetadata(TensorProperties(torch.float32), total, chunks)
        return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))


class _Chunk(Tensor):
    """An interval of a long 1-D tensor, in DCP's protocol: it looks like the whole, and holds the part."""

    start: int
    local: Tensor

    @staticmethod
    def __new__(cls, local: Tensor, start: int, total: int) -> _Chunk:
        chunk = Tensor._make_wrapper_subclass(cls, (total,), dtype=local.dtype, device=local.device)
        chunk.local, chunk.start = local, start
        return chunk

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} on a chunk of a checkpoint")

    def _bounds(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size((self.start,)), torch.Size((self.local.numel(),)))

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=self._bounds(), properties=properties, size=self.size())
        return [WriteItem(MetadataIndex(key, torch.Size((self.start,))), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._bounds()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local
