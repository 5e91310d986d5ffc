"""The log-likelihood of each label after each prompt, asked by lm-evaluation-harness, answered under any layout."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Engine
from megabus.engine.likelihood import Sequence, log_likelihoods
from megabus.errors import UserError
from megabus.nli.pairs import LABELS, Pair, PairSet
from megabus.nli.prompt import Template

CONTENT_FREE = "N/A"  # stands for both sentences in a prompt that says nothing (Zhao et al. 2021)
TASK = "megabus_nli"


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


class EngineLM(LM):
    """An engine with a `SequenceLoss` as a model of lm-evaluation-harness, for tasks whose documents have `premise` and
    `hypothesis`. Every rank asks and is answered everything: to the harness each is alone. encoded: what was read."""

    def __init__(self, engine: Engine, encoder: Encoder, heartbeat: Callable[[], None]) -> None:
        super().__init__()
        self.engine, self.encoder, self.heartbeat = engine, encoder, heartbeat
        self.encoded: list[Encoded] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each label after its prompt, in nats; whether it is the likeliest text is not computed. Collective."""
        docs = ((request.doc["premise"], request.doc["hypothesis"], request.idx) for request in requests)
        self.encoded = [self.encoder.encode(*doc) for doc in docs]
        sequences = [encoded.sequence for encoded in self.encoded]
        return [(value, False) for value in log_likelihoods(self.engine, sequences, self.heartbeat).tolist()]

    def score(self, pairs: PairSet) -> Scores:
        """Score every label of every pair; the same on every rank. Collective."""
        template = self.encoder.template
        task = PairTask([*pairs.pairs, Pair(0, CONTENT_FREE, CONTENT_FREE)], template)
        samples = evaluator.evaluate(self, {TASK: task}, bootstrap_iters=0)["samples"][TASK]
        table = np.array([[value for value, _ in sample["filtered_resps"]] for sample in samples])
        cuts = np.array([(encoded.n_cut > 0, encoded.beyond) for encoded in self.encoded])
        n_cut, n_beyond = cuts.reshape(len(table), len(LABELS), 2)[:-1].any(1).sum(0).tolist()
        chars = np.array([len(text) for text in template.labels], dtype=np.float64)
        return Scores(table[:-1], table[-1], chars, n_cut, n_beyond)

    def _no_such_request(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("only labels after prompts are scored")

    loglikelihood_rolling = generate_until = _no_such_request


class PairTask(ConfigurableTask):
    """Pairs as a task of lm-evaluation-harness: the one of configs/eval/nli, with any template."""

    def __init__(self, pairs: list[Pair], template: Template) -> None:
        self.dataset = {"test": datasets.Dataset.from_list([pair._asdict() for pair in pairs])}
        said = {"doc_to_text": lambda doc: template.prompt(doc["premise"], doc["hypothesis"]), "doc_to_target": "label"}
        said |= {"doc_to_choice": list(template.labels), "target_delimiter": "", "num_fewshot": 0}
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        config = {"task": TASK, "test_split": "test", "output_type": "multiple_choice", "metric_list": metrics}
        super().__init__(config=config | said)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The pairs are there."""

    def build_all_requests(self, **options: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            super().build_all_requests(**options)
