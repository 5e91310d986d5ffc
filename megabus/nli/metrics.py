"""From gold and predicted labels to accuracy, F1 and their intervals. NumPy and the standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from megabus.nli.pairs import LABELS

RESAMPLES = 2000
CONFIDENCE = 0.95


def confusion_matrix(gold: Sequence[int], predicted: Sequence[int]) -> np.ndarray:
    """Counts (3, 3) int64: rows are gold labels, columns predicted ones."""
    matrix = np.zeros((len(LABELS), len(LABELS)), dtype=np.int64)
    np.add.at(matrix, (np.asarray(gold), np.asarray(predicted)), 1)
    return matrix


def class_scores(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each label, (..., 3) of matrices (..., 3, 3); 0 where a share has no whole."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)
    predicted, gold = matrix.sum(-2), matrix.sum(-1)
    precision, recall = _share(hits, predicted), _share(hits, gold)
    return precision, recall, _share(2 * hits, predicted + gold)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """The mean of the three F1, (...) of (..., 3, 3)."""
    return class_scores(matrix)[2].mean(-1)


def wilson_interval(hits: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Of a share hits/total: Wilson's score interval (1927), which stays within [0, 1] and is honest near its ends."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, denominator = hits / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_macro_f1(matrix: np.ndarray, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile interval of macro-F1 (Efron 1979). Drawing pairs with replacement gives a confusion matrix that is
    multinomial with the observed shares, so the matrices are drawn at once."""
    total = int(matrix.sum())
    draws = np.random.Generator(np.random.PCG64(seed)).multinomial(total, matrix.reshape(-1) / total, RESAMPLES)
    tail = (1 - confidence) / 2
    low, high = np.quantile(macro_f1(draws.reshape(-1, *matrix.shape)), [tail, 1 - tail])
    return float(low), float(high)


def measure(gold: Sequence[int], predicted: Sequence[int], seed: int) -> dict[str, Any]:
    """All numbers of a prediction, as JSON has them."""
    matrix = confusion_matrix(gold, predicted)
    hits, total = int(np.trace(matrix)), int(matrix.sum())
    columns = zip(*class_scores(matrix), matrix.sum(1), matrix.sum(0), strict=True)
    names = ("precision", "recall", "f1", "gold", "predicted")
    return {
        "pairs": total,
        "correct": hits,
        "accuracy": hits / total,
        "accuracy_interval": list(wilson_interval(hits, total)),
        "macro_f1": float(macro_f1(matrix)),
        "macro_f1_interval": list(bootstrap_macro_f1(matrix, seed)),
        "classes": {
            label: {name: value.item() for name, value in zip(names, column, strict=True)}
            for label, column in zip(LABELS, columns, strict=True)
        },
        "confusion": matrix.tolist(),
    }
