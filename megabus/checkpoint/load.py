"""Load a checkpoint's model into this process, whatever layout it was trained under."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megabus.checkpoint.contents import listed_tokenizer, opened
from megabus.checkpoint.manifest import check_files, read_manifest
from megabus.checkpoint.store import checkpoints_of, complete, step_of
from megabus.config import Layout, ModelConfig
from megabus.data.tokenizer import FILES, Tokenizer, open_tokenizer, read_tokenizer_files
from megabus.errors import UserError
from megabus.model.decoder import Decoder
from megabus.model.params import global_shape
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Piece, Placement


def load(path: str | Path) -> Decoder:
    """The model of a run, as it was last saved, or of one checkpoint: `runs/demo` or `runs/demo/checkpoints/step-...`.

    forward(tokens (B, T) int64) -> logits (B, T, vocab_size), fp32, CPU, eval. Its `ModelConfig` is `model.config`.
    Raises `UserError` if there is no checkpoint or it is damaged.
    """
    model_config, state = load_weights(checkpoint_at(path))
    with torch.device("meta"):
        model = Decoder(model_config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def checkpoint_at(path: str | Path) -> Path:
    """The checkpoint that `path` is, or the newest of the run that it is."""
    path = Path(path)
    if step_of(path) is not None:
        return path
    folders = complete(checkpoints_of(path)) or complete(path)
    if not folders:
        remedy = "give a run's directory or one of its checkpoints (megabus convert makes them of other forms)"
        raise UserError("checkpoint", path, "holds none", remedy)
    return folders[0]


def load_weights(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model's configuration, and canonical name -> full fp32 master. Every file that is read is verified first."""
    from megabus.checkpoint.shards import read_shards  # slow to import, and a new run reads none

    found = opened(folder)  # before any of it is believed
    model = found.state.model
    whole = Placement(model, Layout(1, 1, 1))
    flat = {Piece(name, 0, whole.numel(name)): torch.empty(whole.numel(name)) for name in whole.specs}
    into: Fragments = {piece: {"weight": values} for piece, values in flat.items()}
    read_shards(folder, found.entries, found.placement, into, alone=True)
    return model, {
        piece.name: values.view(global_shape(whole.specs[piece.name], model)) for piece, values in flat.items()
    }


def saved_tokenizer(folder: Path) -> Path:
    """The tokenizer of a checkpoint, verified. Raises `UserError` where none was saved with it."""
    entries = read_manifest(folder)
    path = listed_tokenizer(folder, entries)
    if path is None:
        raise UserError("tokenizer", folder, "no tokenizer was saved with it", "name one: --tokenizer")
    check_files(folder, [entry for entry in entries if entry.name in FILES])
    return path


def tokenizer_for(folder: Path, given: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer to use a checkpoint's model with: its own, verified, or the one `given` where it has none. Raises
    `UserError` where there is neither, or where both are and are not the same."""
    if given is None:
        return open_tokenizer(saved_tokenizer(folder), vocab_size)
    tokenizer = open_tokenizer(given, vocab_size)
    if listed_tokenizer(folder, read_manifest(folder)) is not None:
        own = read_tokenizer_files(saved_tokenizer(folder))
        if not own.known_as & tokenizer.files.known_as:
            problem = f"is another than the one saved in {folder}"
            raise UserError("tokenizer", given, problem, "leave it out, or give that one")
    return tokenizer
