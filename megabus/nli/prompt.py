"""A pair as text, and its label as the tokens that follow the text."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError
from megabus.nli.pairs import LABELS

# GPT-3's template for such tasks (Brown et al. 2020, appendix G), as in lm-evaluation-harness's MNLI.
TEMPLATE = "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:"
VERBALIZERS = (" True", " Neither", " False")  # in the order of LABELS
FIELDS = ("premise", "hypothesis")


@dataclass(frozen=True)
class Template:
    """text: with {premise} and {hypothesis}, and {{ for a brace; labels: what follows it, in the order of LABELS."""

    text: str = TEMPLATE
    labels: tuple[str, ...] = VERBALIZERS

    def __post_init__(self) -> None:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None]
        except ValueError as error:
            raise UserError("--template", self.text, f"is malformed ({error})", "write {{ and }} for braces") from error
        unknown = [name for name in names if name not in FIELDS]
        if unknown:
            raise UserError("--template", self.text, f"has a field {{{unknown[0]}}}", "use {premise} and {hypothesis}")
        if "hypothesis" not in names or len(names) != len(set(names)):
            problem = "must hold {hypothesis} once, and {premise} at most once"
            raise UserError("--template", self.text, problem, "see --help for the default")
        for label, text in zip(LABELS, self.labels, strict=True):
            if not text.strip():
                raise UserError("--labels", f"{label}={text!r}", "is blank", "give it a word")
            if self.labels.count(text) > 1:
                raise UserError("--labels", f"{label}={text!r}", "is another label's too", "give each its own word")

    def prompt(self, premise: str, hypothesis: str) -> str:
        return self.text.format(premise=premise, hypothesis=hypothesis)

    def premise_span(self, premise: str, hypothesis: str) -> tuple[str, str]:
        """The prompt up to the premise, and up to its end; two empty texts where there is none."""
        head = ""
        for text, name, _, _ in string.Formatter().parse(self.text):
            head += text
            if name == "premise":
                return head, head + premise
            if name == "hypothesis":
                head += hypothesis
        return "", ""


class Scored(NamedTuple):
    """tokens: a prompt and, last, the n_label tokens of a label; n_cut: tokens of the prompt that were left out for
    room, more than the premise had where `beyond`."""

    tokens: list[int]
    n_label: int
    n_cut: int = 0
    beyond: bool = False

    @property
    def n_inputs(self) -> int:
        return len(self.tokens) - 1


class Encoder:
    """Turns pairs to tokens, at most `max_length` of them inputs of the model.

    A prompt and its label are encoded together, as lm-evaluation-harness does it: what follows the prompt's own number
    of tokens is the label, white space at the prompt's end included. What is too long loses tokens from the premise's
    left, and, where that is not enough, from the left of the rest.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        for place, label in enumerate(LABELS):
            n_label = self.encode("a", "a", place).n_label
            if n_label > max_length:
                problem = f"is less than the {n_label} tokens of label {label}"
                raise UserError("--max-length", max_length, problem, "raise it, or shorten the label")

    def encode(self, premise: str, hypothesis: str, label: int) -> Scored:
        """The pair's prompt followed by one label."""
        full = self.template.prompt(premise, hypothesis)
        prompt = full.rstrip()
        text = full[len(prompt) :] + self.template.labels[label]
        encode = self.tokenizer.encode
        n_prompt = len(encode(prompt))
        tokens = encode(prompt + text)
        n_label = len(tokens) - n_prompt
        if n_label < 1:
            problem = f"adds no token of its own to {prompt[-20:]!r}"
            raise UserError("--labels", self.template.labels[label], problem, "begin the label with a space")
        if n_prompt == 0:  # a first token to predict the next from: the end of a document before
            tokens, n_prompt = [self.tokenizer.eod, *tokens], 1
        n_cut = min(len(tokens) - 1 - self.max_length, n_prompt - 1)
        if n_cut <= 0:
            return Scored(tokens, n_label)
        first, last = (min(len(encode(part)), n_prompt) for part in self.template.premise_span(premise, hypothesis))
        order = [*range(first, last), *range(first), *range(last, n_prompt)]
        cut = set(order[:n_cut])
        kept = [token for place, token in enumerate(tokens) if place not in cut]
        return Scored(kept, n_label, n_cut, n_cut > last - first)

    def encode_all(self, pairs: Sequence[tuple[int, str, str]]) -> list[Scored]:
        """Every pair with every label: pair i with label j is item i * len(LABELS) + j."""
        return [self.encode(pair[1], pair[2], label) for pair in pairs for label in range(len(LABELS))]
