"""Save a running engine's fp32 masters as a plain directory that one process can load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megabus.checkpoint.load import INDEX
from megabus.config import ModelConfig, RunConfig
from megabus.data.indexed import sync_directory
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.model.params import global_shape
from megabus.parallel.agree import raise_together
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Placement


def save_model(engine: Engine, config: RunConfig, folder: Path, progress: dict[str, Any]) -> None:
    """Write `folder` (config.yaml, one safetensors file a layer, an index, the tokenizer). Collective.

    Rank 0 gathers and writes one layer at a time, so no rank holds the whole model. The directory appears
    complete, under its own name, or not at all.
    """
    writer = _Writer(folder) if dist.get_rank() == 0 else None
    fragments, specs = engine.read(), engine.placement.specs
    for layer, names in groupby(specs, key=lambda name: specs[name].layer):
        # Outside the layers the first name tells the group: embedding before, head after them.
        members = list(names)
        file = f"layer-{layer:04d}.safetensors" if layer is not None else f"{members[0].split('.')[0]}.safetensors"
        tensors = {name: full for name in members if (full := gather(engine.placement, fragments, name)) is not None}
        if writer is not None:
            writer.save(file, tensors)
    if writer is not None:
        writer.publish(engine.stage.model, config, progress)
    raise_together(None if writer is None else writer.error, engine.device)


class _Writer:
    """Rank 0's side: writes into `folder`.partial and renames it at the end. After an error it writes nothing more,
    while the ranks go on delivering, so that all can be told at once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")
        self.files: dict[str, str] = {}
        self.error: UserError | None = None
        self._try(self._start)

    def save(self, file: str, tensors: dict[str, Tensor]) -> None:
        self.files |= dict.fromkeys(tensors, file)
        self._try(lambda: save_file(tensors, self.partial / file))

    def publish(self, model: ModelConfig, config: RunConfig, progress: dict[str, Any]) -> None:
        self._try(lambda: self._finish(model, config, progress))

    def _try(self, write: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            write()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            problem = f"cannot be written ({error})"
            self.error = UserError("checkpoint", self.folder, problem, "make room or choose another run_dir")

    def _start(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def _finish(self, model: ModelConfig, config: RunConfig, progress: dict[str, Any]) -> None:
        tree = {"model": model.model_dump(), "progress": progress, "run": config.model_dump(mode="json")}
        (self.partial / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        (self.partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.files}, indent=1))
        if config.data.tokenizer is not None:
            shutil.copy(config.data.tokenizer, self.partial / "tokenizer.model")
        _publish(self.partial, self.folder)


def gather(placement: Placement, fragments: Fragments, name: str) -> Tensor | None:
    """One parameter's full fp32 master on rank 0's CPU, None elsewhere. Collective among its owners and rank 0."""
    rank, parts = dist.get_rank(), list(placement.owners(name, 0, placement.numel(name), tp=0))
    own = {piece.name: (piece, tensors["weight"]) for piece, tensors in fragments.items()}
    device = next(iter(own.values()))[1].device
    full = torch.empty(placement.numel(name)) if rank == 0 else None
    for source, part in parts:
        if rank == source:
            piece, weight = own[name]
            values = weight[part.start - piece.start : part.stop - piece.start].contiguous()
            if source != 0:
                dist.send(values, 0)
        elif rank == 0:
            values = torch.empty(len(part), device=device)
            dist.recv(values, source)
        if full is not None:
            full[part.start : part.stop] = values.cpu()
    return None if full is None else full.view(global_shape(placement.specs[name], placement.model))


def _publish(partial: Path, folder: Path) -> None:
    for path in (*_files(partial), partial):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    sync_directory(folder.parent)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file())
