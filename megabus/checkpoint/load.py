"""A checkpoint's weights in this process, whatever layout they were trained under."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megabus.checkpoint.contents import listed_tokenizer, opened
from megabus.checkpoint.manifest import MANIFEST, check_files, read_manifest
from megabus.checkpoint.store import checkpoints_of, complete, step_of
from megabus.config import Layout, ModelConfig
from megabus.data.tokenizer import FILES, ROWLESS, Tokenizer, open_tokenizer, read_tokenizer_files
from megabus.errors import UserError
from megabus.model.params import global_shape
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Piece, Placement

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # as peft saves it, such as a LoRA
MERGE = "merge it into its model first: in peft merge_and_unload(), then save_pretrained()"


def checkpoint_at(path: str | Path) -> Path:
    """The checkpoint that `path` is, or the newest of the run that it is."""
    if not os.fspath(path):  # which would be the working directory
        raise UserError("checkpoint", "''", "names nothing", "give a run or one of its checkpoints")
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError("checkpoint", path, "does not exist", "check the path")
    if step_of(path) is not None:
        return path
    if not path.is_dir():
        raise UserError("checkpoint", path, "is no directory", "give a run or one of its checkpoints")
    folders = complete(checkpoints_of(path)) or complete(path)
    if not folders and (path / MANIFEST).is_file():
        remedy = "give it back its name, step- and the eight digits of the step that its state.json says"
        raise UserError("checkpoint", path, "is one, and is not called so", remedy)
    if not folders and any((path / name).exists() for name in ADAPTER):
        raise UserError("model", path, "holds an adapter and no whole model", MERGE)
    if not folders:
        remedy = "give a run, one of its checkpoints, or a model's directory with its config.json"
        raise UserError("checkpoint", path, "holds none, and no config.json of a model in another form", remedy)
    return folders[0]


def load_weights(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model's configuration, and canonical name -> full fp32 master. Every file that is read is verified first."""
    from megabus.checkpoint.shards import read_shards  # slow to import, and a new run reads none

    found = opened(folder)  # before any of it is believed
    model = found.state.model
    whole = Placement(model, Layout(1, 1, 1))
    flat = {Piece(name, 0, whole.numel(name)): torch.empty(whole.numel(name)) for name in whole.specs}
    into: Fragments = {piece: {"weight": values} for piece, values in flat.items()}
    read_shards(found, into, alone=True)
    return model, {
        piece.name: values.view(global_shape(whole.specs[piece.name], model)) for piece, values in flat.items()
    }


def saved_tokenizer(folder: Path) -> Path | None:
    """The tokenizer of a checkpoint, verified, if one was saved with it."""
    entries = read_manifest(folder)
    path = listed_tokenizer(folder, entries)
    if path is not None:
        check_files(folder, [entry for entry in entries if entry.name in FILES])
    return path


def tokenizer_for(folder: Path, given: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer to use a checkpoint's model with: its own or the one that is given (see `own_or_given`)."""
    return own_or_given(folder, saved_tokenizer(folder), given, vocab_size)


def own_or_given(folder: Path, own: Path | None, given: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer to use a model with: its `own`, as it lies with the weights in `folder`, or the one `given` where
    it has none. Raises `UserError` where there is neither, or where both are and are not the same."""
    name = own if given is None else given
    if name is None:
        raise UserError("tokenizer", folder, "holds none that can be read", "name one: --tokenizer")
    if own is None:
        return open_tokenizer(name, vocab_size)
    if given is not None and not read_tokenizer_files(own).is_same(read_tokenizer_files(given)):
        problem = f"is another than the one saved in {folder}"
        raise UserError("tokenizer", given, problem, "leave it out, or give that one")
    return open_tokenizer(name, vocab_size, ROWLESS)
