"""How one tokenizer spells the pieces that another has beside its own: what their rows in a model are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megabus.errors import UserError

if TYPE_CHECKING:
    from megabus.data.tokenizer.face import Tokenizer

SPACE = "▁"  # how pieces of SentencePiece and its kin write it
KEPT = "a model is begun from only with a tokenizer that gives all its pieces the ids that they had"


class Written(NamedTuple):
    """A token as its vocabulary writes it (with letters for bytes, or ▁ for spaces), or as the text that it is matched
    to: `is_text`."""

    text: str
    is_text: bool


def of_byte(byte: int) -> Written:
    """A piece that stands for one byte: the text that it is, or none where it is a part of a letter only."""
    return Written(chr(byte) if byte < 128 else "", is_text=True)


def is_utf8(text: str) -> bool:
    """Whether it can be written as such: half a surrogate pair, as an argument that is no UTF-8 has them, cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def spellings(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """Each id that is a piece of `new` and none of `old` -> the ids that `old` spells that piece with, one or more.

    Raises `UserError` where a piece of `old` has another id in `new`, or none, and where `old` cannot spell a new one.
    """
    spelled: dict[int, list[int]] = {}
    for number in range(max(old.vocab_size, new.vocab_size)):
        was = old.codec.token_of(number) if number < old.vocab_size else ""
        now = new.codec.token_of(number) if number < new.vocab_size else ""
        if was and was != now:
            there = new.codec.id_of(was)
            found = "is no piece of it" if there is None else f"has the id {there} in it"
            problem = f"{old.shown([number])} of {old.name} {found}"
            raise UserError("tokenizer", new.name, problem, f"extend that one: {KEPT}")
        if now and not was:
            ids = old.codec.spelled(new.codec.written(number))
            if not ids:
                problem = f"has the piece {new.shown([number])}, which {old.name} cannot spell"
                raise UserError(
                    "tokenizer", new.name, problem, "leave that piece out: its row would be made of nothing"
                )
            spelled[number] = ids
    return spelled
