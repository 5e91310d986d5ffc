"""The log-likelihood of each label after each prompt, asked by lm-evaluation-harness, answered under any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from lm_eval.api.instance import Instance

from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.nli.pairs import LABELS, Pair, PairSet
from megabus.nli.prompt import Template
from megabus.scoring.harness import EngineLM, MultipleChoice
from megabus.scoring.likelihood import Sequence

CONTENT_FREE = "N/A"  # stands for both sentences in a prompt that says nothing (Zhao et al. 2021)


@dataclass(frozen=True)
class Scores:
    """What a model says of N pairs. log_likelihood: of each label's tokens, summed, in nats, (N, 3) fp64.

    content_free: the same after a prompt without content, (3,). label_chars: characters of each label, (3,). n_cut:
    pairs whose premise lost tokens for room; n_beyond: those that lost more than the premise.
    """

    log_likelihood: np.ndarray
    content_free: np.ndarray
    label_chars: np.ndarray
    n_cut: int
    n_beyond: int

    def variants(self) -> dict[str, np.ndarray]:
        """Scores (N, 3) by the name of the rule: the sum; per character of the label, as lm-evaluation-harness's
        acc_norm; and domain-conditional PMI, log p(label | pair) - log p(label | no content) (Holtzman et al. 2021)."""
        return {
            "sum": self.log_likelihood,
            "per character": self.log_likelihood / self.label_chars,
            "PMI": self.log_likelihood - self.content_free,
        }


class Encoded(NamedTuple):
    """A prompt and its label as tokens; n_cut: tokens of the prompt that were left out for room, more than the premise
    had where `beyond`."""

    sequence: Sequence
    n_cut: int = 0
    beyond: bool = False


class Encoder:
    """Turns pairs to tokens, at most `max_length` of them inputs of the model.

    A prompt and its label are encoded together, as lm-evaluation-harness does it: after the prompt's own number of
    tokens comes the label, and white space at the prompt's end is the label's. What is too long loses tokens from the
    premise's left and, where that is not enough, from the left of the rest.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        for place, label in enumerate(LABELS):
            n_label = self.encode("a", "a", place).sequence.n_scored
            if n_label > max_length:
                problem = f"is less than the {n_label} tokens of label {label}"
                raise UserError("--max-length", max_length, problem, "raise it, or shorten the label")

    def encode(self, premise: str, hypothesis: str, label: int) -> Encoded:
        """The pair's prompt followed by one label."""
        full, encode = self.template.prompt(premise, hypothesis), self.tokenizer.encode
        prompt = full.rstrip()
        n_prompt, tokens = len(encode(prompt)), encode(full + self.template.labels[label])
        n_label = len(tokens) - n_prompt
        if n_label < 1:
            problem = f"adds no token of its own to {prompt[-20:]!r}"
            raise UserError("--labels", self.template.labels[label], problem, "begin the label with a space")
        if n_prompt == 0:  # a first token to predict the next from: the end of a document before
            tokens, n_prompt = [self.tokenizer.eod, *tokens], 1
        n_cut = min(len(tokens) - 1 - self.max_length, n_prompt - 1)
        if n_cut <= 0:
            return Encoded(Sequence(tokens, n_label))
        head, first, last = self.template.before_premise(hypothesis), 0, 0
        if head is not None:
            first, last = (min(len(encode(text)), n_prompt) for text in (head, head + premise))
        cut = {*[*range(first, last), *range(first), *range(last, n_prompt)][:n_cut]}
        kept = [token for place, token in enumerate(tokens) if place not in cut]
        return Encoded(Sequence(kept, n_label), n_cut, n_cut > last - first)


class Scorer:
    """What an engine says of pairs."""

    def __init__(self, engine: Engine, encoder: Encoder, heartbeat: Callable[[], None]) -> None:
        self.engine, self.encoder, self.heartbeat = engine, encoder, heartbeat

    def score(self, pairs: PairSet) -> Scores:
        """Score every label of every pair; the same on every rank. Collective."""
        template, read = self.encoder.template, list[Encoded]()

        def encode(request: Instance) -> Sequence:
            read.append(self.encoder.encode(request.doc["premise"], request.doc["hypothesis"], request.idx))
            return read[-1].sequence

        documents = [pair._asdict() for pair in (*pairs.pairs, Pair(0, CONTENT_FREE, CONTENT_FREE))]
        task = MultipleChoice(
            documents, lambda doc: template.prompt(doc["premise"], doc["hypothesis"]), [*template.labels]
        )
        table = task.score(EngineLM(self.engine, encode, self.heartbeat))
        cuts = np.array([(encoded.n_cut > 0, encoded.beyond) for encoded in read])
        n_cut, n_beyond = cuts.reshape(len(table), len(LABELS), 2)[:-1].any(1).sum(0).tolist()
        chars = np.array([len(text) for text in template.labels], dtype=np.float64)
        return Scores(table[:-1], table[-1], chars, n_cut, n_beyond)
