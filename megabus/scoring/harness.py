"""An engine as a model of lm-evaluation-harness, and documents in memory as one of its tasks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from megabus.engine.engine import Engine
from megabus.scoring import likelihood


class EngineLM(LM):
    """An engine with a `SequenceLoss`; `encode` makes a request's tokens. Every rank asks and is answered everything:
    to the harness each is alone."""

    def __init__(
        self, engine: Engine, encode: Callable[[Instance], likelihood.Sequence], heartbeat: Callable[[], None]
    ) -> None:
        super().__init__()
        self.engine, self.encode, self.heartbeat = engine, encode, heartbeat

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """In nats; whether it is the likeliest text is not computed. Collective."""
        sequences = [self.encode(request) for request in requests]
        return [(nats, False) for nats in likelihood.log_likelihoods(self.engine, sequences, self.heartbeat).tolist()]

    def _no_such_request(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("only log-likelihoods of what follows a text are computed")

    loglikelihood_rolling = generate_until = _no_such_request


class MultipleChoice(ConfigurableTask):
    """Documents with a prompt, choices and a `label`, the right one's place, without examples before them."""

    def __init__(
        self, documents: Sequence[dict[str, Any]], prompt: Callable[[dict[str, Any]], str], choices: list[str]
    ) -> None:
        self.dataset = {"test": datasets.Dataset.from_list(list(documents))}
        config = {
            "task": "multiple_choice",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": prompt,
            "doc_to_choice": choices,
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

    def score(self, lm: EngineLM) -> np.ndarray:
        """Log-likelihoods of the choices, (documents, choices), the same on every rank. Collective."""
        name = self.config.task
        samples = evaluator.evaluate(lm, {name: self}, bootstrap_iters=0)["samples"][name]
        return np.array([[nats for nats, _ in sample["filtered_resps"]] for sample in samples])
