"""The runs that chaos disturbs: small, on 4 ranks, of 16 steps, growing after the 5th and after the 10th.

Every growth moves weights between layouts that have nothing in common. Together the schedules grow in width and in
depth, exactly and not, with two vocabularies and tokenizers, and begin with drawn weights and with those of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megabus.config import RunConfig, parse_config
from megabus.data.indexed import IndexedWriter
from megabus.data.tokenizer import train_tokenizer
from megabus.testing.chaos_ranks import WORLD

EVAL_EVERY = 4
SAVE_EVERY = 3
KEEP_LAST = 2
STEPS, GROWS_AFTER, TOKENS_A_STEP = 16, 5, 64

DP4 = {"tp": 1, "pp": 1}
SMALL = {"d_model": 36, "n_layers": 3, "n_heads": 2, "head_dim": 6, "d_ff": 62}
WIDER = {"d_model": 48, "n_heads": 4, "d_ff": 90, "micro_batch_size": 2}
LONGER = {"n_layers": 5, "seq_len": 32, "lr": 3e-3}
TOLD = ("d_model", "n_layers", "seq_len")  # of what a growth changes


@dataclass(frozen=True)
class Schedule:
    """layouts: of the three stages. model: the first one's sizes; growths: what the other two change. init_from: the
    schedule whose finished run's weights this one's begin with."""

    layouts: tuple[dict[str, int], dict[str, int], dict[str, int]]
    moments: str
    precision: str
    vocabulary: tuple[int, str] = (300, "bpe")
    depth: str = "append"
    model: dict[str, int] = field(default_factory=lambda: SMALL)
    growths: tuple[dict[str, Any], dict[str, Any]] = (WIDER, LONGER)
    init_from: str | None = None


SCHEDULES = {
    "A": Schedule(({"tp": 2, "pp": 2}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 4}), "grow", "fp32"),
    "B": Schedule((DP4, {"tp": 2, "pp": 1}, {"tp": 2, "pp": 2}), "reset", "bf16"),
    # The pile on top again, as loud: twice, the second time in part. An odd vocabulary, which tp cuts unevenly.
    "C": Schedule(
        ({"tp": 2, "pp": 1}, {"tp": 1, "pp": 4}, {"tp": 2, "pp": 2}),
        "carry",
        "fp32",
        vocabulary=(273, "unigram"),
        depth="stack",
        model=SMALL | {"n_layers": 2},
        growths=({"n_layers": 4, "micro_batch_size": 2}, {"n_layers": 7}),
    ),
    # What B has become goes on in depth.
    "D": Schedule(
        ({"tp": 2, "pp": 2}, DP4, {"tp": 1, "pp": 4}),
        "grow",
        "bf16",
        depth="taper",
        model=SMALL | {"d_model": 48, "n_heads": 4, "d_ff": 90, "n_layers": 5},
        growths=({"n_layers": 6, "micro_batch_size": 1}, {"d_model": 56, "n_layers": 9, "micro_batch_size": 2}),
        init_from="B",
    ),
}


def describe(name: str) -> str:
    schedule = SCHEDULES[name]
    layouts = [f"TP{at['tp']}/PP{at['pp']}/DP{WORLD // (at['tp'] * at['pp'])}" for at in schedule.layouts]
    grown = [", ".join(f"{key} {value}" for key, value in each.items() if key in TOLD) for each in schedule.growths]
    size, kind = schedule.vocabulary
    parts = [
        f"{' -> '.join(layouts)}, grows to {' and '.join(grown)}",
        f"depth {schedule.depth}, moments {schedule.moments}, {schedule.precision}, {size} pieces ({kind})",
        *([f"begins with what {schedule.init_from} has become"] if schedule.init_from else []),
    ]
    return "; ".join(parts)


def make_corpora(folder: Path) -> None:
    """A corpus and a tokenizer, to be saved, for each vocabulary of the schedules."""
    for vocabulary in {schedule.vocabulary for schedule in SCHEDULES.values()}:
        corpus = _corpus(folder, vocabulary)
        corpus.mkdir()
        _write_corpus(corpus, vocabulary[0])
        train_tokenizer(
            ["to be or not to be that is the question " * 20], vocabulary[0], corpus / "tokenizer", vocabulary[1]
        )


def _corpus(folder: Path, vocabulary: tuple[int, str]) -> Path:
    return folder / f"{vocabulary[1]}-{vocabulary[0]}"


def _write_corpus(corpus: Path, vocab_size: int) -> None:
    """Tokens with something to learn: each is mostly a function of the one before it."""
    table = np.random.default_rng(0).integers(0, vocab_size, vocab_size)
    for name, length, seed in (("train", 2000, 1), ("valid", 200, 2)):
        rng, tokens = np.random.default_rng(seed), [0]
        for _ in range(length):
            tokens.append(int(table[tokens[-1]] if rng.random() < 0.9 else rng.integers(vocab_size)))
        with IndexedWriter(str(corpus / name), np.dtype(np.uint16)) as writer:
            writer.append(tokens)


def undisturbed_dir(folder: Path, name: str) -> Path:
    """The run_dir of a schedule's run that nobody disturbs."""
    return folder / f"undisturbed-{name}"


def run_config(folder: Path, run_dir: Path, name: str, **checkpoint: Any) -> RunConfig:
    """folder: holds the corpora, and the undisturbed runs that others begin with."""
    schedule = SCHEDULES[name]
    corpus = _corpus(folder, schedule.vocabulary)
    stages = [stage | {"layout": layout} for stage, layout in zip(schedule.growths, schedule.layouts[1:], strict=True)]
    stages[0] |= {"max_tokens": GROWS_AFTER * TOKENS_A_STEP}
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": schedule.model | {"vocab_size": schedule.vocabulary[0]},
        "layout": schedule.layouts[0],
        "train": {
            "seq_len": 16,
            "micro_batch_size": 2 if schedule.layouts[0] != DP4 else 1,
            "global_batch_size": 4,
            "max_steps": STEPS,
            "precision": schedule.precision,
        },
        "optimizer": {"lr": 1e-2},
        "growth": {
            "moments": schedule.moments,
            "depth": schedule.depth,
            "max_tokens": GROWS_AFTER * TOKENS_A_STEP,
            "trigger": {"predictor": "constant", "constant": 1.0, "kappa": 0.99},
            "stages": stages,
        },
        "data": {
            "train": str(corpus / "train"),
            "valid": str(corpus / "valid"),
            "tokenizer": str(corpus / "tokenizer.model"),
        },
        "eval": {"every": EVAL_EVERY, "tokens": 128},
        "log": {"unit_norm_every": 1},
        "checkpoint": {"every": SAVE_EVERY, "keep_last": KEEP_LAST} | checkpoint,
        "faults": {"hang_timeout": 15.0},
        "preflight": {"enabled": False},
    }
    if schedule.init_from is not None:
        tree["init_from"] = str(undisturbed_dir(folder, schedule.init_from))
    return parse_config(tree)
