"""A model in this process, from whatever form its weights lie in."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from megabus.checkpoint.load import checkpoint_at, load_weights, own_or_given, saved_tokenizer, tokenizer_for
from megabus.checkpoint.state import SavedState, read_state, tokenizers_of
from megabus.convert.convert import in_other_form, model_at, open_source
from megabus.convert.hugging_face import context_of, longest_of
from megabus.convert.source import OpenFiles, whole
from megabus.data.batches import TokenSource
from megabus.data.sources import VALID_SEED, check_same_tokenizer
from megabus.data.tokenizer import Tokenizer, read_tokenizer_files
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


class Known(NamedTuple):
    """Of a model: where it lies, what is said of it beside its weights, its tokenizer if it has one, and tokens of the
    longest sequence that it can be asked to read."""

    folder: Path
    state: SavedState
    tokenizer: Path | None
    longest: int


def state_of(path: str | Path) -> Known:
    """What is known of a model, in whatever form its weights lie."""
    path = model_at(path)
    if in_other_form(path):
        with OpenFiles() as files:
            source = open_source(path, files)
            return Known(path, source.state, source.tokenizer, longest_of(source))
    folder = checkpoint_at(path)
    state = read_state(folder)
    return Known(folder, state, saved_tokenizer(folder), state.longest_sequence())


def longest_context(path: str | Path) -> int | None:
    """Tokens of the longest sequence that a model was made for, in whatever form its weights lie; None where they do
    not say it."""
    path = model_at(path)
    if in_other_form(path):
        with OpenFiles() as files:
            return context_of(path, open_source(path, files, with_tokenizer=False).state)
    folder = checkpoint_at(path)
    return context_of(folder, read_state(folder))


def read_data(prefix: str, seq_len: int, model: Known) -> TokenSource:
    """Token files to measure a model on, in the order of a validation. Raises `UserError` for what is
    none, and for files that another tokenizer made than the model's."""
    remedy = "give data that was made with the model's own tokenizer"
    source = TokenSource([(prefix, 1.0)], seq_len, VALID_SEED, model.state.model.vocab_size, remedy=remedy)
    files = None if model.tokenizer is None else read_tokenizer_files(model.tokenizer)
    known = tokenizers_of(model.state)
    check_same_tokenizer(source.tokenizers, None, known, files, f"the weights of {model.folder}")
    return source


def tokenizer_of_model(path: str | Path, given: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer to use a model with, in whatever form its weights lie: its own, or the one that is given (see
    `own_or_given`)."""
    path = model_at(path)
    if not in_other_form(path):
        return tokenizer_for(checkpoint_at(path), given, vocab_size)
    with OpenFiles() as files:
        own = open_source(path, files).tokenizer
    return own_or_given(path, own, given, vocab_size)
