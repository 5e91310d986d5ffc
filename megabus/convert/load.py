"""A model in this process, from whatever form its weights lie in."""

from __future__ import annotations

from pathlib import Path

import torch

from megabus.checkpoint.load import (
    checkpoint_at,
    known_tokenizers,
    load_weights,
    own_or_given,
    saved_tokenizer,
    tokenizer_for,
)
from megabus.checkpoint.state import SavedState, read_state
from megabus.convert.convert import in_other_form, model_at, open_source
from megabus.convert.source import OpenFiles, whole
from megabus.data.tokenizer import Tokenizer
from megabus.model.decoder import Decoder, param_specs


def load(path: str | Path) -> Decoder:
    """The model of a run, as it was last saved, of one checkpoint, or of a Hugging Face directory: `runs/demo`,
    `runs/demo/checkpoints/step-...`, `path/to/llama`, or its name on the hub.

    forward(tokens (B, T) int64) -> logits (B, T, vocab_size), fp32, CPU, eval. Its `ModelConfig` is `model.config`.
    Raises `UserError` if there is none, it is damaged, or megabus does not compute it.
    """
    path = model_at(path)
    if in_other_form(path):
        with OpenFiles() as files:
            source = open_source(path, files)
            config, state = source.state.model, {n: whole(source, n) for n in param_specs(source.state.model)}
    else:
        config, state = load_weights(checkpoint_at(path))
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def state_of(path: str | Path) -> tuple[Path, SavedState, set[str]]:
    """Where a model lies, in whatever form, what is said of it beside its weights, and what its tokenizer is known by
    (see `known_tokenizers`)."""
    path = model_at(path)
    if in_other_form(path):
        with OpenFiles() as files:
            source = open_source(path, files)
            return path, source.state, known_tokenizers(source.state, source.tokenizer)
    folder = checkpoint_at(path)
    state = read_state(folder)
    return folder, state, known_tokenizers(state, saved_tokenizer(folder))


def tokenizer_of_model(path: str | Path, given: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer to use a model with, in whatever form its weights lie: its own, or the one that is given (see
    `own_or_given`)."""
    path = model_at(path)
    if not in_other_form(path):
        return tokenizer_for(checkpoint_at(path), given, vocab_size)
    with OpenFiles() as files:
        own = open_source(path, files).tokenizer
    return own_or_given(path, own, given, vocab_size)
