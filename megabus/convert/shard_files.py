"""Megatron-style shard files: `mp_rank_XX_YYY.safetensors`, XX the tensor- and YYY the pipeline-parallel rank.

Each file holds what that rank computes with, in its local shape: the rows that tensor parallelism gives it of every
parameter of its layers, whole where it is replicated. `index.json` tells each tensor's axes and logical shape, and
which rows [start, stop) lie in which files; `manifest.json` has every file's digest. Data parallelism leaves no trace.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from megabus.checkpoint.contents import (
    check_fits,
    check_header,
    check_tokenizer,
    listed,
    listed_tokenizer,
    tensor_key,
)
from megabus.checkpoint.entries import odd_entry
from megabus.checkpoint.manifest import (
    STATE,
    STRICT,
    THREADS,
    DamagedError,
    Entry,
    check_file,
    check_size,
    read_manifest,
    reading,
    settle,
    validated,
    write_manifest,
)
from megabus.checkpoint.relations import Length, Whole
from megabus.checkpoint.state import read_state, write_state
from megabus.checkpoint.tensor_file import TensorFileWriter
from megabus.config import Layout
from megabus.convert.checks import Checks
from megabus.convert.source import OpenFiles, Source, blocks
from megabus.data.tokenizer import read_tokenizer_files
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape, shard_rows
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Placement
from megabus.plain_file import parse_json, read_regular, shown

INDEX = "index.json"
FORMAT = "megabus shard files 1"
AGAIN = "convert them again"
_FILE = re.compile(r"mp_rank_\d{2,9}_\d{3,9}\.safetensors")


def file_name(tp: int, pp: int) -> str:
    return f"mp_rank_{tp:02d}_{pp:03d}.safetensors"


def write_shard_files(source: Source, out: Path, tp: int, pp: int) -> None:
    """Fill the empty directory `out`."""
    state = replace(source.state, layout=Layout(tp, pp, 1))
    model, placement = state.model, Placement(state.model, state.layout)
    tensors: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for pp_rank in range(pp):
        names = [name for name in placement.specs if placement.pp_rank(name) == pp_rank]
        keys = [(kind, name) for name in names for kind in state.kinds]
        for tp_rank in range(tp):
            rows = {name: shard_rows(placement.specs[name], model, tp, tp_rank) for name in names}
            shapes = {
                tensor_key(kind, name): (
                    rows[name][1] - rows[name][0],
                    *global_shape(placement.specs[name], model)[1:],
                )
                for kind, name in keys
            }
            with TensorFileWriter(out / file_name(tp_rank, pp_rank), shapes, "float32") as file:
                for kind, name in keys:
                    (first, last), width = rows[name], placement.width(name)
                    for start, stop in blocks(first * width, last * width):
                        file.write(tensor_key(kind, name), source.read(kind, name, start, stop), start - first * width)
                    spec = placement.specs[name]
                    facts = {"axes": spec.axes, "shape": global_shape(spec, model), "shards": []}
                    entry = tensors.setdefault(tensor_key(kind, name), facts)
                    entry["shards"].append({"file": file_name(tp_rank, pp_rank), "rows": [first, last]})
            digests[file.path.name] = file.digest
    write_state(out, state)
    if source.tokenizer is not None:
        read_tokenizer_files(source.tokenizer).write(out)
    tree = {"format": FORMAT, "tp": tp, "pp": pp, "tensors": tensors}
    (out / INDEX).write_text(json.dumps(tree, indent=1), encoding="utf-8")
    with ThreadPoolExecutor(THREADS) as pool:
        settled = [pool.submit(settle, path, 0, digest=digests.get(path.name)) for path in sorted(out.iterdir())]
        write_manifest(out, [each.result() for each in settled])


class _Part(BaseModel):
    """The rows [first, last) that lie in a file."""

    model_config = STRICT
    file: str
    rows: tuple[Whole, Whole]


class _Tensor(BaseModel):
    model_config = STRICT
    axes: list[str]
    shape: list[Whole]
    shards: list[_Part]


class _Index(BaseModel):
    model_config = STRICT
    format: str
    tp: Length
    pp: Length
    tensors: dict[str, _Tensor]


_INDEX: TypeAdapter[_Index] = TypeAdapter(_Index)
_Shapes = dict[str, tuple[int, ...]]


def _check(folder: Path, entry: Entry, tensors: _Shapes | None) -> None:
    """Raise `DamagedError` unless a file has the manifest's bytes, and the index's tensors if that names it."""
    check_file(folder, entry)
    if tensors is not None:
        check_header(folder / entry.name, tensors)


class ShardFileSource:
    """A directory of shard files; only its index says where rows lie."""

    def __init__(self, folder: Path, files: OpenFiles, checks: Checks, with_tokenizer: bool = True) -> None:
        self.folder, self.files = folder, files
        entries = read_manifest(folder)
        for entry in entries:
            check_size(folder, entry) if _FILE.fullmatch(entry.name) else check_file(folder, entry)
        for name in (INDEX, STATE):
            listed(folder, entries, name)
        self.state = read_state(folder)
        check_fits(folder, self.state, sum(entry.bytes for entry in entries))
        self.tensors, held = self._checked_index({entry.name for entry in entries})
        for entry in entries:
            if _FILE.fullmatch(entry.name):
                checks.submit(_check, folder, entry, held.get(entry.name))
        self.tokenizer = None
        if with_tokenizer:
            self.tokenizer = listed_tokenizer(folder, entries)
            check_tokenizer(folder, entries, self.state, AGAIN)

    def _checked_index(self, names: set[str]) -> tuple[dict[str, _Tensor], dict[str, _Shapes]]:
        """The index, once it is found to say what the state says, and the tensors that its files then hold."""
        path = self.folder / INDEX
        with reading(path):
            raw = read_regular(path)
        try:
            tree = parse_json(raw)
        except ValueError as error:
            raise DamagedError(path, f"is damaged (it is not JSON as it is saved: {error})", AGAIN) from error
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise UserError("shard files", path, f"have another form than {FORMAT!r}", AGAIN)
        index = validated(_INDEX, tree, path)
        specs = param_specs(self.state.model)
        shapes = {
            tensor_key(kind, name): global_shape(spec, self.state.model)
            for name, spec in specs.items()
            for kind in self.state.kinds
        }
        if odd := sorted(shapes.keys() ^ index.tensors.keys()):
            raise DamagedError(path, f"is damaged ({shown(odd[0])} is not both in it and in {STATE})", AGAIN)
        held: dict[str, _Shapes] = {}
        for key, shape in shapes.items():
            tensor = index.tensors[key]
            if tuple(tensor.shape) != shape:
                raise DamagedError(
                    path, f"is damaged (tensors.{key}.shape = {tensor.shape}: {STATE} says {shape})", AGAIN
                )
            bounds = sorted({part.rows for part in tensor.shards})  # replicas have the same
            starts, stops = [0, *(stop for _, stop in bounds)], [*(start for start, _ in bounds), shape[0]]
            if starts != stops or any(start >= stop for start, stop in bounds):
                raise DamagedError(path, f"is damaged (has gaps or overlaps in {key})", AGAIN)
            for part in tensor.shards:
                if part.file not in names or not _FILE.fullmatch(part.file):
                    how = f"is damaged (tensors.{key}.shards: {shown(part.file)} is not listed)"
                    raise DamagedError(path, how, AGAIN)
                if key in held.setdefault(part.file, {}):
                    raise DamagedError(path, f"is damaged (tensors.{key}.shards: {part.file} stands twice)", AGAIN)
                held[part.file][key] = (part.rows[1] - part.rows[0], *shape[1:])
        return index.tensors, held

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        key, parts = tensor_key(kind, name), []
        tensor = self.tensors[key]
        width = tensor.shape[1] if len(tensor.shape) > 1 else 1
        # Of replicas one; their rows follow one another.
        for (first, last), file in sorted({part.rows: part.file for part in tensor.shards}.items()):
            low, high = max(start, first * width), min(stop, last * width)
            if low < high:
                top, bottom = low // width, -(-high // width)
                rows = self.files[self.folder / file].get_slice(key)[top - first : bottom - first]
                values = rows.reshape(-1)[low - top * width : high - top * width]
                if (odd := odd_entry(kind, values)) is not None:
                    raise DamagedError(self.folder / file, f"is damaged ({key} holds {odd})", AGAIN)
                parts.append(values)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
