"""What needs no language model: the commonest label, and logistic regression on TF-IDF n-grams.

A model that does not beat the hypothesis alone has used what annotators left in the hypotheses, and no inference
(Gururangan et al. 2018, Poliak et al. 2018).
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megabus.nli.pairs import LABELS, Pair, PairSet

WORD = re.compile(r"\w+|[^\w\s]")
C = 1.0  # inverse strength of the L2 penalty, scikit-learn's default
MIN_PAIRS = 2  # that a term must be in: what is seen once is most of all terms, and says little
MAX_ITERATIONS, HISTORY, TOLERANCE = 300, 10, 1e-6  # of L-BFGS; tolerance of the mean loss's gradient

Features = Callable[[Pair], list[str]]


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def n_grams(words: Sequence[str], mark: str) -> list[str]:
    """Words and pairs of neighbours, each behind the mark of where they stand."""
    pairs = [f"{mark}{a} {b}" for a, b in pairwise(words)]
    return [f"{mark}{word}" for word in words] + pairs


def hypothesis_only(pair: Pair) -> list[str]:
    return n_grams(words_of(pair.hypothesis), "h:")


def premise_and_hypothesis(pair: Pair) -> list[str]:
    """Both sentences' n-grams, and of each word whether it stands in both, in the hypothesis alone or in the premise
    alone: a bag of words sees no overlap by itself."""
    premise, hypothesis = words_of(pair.premise), words_of(pair.hypothesis)
    there, here = set(premise), set(hypothesis)
    overlap = [("both:" if word in there else "new:") + word for word in hypothesis]
    overlap += ["both" if word in there else "new" for word in hypothesis]
    overlap += [f"missing:{word}" for word in premise if word not in here]
    return n_grams(premise, "p:") + n_grams(hypothesis, "h:") + overlap


class TfIdf:
    """Term counts times ln((1 + n) / (1 + df)) + 1, rows of length 1, as scikit-learn's TfidfVectorizer; terms of fewer
    than `min_pairs` pairs are unknown."""

    def __init__(self, features: Features, train: Sequence[Pair], min_pairs: int = MIN_PAIRS) -> None:
        self.features = features
        # Not a set: its order changes from run to run, and with it that of the weights and the sums.
        found = Counter(term for pair in train for term in dict.fromkeys(features(pair)))
        counts = {term: df for term, df in found.items() if df >= min_pairs}
        self.terms = {term: number for number, term in enumerate(counts)}
        self.idf = [math.log((1 + len(train)) / (1 + df)) + 1 for df in counts.values()]

    def __call__(self, pairs: Sequence[Pair]) -> Tensor:
        """Sparse CSR rows (len(pairs), terms), fp64; unknown terms are passed over."""
        terms: list[int] = []
        weights: list[float] = []
        starts = [0]
        for pair in pairs:
            counts = Counter(self.terms[term] for term in self.features(pair) if term in self.terms)
            row = [(term, counts[term] * self.idf[term]) for term in sorted(counts)]
            length = math.sqrt(sum(weight * weight for _, weight in row)) or 1.0
            terms += [term for term, _ in row]
            weights += [weight / length for _, weight in row]
            starts.append(len(terms))
        with warnings.catch_warnings(action="ignore"):  # torch calls CSR a beta feature
            return torch.sparse_csr_tensor(
                torch.tensor(starts),
                torch.tensor(terms, dtype=torch.int64),
                torch.tensor(weights, dtype=torch.float64),
                (len(pairs), len(self.terms)),
            )


class LogisticRegression:
    """Multinomial, with an L2 penalty that spares the biases; minimised by L-BFGS from zero, so deterministic."""

    def __init__(self, features: Features, train: PairSet) -> None:
        self.tf_idf = TfIdf(features, train.pairs)
        rows, gold = self.tf_idf(train.pairs), torch.tensor(train.labels)
        columns = rows.to_sparse_coo().t().coalesce().to_sparse_csr()
        self.weight = torch.zeros(len(self.tf_idf.terms), len(LABELS), dtype=torch.float64)
        self.bias = torch.zeros(len(LABELS), dtype=torch.float64)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=MAX_ITERATIONS,
            history_size=HISTORY,
            tolerance_grad=TOLERANCE,
            line_search_fn="strong_wolfe",
        )
        shrink = 1 / (C * len(train))

        def closure() -> Tensor:
            """The mean loss; its gradients by hand, a tenth of autograd's time over sparse rows."""
            log_probs = (rows @ self.weight + self.bias).log_softmax(1)
            excess = (log_probs.exp() - F.one_hot(gold, len(LABELS))) / len(train)
            self.weight.grad, self.bias.grad = columns @ excess + shrink * self.weight, excess.sum(0)
            return F.nll_loss(log_probs, gold) + shrink / 2 * self.weight.square().sum()

        optimizer.step(closure)

    def predict(self, pairs: Sequence[Pair]) -> list[int]:
        return (self.tf_idf(pairs) @ self.weight + self.bias).argmax(1).tolist()


def majority(labels: Sequence[int]) -> int:
    """The commonest label; of equally common ones the first in LABELS."""
    counts = Counter(labels)
    return max(range(len(LABELS)), key=lambda label: (counts[label], -label))


class Baselines:
    """Fitted once, on the training pairs if there are any; else there is the majority alone, and it is told the
    evaluation's own labels."""

    def __init__(self, train: PairSet | None) -> None:
        self.train = train
        self.fitted: dict[str, LogisticRegression] = {}
        if train is not None:
            self.fitted = {
                "hypothesis n-grams": LogisticRegression(hypothesis_only, train),
                "premise + hypothesis n-grams": LogisticRegression(premise_and_hypothesis, train),
            }

    def predict(self, pairs: PairSet) -> dict[str, list[int] | None]:
        """Predictions by the baseline's name; None for what needs training pairs."""
        source = "of training pairs" if self.train is not None else "of these pairs"
        label = majority((pairs if self.train is None else self.train).labels)
        found: dict[str, list[int] | None] = {f"majority {source}": [label] * len(pairs)}
        if not self.fitted:
            return found | {"hypothesis n-grams": None, "premise + hypothesis n-grams": None}
        return found | {name: model.predict(pairs.pairs) for name, model in self.fitted.items()}
