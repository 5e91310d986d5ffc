"""Predictions' accuracy, F1 and their intervals; and the predictions of what needs no language model.

A model that does not beat logistic regression on the hypothesis alone has used what annotators left in the hypotheses,
and no inference (Gururangan et al. 2018, Poliak et al. 2018).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.pipeline import Pipeline, make_pipeline

from megabus.nli.pairs import LABELS, PairSet

RESAMPLES = 2000
CONFIDENCE = 0.95
C = 1.0  # inverse strength of the L2 penalty, scikit-learn's default
MIN_PAIRS = 2  # that a term must be in: what is seen once is most of all terms, and says little
WORD = r"\w+|[^\w\s]"


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


def overlap(sentences: Sequence[str]) -> list[str]:
    """Which words stand in both sentences or in one alone: a bag of words sees no overlap."""
    premise, hypothesis = (re.findall(WORD, sentence.lower()) for sentence in sentences)
    where = [("both" if word in premise else "new", word) for word in hypothesis]
    where += [("missing", word) for word in premise if word not in hypothesis]
    return [f"{kind}:{word}" for kind, word in where] + [kind for kind, _ in where if kind != "missing"]


def classifiers() -> dict[str, Pipeline]:
    """Logistic regressions on the TF-IDF of words and pairs of neighbours, to be fitted to `Pair`s."""

    def regression(*terms: tuple[dict[str, Any], Any]) -> Pipeline:
        """terms: what is counted, and in which of a `Pair`'s columns: 1 is the premise, 2 the hypothesis."""
        counts = ((CountVectorizer(min_df=MIN_PAIRS, **how), of) for how, of in terms)
        table = make_column_transformer(*counts, sparse_threshold=1)  # never a dense one
        return make_pipeline(table, TfidfTransformer(), LogisticRegression(C=C, tol=1e-6, max_iter=1000))

    n_grams = {"token_pattern": WORD, "ngram_range": (1, 2)}
    both = regression((n_grams, 1), (n_grams, 2), ({"analyzer": overlap}, [1, 2]))
    return {"hypothesis n-grams": regression((n_grams, 2)), "premise + hypothesis n-grams": both}


class Baselines:
    """Fitted once, on the training pairs if there are any; else there is the majority alone, and it is told the
    evaluation's own labels. missing: why there are no classifiers, or None."""

    def __init__(self, train: PairSet | None) -> None:
        self.train, self.missing = train, None if train is not None else "no training pairs"
        self.fitted: dict[str, Pipeline | None] = dict.fromkeys(classifiers())
        try:
            if train is not None:
                self.fitted |= {name: model.fit(train.pairs, train.labels) for name, model in classifiers().items()}
        except ValueError as error:  # one label only, or no term that two pairs share: no reason to lose the rest
            self.missing = f"cannot be fitted to these training pairs ({str(error).splitlines()[0]})"

    def predict(self, pairs: PairSet) -> dict[str, list[int] | None]:
        """Predictions by the baseline's name; None for what is missing."""
        known, whose = (pairs, "these pairs") if self.train is None else (self.train, "training pairs")
        majority = int(np.bincount(known.labels).argmax())  # of equally common labels the first in LABELS
        found: dict[str, list[int] | None] = {f"majority of {whose}": [majority] * len(pairs)}
        return found | {n: model and model.predict(pairs.pairs).tolist() for n, model in self.fitted.items()}
