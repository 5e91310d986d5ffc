"""What a model says of pairs: the log-likelihood of each label after each prompt, under any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Engine
from megabus.nli.pairs import LABELS, Pair, PairSet
from megabus.nli.settings import Template
from megabus.scoring.encoding import Encoded, encode
from megabus.scoring.harness import EngineLM, MultipleChoice, Scores

CONTENT_FREE = "N/A"  # stands for both sentences in a prompt that says nothing (Zhao et al. 2021)


@dataclass(frozen=True)
class Encoder:
    """Turns pairs to tokens, at most `max_length` of them inputs of the model; the premise is what loses some first."""

    tokenizer: Tokenizer
    template: Template
    max_length: int

    def __post_init__(self) -> None:
        for place in range(len(LABELS)):  # a label that does not fit is refused before any work
            self.encode(Pair(place, "a", "a"), place)

    def encode(self, pair: Pair, label: int) -> Encoded:
        """The pair's prompt followed by one label."""
        prompt, head = self.template.prompt(pair), self.template.before_premise(pair)
        return encode(self.tokenizer, prompt, self.template.labels[label], self.max_length, (head, head + pair.premise))


@dataclass(frozen=True)
class Scorer:
    """An engine that is asked for the labels of pairs, by lm-evaluation-harness."""

    engine: Engine
    encoder: Encoder
    heartbeat: Callable[[], None]

    def score(self, pairs: PairSet) -> Scores:
        """Every label's scores, (pairs, labels); the same on every rank. Collective."""
        encoder, nothing = self.encoder, Pair(0, CONTENT_FREE, CONTENT_FREE)._asdict()
        documents, template = [pair._asdict() for pair in pairs.pairs], encoder.template
        task = MultipleChoice(documents, nothing, lambda doc: template.prompt(Pair(**doc)), template.labels)
        return task.score(EngineLM(self.engine, lambda ask: encoder.encode(Pair(**ask.doc), ask.idx), self.heartbeat))
