"""Some hundred lines on which two tokenizers that are said to be one show whether they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megabus.data.tokenizer.face import Tokenizer

BASES = (
    "a",
    "word",
    "It's we'LL, DON'T",
    "naïve café",  # composed
    "nai\u0308ve cafe\u0301 a\u0323\u0302",  # the same with combining marks, and two on one letter
    "\u0301a\u0301",
    "ﬁne oﬃce ½ ① ﷺ Å Ω ｆｕｌｌ",  # what nfkc makes other letters of
    "ẞ ß İ ı ſ Σς",
    "Привет Ελλάδα",
    "مرحبا \u200fبالعالم\u200e مُحَمَّد",
    "שלום עוֹלָם",
    "हिन्दी क्षत्रिय ไทย ภาษา",
    "北京，東京。「引用」",
    "한국어 \u1112\u1161\u11ab",  # syllables, and the same in parts
    "🙂 👩\u200d👩\u200d👧 🇫🇷 👍🏽 1️⃣ ☃\ufe0f",
    "3.14159 1,000,000 2026-11-30 ４２ ²³ Ⅷ",
    "def f(x):\n\treturn {'a': x[0] != 1}  # no",
    "https://example.org/a?b=c&d=%20#e",
    "<0x41> <0x0A> b<0xFF><unk> <s> </s> <pad> <|endoftext|> [CLS] [MASK]",
    "▁ ▁▁a \u2581",
    "nbsp\u00a0zwsp\u200bideo\u3000thin\u2009soft\u00adbom\ufeff",
    "line\u2028para\u2029nel\u0085vt\vff\f",
    "\x00\x01\x1b\x7f\ufffd\ue000\uffff\U0010ffff",
    "-----====____....!!!???",
    "“quotes” ‘single’ – — …",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "the the  the   the    the",
    "CamelCase snake_case kebab-case",
    "\r\n\r",
    " ",
)


class Difference(NamedTuple):
    """A text, and its ids by either tokenizer."""

    text: str
    ids: list[int]
    others: list[int]


def odd_lines(symbols: Sequence[str] = ()) -> list[str]:
    """Texts of many scripts, each in several surroundings of white space. symbols: a tokenizer's own."""
    lines = [""]
    bases = [*BASES, *symbols]
    for place, base in enumerate(bases):
        after = bases[(place + 1) % len(bases)]
        lines += [base, f" {base}", f"  {base}  ", f"{base}\n", f"\n\n{base}\t", f"a  {base}   b", f"{base}{base}"]
        lines += [f"{base} {after}", f"x{base}.", base.swapcase()]
    return list(dict.fromkeys(lines))


def differences(
    texts: Sequence[str], one: Tokenizer, other: Callable[[Sequence[str]], list[list[int]]]
) -> list[Difference]:
    """The texts to which `other` gives other ids than a tokenizer."""
    pairs = zip(texts, one.encode_batch(texts), other(texts), strict=True)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]
