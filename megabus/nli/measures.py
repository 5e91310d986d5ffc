"""Predictions' accuracy, F1 and their intervals; and the predictions of what needs no language model.

A model that does not beat logistic regression on the hypothesis alone has used what annotators left in the hypotheses,
and no inference (Gururangan et al. 2018, Poliak et al. 2018).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.pipeline import Pipeline, make_pipeline

from megabus.nli.pairs import LABELS, Pair, PairSet

RESAMPLES = 2000
CONFIDENCE = 0.95
C = 1.0  # inverse strength of the L2 penalty, scikit-learn's default
MIN_PAIRS = 2  # that a term must be in: what is seen once is most of all terms, and says little


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """(...) of confusion matrices (..., 3, 3), which scikit-learn cannot. The F1 of a label that is nowhere is 0."""
    hits, both = np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(-1) + matrix.sum(-2)
    return (2.0 * hits / np.maximum(both, 1)).mean(-1)


def bootstrap_macro_f1(matrix: np.ndarray, seed: int) -> list[float]:
    """Percentile interval of macro-F1 (Efron 1979). Drawing pairs with replacement gives a confusion matrix that is
    multinomial with the observed shares, so the matrices are drawn at once."""
    shares = matrix.reshape(-1) / matrix.sum()
    draws = np.random.Generator(np.random.PCG64(seed)).multinomial(matrix.sum(), shares, RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(macro_f1(draws.reshape(-1, *matrix.shape)), [tail, 1 - tail]).tolist()


def measure(gold: Sequence[int], predicted: Sequence[int], seed: int) -> dict[str, Any]:
    """All numbers of a prediction, as JSON has them. The accuracy's interval is Wilson's (1927), which stays within
    [0, 1] and is honest near its ends."""
    labels = range(len(LABELS))
    matrix = confusion_matrix(gold, predicted, labels=labels)
    hits, total = int(np.trace(matrix)), int(matrix.sum())
    scores = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    table = np.array([*scores, matrix.sum(0)], dtype=object).T.tolist()
    names = ("precision", "recall", "f1", "gold", "predicted")
    return {
        "pairs": total,
        "correct": hits,
        "accuracy": hits / total,
        "accuracy_interval": list(binomtest(hits, total).proportion_ci(CONFIDENCE, "wilson")),
        "macro_f1": float(macro_f1(matrix)),
        "macro_f1_interval": bootstrap_macro_f1(matrix, seed),
        "classes": {label: dict(zip(names, row, strict=True)) for label, row in zip(LABELS, table, strict=True)},
        "confusion": matrix.tolist(),
    }


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def n_grams(words: Sequence[str], mark: str) -> list[str]:
    """Words and pairs of neighbours, each behind the mark of where they stand."""
    return [mark + word for word in words] + [f"{mark}{a} {b}" for a, b in pairwise(words)]


def hypothesis_only(pair: Pair) -> list[str]:
    return n_grams(words_of(pair.hypothesis), "h:")


def premise_and_hypothesis(pair: Pair) -> list[str]:
    """Both sentences' n-grams, and which words stand in both or in one alone: a bag of words sees no overlap."""
    premise, hypothesis = words_of(pair.premise), words_of(pair.hypothesis)
    overlap = [("both:" if word in premise else "new:") + word for word in hypothesis]
    overlap += ["both" if word in premise else "new" for word in hypothesis]
    overlap += [f"missing:{word}" for word in premise if word not in hypothesis]
    return n_grams(premise, "p:") + n_grams(hypothesis, "h:") + overlap


CLASSIFIERS = {"hypothesis n-grams": hypothesis_only, "premise + hypothesis n-grams": premise_and_hypothesis}


def majority(labels: Sequence[int]) -> int:
    """The commonest label; of equally common ones the first in LABELS."""
    return int(np.bincount(labels, minlength=len(LABELS)).argmax())


class Baselines:
    """Fitted once, on the training pairs if there are any; else there is the majority alone, and it is told the
    evaluation's own labels. missing: why there are no classifiers, or None."""

    def __init__(self, train: PairSet | None) -> None:
        self.train, self.missing = train, None if train is not None else "no training pairs"
        self.fitted: dict[str, Pipeline | None] = dict.fromkeys(CLASSIFIERS)
        try:
            if train is not None:
                self.fitted |= {name: fit(features, train) for name, features in CLASSIFIERS.items()}
        except ValueError as error:  # one label only, or no term that two pairs share: no reason to lose the rest
            self.missing = f"cannot be fitted to these training pairs ({str(error).splitlines()[0]})"

    def predict(self, pairs: PairSet) -> dict[str, list[int] | None]:
        """Predictions by the baseline's name; None for what is missing."""
        name, known = (
            ("majority of these pairs", pairs) if self.train is None else ("majority of training pairs", self.train)
        )
        found: dict[str, list[int] | None] = {name: [majority(known.labels)] * len(pairs)}
        return found | {n: model and model.predict(pairs.pairs).tolist() for n, model in self.fitted.items()}


def fit(features: Callable[[Pair], list[str]], train: PairSet) -> Pipeline:
    tf_idf = TfidfVectorizer(analyzer=features, min_df=MIN_PAIRS)
    return make_pipeline(tf_idf, LogisticRegression(C=C, tol=1e-6, max_iter=1000)).fit(train.pairs, train.labels)
