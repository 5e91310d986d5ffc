"""Synthetic pairs, a small model that reads them, and both as files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path

import torch

from megabus.checkpoint.state import Progress, SavedState
from megabus.checkpoint.store import checkpoints_of
from megabus.cli import main
from megabus.config import Layout, ModelConfig
from megabus.convert.checkpoint import write_checkpoint
from megabus.data.tokenizer import train_tokenizer
from megabus.nli.pairs import LABELS
from tests.support.small_models import lively_state

WORDS = ("red", "green", "blue")  # of a hypothesis: each stands for a label
NOUNS = ("cat", "dog", "bird", "horse", "fish", "cow", "hen")


def rows_of(n, seed=0):
    """Pairs in SNLI's form whose label the hypothesis's colour decides; lengths differ."""
    draw = torch.Generator().manual_seed(seed)

    def number(high):
        return int(torch.randint(high, (), generator=draw))

    def noun():
        return NOUNS[number(len(NOUNS))]

    rows = []
    for _ in range(n):
        label, premise = number(3), " and ".join(f"the {noun()}" for _ in range(1 + number(6)))
        hypothesis = f"the {noun()} is {WORDS[label]}."
        rows.append({"gold_label": LABELS[label], "sentence1": f"I saw {premise}.", "sentence2": hypothesis})
    return rows


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


class StateSource:
    """A state dict as what `megabus.convert` writes from."""

    def __init__(self, model, weights, tokenizer):
        self.state = SavedState(Progress(step=7), 0, model, Layout(1, 1, 1), 0, ("weight",), {}, {}, {})
        self.weights, self.tokenizer = weights, tokenizer

    def read(self, kind, name, start, stop):
        return self.weights[name].reshape(-1)[start:stop]


def write_run(folder: Path, **sizes) -> Path:
    """A run directory with one checkpoint of a lively small model, its tokenizer made of such pairs' words."""
    texts = [
        f"{row['sentence1']}\nQuestion: {row['sentence2']} True, False or Neither?\nAnswer:" for row in rows_of(50)
    ]
    tokenizer = train_tokenizer(texts, 340, folder / "words", model_type="bpe")
    shape = {"d_model": 36, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 62} | sizes
    model = ModelConfig(vocab_size=340, **shape)
    write_checkpoint(
        StateSource(model, lively_state(model), tokenizer), checkpoints_of(folder / "run"), Layout(1, 1, 1)
    )
    return folder / "run"


def run_tool(arguments):
    """`megabus evaluate-nli` in this process: (exit code, stdout, stderr)."""
    out = io.StringIO()
    with tempfile.TemporaryFile("w+") as err:  # a real file: the watchdog asks for its number
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["evaluate-nli", *map(str, arguments)])
        err.seek(0)
        return code, out.getvalue(), err.read()
