"""Byte-level BPE: training one with the library `tokenizers`, and what all of its kind have in common.

Nothing a text says is lost: bytes are the alphabet, nothing is normalised, and the pieces of a text make up the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from megabus.durable import partial_name
from megabus.errors import UserError

END = "<|endoftext|>"  # ends every document, as GPT-2 wrote it
# How text is cut before bytes are merged, of openai/tiktoken's cl100k_base (tiktoken_ext/openai_public.py): words with
# the space before them, at most three digits, line breaks apart from indentation.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a vocabulary (GPT-2, encoder.py): itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def byte_pieces(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cuts text as the pattern says, and spells each piece in letters for bytes."""
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_byte_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Path:
    """Trains on `texts`, of which memory holds the different words, and writes a tokenizer.json at `path`; the same
    texts give the same bytes. Raises UserError if there is no text, or too little for vocab_size pieces."""
    least = 257
    if vocab_size < least:
        problem = f"is less than {least}, for 256 bytes and the end of a text"
        raise UserError("tokenizer vocab_size", vocab_size, problem, "give more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = byte_pieces(CL100K), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(END, special=True, normalized=False)],
        initial_alphabet=sorted(alphabet),
        show_progress=False,  # `preprocess` tells it, where there is no terminal too
    )
    backend.train_from_iterator(texts, trainer)
    if (found := backend.get_vocab_size()) < vocab_size:
        problem = f"is more than the {found} pieces that this text gives"
        raise UserError("tokenizer vocab_size", vocab_size, problem, f"set it to {found} or give more text")
    partial = partial_name(path)
    partial.write_text(backend.to_str(), encoding="utf-8")
    partial.replace(path)
    return path
