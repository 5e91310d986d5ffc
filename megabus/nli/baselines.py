"""What needs no language model: the commonest label, and logistic regression on TF-IDF n-grams.

A model that does not beat the hypothesis alone has used what annotators left in the hypotheses, and no inference
(Gururangan et al. 2018, Poliak et al. 2018).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from megabus.nli.pairs import LABELS, Pair, PairSet

WORD = re.compile(r"\w+|[^\w\s]")
C = 1.0  # inverse strength of the L2 penalty, scikit-learn's default
MIN_PAIRS = 2  # that a term must be in: what is seen once is most of all terms, and says little
MAX_ITERATIONS, TOLERANCE = 1000, 1e-6  # of L-BFGS

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


CLASSIFIERS = {"hypothesis n-grams": hypothesis_only, "premise + hypothesis n-grams": premise_and_hypothesis}


class Classifier:
    """scikit-learn's logistic regression on TF-IDF rows; terms of fewer than MIN_PAIRS pairs are unknown."""

    def __init__(self, features: Features, train: PairSet) -> None:
        self.tf_idf = TfidfVectorizer(analyzer=features, min_df=MIN_PAIRS)
        self.regression = LogisticRegression(C=C, tol=TOLERANCE, max_iter=MAX_ITERATIONS)
        self.regression.fit(self.tf_idf.fit_transform(train.pairs), train.labels)

    def predict(self, pairs: Sequence[Pair]) -> list[int]:
        return self.regression.predict(self.tf_idf.transform(pairs)).tolist()


def majority(labels: Sequence[int]) -> int:
    """The commonest label; of equally common ones the first in LABELS."""
    counts = Counter(labels)
    return max(range(len(LABELS)), key=lambda label: (counts[label], -label))


class Baselines:
    """Fitted once, on the training pairs if there are any; else there is the majority alone, and it is told the
    evaluation's own labels. missing: why there are no classifiers, or None."""

    def __init__(self, train: PairSet | None) -> None:
        self.train, self.missing = train, None if train is not None else "no training pairs"
        self.fitted: dict[str, Classifier] = {}
        try:
            if train is not None:
                self.fitted = {name: Classifier(features, train) for name, features in CLASSIFIERS.items()}
        except ValueError as error:  # one label only, or no term that two pairs share: no reason to lose the rest
            self.missing = f"cannot be fitted to these training pairs ({str(error).splitlines()[0]})"

    def predict(self, pairs: PairSet) -> dict[str, list[int] | None]:
        """Predictions by the baseline's name; None for what is missing."""
        source = "of training pairs" if self.train is not None else "of these pairs"
        label = majority((pairs if self.train is None else self.train).labels)
        found: dict[str, list[int] | None] = {f"majority {source}": [label] * len(pairs)}
        return found | {
            name: self.fitted[name].predict(pairs.pairs) if name in self.fitted else None for name in CLASSIFIERS
        }
