"""Megatron-style shard files: `mp_rank_XX_YYY.safetensors`, XX the tensor- and YYY the pipeline-parallel rank.

Each file holds what that rank computes with, in its local shape: the rows that tensor parallelism gives it of every
parameter of its layers, whole where it is replicated. `index.json` tells each tensor's axes and logical shape, and
which rows [start, stop) lie in which files; `manifest.json` has every file's SHA-256. Data parallelism leaves no trace.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabus.checkpoint.manifest import THREADS, check_files, read_manifest, settle, write_manifest
from megabus.checkpoint.save import TOKENIZER
from megabus.checkpoint.shards import tensor_key
from megabus.checkpoint.state import read_state, write_state
from megabus.config import Layout
from megabus.convert.source import OpenFiles, Source, blocks, tokenizer_beside
from megabus.convert.tensor_file import TensorFileWriter
from megabus.errors import UserError
from megabus.model.params import global_shape, shard_rows
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Placement

INDEX = "index.json"
FORMAT = "megabus shard files 1"


def file_name(tp: int, pp: int) -> str:
    return f"mp_rank_{tp:02d}_{pp:03d}.safetensors"


def write_shard_files(source: Source, out: Path, tp: int, pp: int) -> None:
    """Fill the empty directory `out`."""
    state = replace(source.state, layout=Layout(tp, pp, 1))
    model, placement = state.model, Placement(state.model, state.layout)
    tensors: dict[str, Any] = {}
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
    write_state(out, state)
    if source.tokenizer is not None:
        shutil.copyfile(source.tokenizer, out / TOKENIZER)
    tree = {"format": FORMAT, "tp": tp, "pp": pp, "tensors": tensors}
    (out / INDEX).write_text(json.dumps(tree, indent=1), encoding="utf-8")
    with ThreadPoolExecutor(THREADS) as pool:
        write_manifest(out, pool.map(partial(settle, rank=0), sorted(out.iterdir())))


class ShardFileSource:
    """A directory of shard files; only its index says where rows lie."""

    def __init__(self, folder: Path, files: OpenFiles) -> None:
        self.folder, self.files = folder, files
        check_files(folder, read_manifest(folder))
        path = folder / INDEX
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise UserError("shard files", path, f"have the form {tree['format']!r}", f"this reads {FORMAT!r}")
            self.tensors = dict(tree["tensors"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError("shard files", path, f"cannot be read ({error})", "convert them again") from error
        self.state = read_state(folder)
        self.tokenizer = tokenizer_beside(folder)

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        key, values, filled = tensor_key(kind, name), torch.empty(stop - start), 0
        if key not in self.tensors:
            raise UserError("shard files", self.folder / INDEX, f"lacks {key}", "convert them again")
        entry = self.tensors[key]
        width = entry["shape"][1] if len(entry["shape"]) > 1 else 1
        for shard in {tuple(shard["rows"]): shard for shard in entry["shards"]}.values():  # of replicas one
            first, last = shard["rows"]
            low, high = max(start, first * width), min(stop, last * width)
            if low < high:
                top, bottom = low // width, -(-high // width)
                rows = self.files[self.folder / shard["file"]].get_slice(key)[top - first : bottom - first]
                values[low - start : high - start] = rows.reshape(-1)[low - top * width : high - top * width]
                filled += high - low
        if filled != stop - start:
            raise UserError("shard files", self.folder / INDEX, f"has gaps in {key}", "convert them again")
        return values
