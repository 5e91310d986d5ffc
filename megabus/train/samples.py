"""Samples: texts that the model writes while it trains, from the engine's own weights under the running layout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabus.config import RunConfig, Stage
from megabus.config.schema import SamplesConfig
from megabus.data.tokenizer import Tokenizer
from megabus.data.tokenizer.spelling import is_utf8
from megabus.errors import UserError
from megabus.generate import chosen
from megabus.scoring.continuations import continuations
from megabus.splitmix import mix64
from megabus.train.callbacks import Callback, Row

if TYPE_CHECKING:
    from megabus.train.run import Run


class Samples(Callback):
    """Every `log.samples.every` steps and at the end. The draws of a text follow from the run's seed, the step and the
    prompt's number, so that a resumed run writes the same."""

    def __init__(self, config: SamplesConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.prompts = [read_prompt(tokenizer, prompt) for prompt in config.prompts]

    def on_step(self, run: Run, row: Row) -> None:
        if row["step"] % self.config.every == 0 and run.share < 1:
            self._write(run)

    def on_eval(self, run: Run, row: Row) -> None:
        if run.share >= 1:  # the last one is read beneath the loss that the run ends with
            self._write(run)

    def _write(self, run: Run) -> None:
        begun, step = time.perf_counter(), run.progress.step
        run.watchdog.heartbeat(f"the samples after step {step}")
        seeds = [mix64(mix64(mix64(self.seed) ^ step) ^ number) >> 1 for number in range(len(self.prompts))]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]

        def choose(number: int, logits_V: Tensor) -> int:
            logits_V = logits_V[: self.tokenizer.vocab_size].double().cpu()  # no id beyond, as of a padded vocabulary
            return chosen(logits_V, draws[number], self.config.temperature, never=self.tokenizer.gaps)

        written = continuations(run.engine, self.prompts, self.config.max_tokens, choose, self.tokenizer.eos)
        texts = [
            {"prompt": prompt, "text": self._text(ids, new)}
            for prompt, ids, new in zip(self.config.prompts, self.prompts, written, strict=True)
        ]
        run.watchdog.heartbeat()
        run.tell("sample", {"samples": texts, "seconds": time.perf_counter() - begun})

    def _text(self, prompt: list[int], written: list[int]) -> str:
        return self.tokenizer.decode(prompt + written)[len(self.tokenizer.decode(prompt)) :]


def read_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Its tokens, at least one."""
    return [*tokenizer.prefix, *tokenizer.encode(prompt)] or tokenizer.start


def check_prompts(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Raise `UserError` for samples without a tokenizer, and for a prompt that leaves no room for its tokens in the
    shortest sequences of the run."""
    samples = config.log.samples
    if samples is None:
        return
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer", "(missing)", "log.samples needs it", "name what made the data")
    tokenizer = Tokenizer(config.data.tokenizer)
    room = min(part.seq_len for stage in stages for part in stage.parts)
    for number, prompt in enumerate(samples.prompts):
        if not is_utf8(prompt):
            problem = "has half a letter, one of a pair of UTF-16, and is no text"
            raise UserError(f"log.samples.prompts.{number}", ascii(prompt[:40]), problem, "write the letter itself")
        n = len(read_prompt(tokenizer, prompt))
        if n + samples.max_tokens > room:
            shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
            problem = f"is {n} tokens, and with log.samples.max_tokens = {samples.max_tokens} exceeds seq_len = {room}"
            raise UserError(f"log.samples.prompts.{number}", shown, problem, "shorten it, or lower max_tokens")
