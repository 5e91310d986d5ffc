"""A context and the text that is to follow it, as tokens that fit a model."""

from __future__ import annotations

from typing import NamedTuple

from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError
from megabus.scoring.likelihood import Sequence


class Encoded(NamedTuple):
    """n_cut: tokens of the context that were left out for room; beyond: some of them were not expendable."""

    sequence: Sequence
    n_cut: int = 0
    beyond: bool = False


def encode(
    tokenizer: Tokenizer, context: str, text: str, max_length: int, expendable: tuple[str, str] = ("", "")
) -> Encoded:
    """Tokens of which the last ones are `text`, at most `max_length` of them inputs of the model.

    Both are encoded together, as lm-evaluation-harness does it: after the context's own number of tokens comes the
    text, and white space at the context's end is the text's; before both stands what the tokenizer's post-processor
    writes there. What is too long loses tokens from its left: first of what is `expendable`, given as the context up to
    where that begins and up to where it ends, then of the rest, and last what begins a text. Raises `UserError` where
    the text makes no token, or more than there is room for.
    """
    bare, tokens = context.rstrip(), tokenizer.encode(context + text)
    n_context = len(tokenizer.encode(bare))
    n_text = len(tokens) - n_context
    if n_text < 1:
        raise UserError("text to score", text, f"adds no token of its own to {bare[-20:]!r}", "begin it with a space")
    if n_text > max_length:
        problem = f"is less than the {n_text} tokens of {text!r}"
        raise UserError("max_length", max_length, problem, "raise it, or shorten the text")
    begin = tokenizer.prefix if n_context else tokenizer.start  # something to predict the first token from
    tokens, at, n_context = [*begin, *tokens], len(begin), len(begin) + n_context
    n_cut = min(len(tokens) - 1 - max_length, n_context - 1)
    if n_cut <= 0:
        return Encoded(Sequence(tokens, n_text))
    first, last = (min(at + len(tokenizer.encode(part)), n_context) for part in expendable)
    cut = {*[*range(first, last), *range(at, first), *range(last, n_context), *range(at)][:n_cut]}
    kept = [token for place, token in enumerate(tokens) if place not in cut]
    return Encoded(Sequence(kept, n_text), n_cut, n_cut > last - first)
