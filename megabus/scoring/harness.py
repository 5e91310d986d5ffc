"""An engine as a model of lm-evaluation-harness, and documents in memory as one of its tasks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from megabus.engine.engine import Engine
from megabus.scoring import likelihood
from megabus.scoring.encoding import Encoded


class EngineLM(LM):
    """An engine with a `SequenceLoss`; `encode` makes a request's tokens. Every rank asks and is answered everything:
    to the harness each is alone. encoded: what the last requests were made into."""

    def __init__(self, engine: Engine, encode: Callable[[Instance], Encoded], heartbeat: Callable[[], None]) -> None:
        super().__init__()
        self.engine, self.encode, self.heartbeat = engine, encode, heartbeat
        self.encoded: list[Encoded] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """In nats; whether it is the likeliest text is not computed. Collective."""
        self.encoded = [self.encode(request) for request in requests]
        sequences = [encoded.sequence for encoded in self.encoded]
        return [(nats, False) for nats in likelihood.log_likelihoods(self.engine, sequences, self.heartbeat).tolist()]

    def _no_such_request(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("only log-likelihoods of what follows a text are computed")

    loglikelihood_rolling = generate_until = _no_such_request


@dataclass(frozen=True)
class Scores:
    """What a model says of N documents and their K choices, (N, K) fp64, by three rules.

    log_likelihood: of each choice's tokens, summed, in nats; per_character: that over the choice's characters, as the
    harness's acc_norm; pmi: domain-conditional PMI, log p(choice | document) - log p(choice | a document without
    content) (Holtzman et al. 2021). n_cut: documents that lost tokens for room; n_beyond: more than were expendable.
    """

    log_likelihood: np.ndarray
    per_character: np.ndarray
    pmi: np.ndarray
    n_cut: int
    n_beyond: int


class MultipleChoice(ConfigurableTask):
    """Documents with a prompt, choices and a `label`, the right one's place, without examples before them; and one that
    is like them, but says nothing."""

    def __init__(
        self,
        documents: Sequence[dict[str, Any]],
        content_free: dict[str, Any],
        prompt: Callable[[dict[str, Any]], str],
        choices: Sequence[str],
    ) -> None:
        self.dataset = {"test": datasets.Dataset.from_list([*documents, content_free])}
        config = {
            "task": "multiple_choice",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": prompt,
            "doc_to_choice": [*choices],
            "doc_to_target": "label",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The documents are there."""

    def build_all_requests(self, **options: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            super().build_all_requests(**options)

    def score(self, lm: EngineLM) -> Scores:
        """The choices' scores, the same on every rank. Collective."""
        name, choices = self.config.task, self.config.doc_to_choice
        samples = evaluator.evaluate(lm, {name: self}, bootstrap_iters=0)["samples"][name]
        *rows, nothing = [[nats for nats, _ in sample["filtered_resps"]] for sample in samples]
        cuts = np.array([(encoded.n_cut > 0, encoded.beyond) for encoded in lm.encoded])
        n_cut, n_beyond = cuts.reshape(-1, len(choices), 2)[:-1].any(1).sum(0).tolist()
        nats = np.array(rows)
        return Scores(nats, nats / [len(text) for text in choices], nats - nothing, n_cut, n_beyond)
