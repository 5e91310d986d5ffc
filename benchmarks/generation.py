"""Tokens a second of megabus.generate beside transformers' generate on the same weights, exported: one process, one
thread, the likeliest token each time, keys and values cached in both. Both must write the same text."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megabus
from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare
from benchmarks.training import ONE, shape
from megabus.config import ModelConfig
from megabus.convert.convert import convert
from megabus.engine.startup import prepare_environment
from megabus.generate import generate

PROMPT, TOKENS = 16, 128


def missing() -> str | None:
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def generation(rounds: int, small: bool) -> list[Comparison]:
    """An nGPT, which transformers runs by the code that lies with the export, and a baseline, a Llama there."""
    prepare_environment()
    torch.set_num_threads(1)
    d_model, n_layers, tokens = (32, 2, 8) if small else (384, 6, TOKENS)
    return [_compared(shape(kind, d_model, n_layers), rounds, tokens) for kind in ("ngpt", "gpt")]


def _compared(sizes: dict[str, Any], rounds: int, tokens: int) -> Comparison:
    arms = _arms(sizes, tokens)
    texts = {name: write() for name, write in arms.items()}  # a round warms up
    if texts["megabus"] != texts["transformers"]:
        raise RuntimeError(f"megabus and transformers write different text: {texts}")
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, write in arms.items():
            begun = time.perf_counter()
            write()
            speeds[name].append(tokens / (time.perf_counter() - begun))
    what = f"generate, {sizes['kind']} d{sizes['d_model']} L{sizes['n_layers']}, {tokens} tokens"
    one, other = (Timing(speeds[name], 0) for name in ("megabus", "transformers"))
    return compare(what, "megabus.generate", "transformers' generate", one, other, ">= 1", "tokens/s")


def _arms(sizes: dict[str, Any], tokens: int) -> dict[str, Callable[[], list[int]]]:
    from transformers import AutoModelForCausalLM  # slow to import

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        convert(_Drawn(ModelConfig.model_validate(sizes)), exported, "hf")
        ours = megabus.load(exported)
        # Its code is what this very export has put there.
        theirs = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
        ours.load_state_dict({name: values.clone() for name, values in ours.state_dict().items()}, assign=True)
    prompt = [(7 * i + 1) % sizes["vocab_size"] for i in range(PROMPT)]
    ids = torch.tensor([prompt])

    def transformers() -> list[int]:
        with torch.inference_mode():
            found = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return [int(token) for token in found[0, PROMPT:]]

    return {
        "megabus": lambda: list(generate(ours, prompt, tokens, temperature=0.0)),
        "transformers": transformers,
    }


class _Drawn:
    """A model's first weights, as a source of a conversion."""

    tokenizer: Path | None = None

    def __init__(self, model: ModelConfig) -> None:
        from megabus.checkpoint.state import Progress, SavedState
        from megabus.engine.fragments import initial_fragments
        from megabus.parallel.placement import Placement

        self.state = SavedState(Progress(), 0, model, ONE, 0, ("weight",), {}, {}, {})
        drawn = initial_fragments(Placement(model, ONE), 0, 0, torch.device("cpu"))
        self.weights = {piece.name: kinds["weight"] for piece, kinds in drawn.items()}

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        return self.weights[name][start:stop]
