"""SentencePiece tokenizers: training one, loading one.

Nothing a text says is lost: bytes outside the vocabulary fall back to byte pieces, "\\n" is a piece of its
own, white space is neither trimmed nor collapsed, and by default characters are not normalised. The one
exception is U+2581, which SentencePiece uses for the space and decodes as one.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megabus.errors import UserError
from megabus.plain_file import NotPlainError, read_regular

MODEL_TYPES = ("unigram", "bpe")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")


class Tokenizer:
    """A SentencePiece model. `eod` is the id of </s>, which ends every document of a corpus."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            model = read_regular(self.path, links=True)
        except FileNotFoundError as error:
            raise UserError("tokenizer", path, "the file does not exist", "check the path or train one") from error
        except OSError as error:
            raise UserError("tokenizer", path, f"cannot be read ({error.strerror})", "give a .model file") from error
        except NotPlainError as error:
            raise UserError("tokenizer", path, str(error), "give a .model file") from error
        try:
            if not model:  # which the library takes for no model given
                raise RuntimeError("no bytes")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            problem = "is not a SentencePiece model"
            raise UserError("tokenizer", path, problem, "give a .model file") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        self.sha256 = hashlib.sha256(model).hexdigest()
        if self.eod < 0:
            raise UserError("tokenizer", path, "has no </s> piece", "train it with an eos_id")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def open_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model with that vocabulary, which may be padded. Raises `UserError` where it is another's."""
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        problem = f"has {tokenizer.vocab_size} pieces, the model {vocab_size}"
        raise UserError("tokenizer", path, problem, "give the one that made its data")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_prefix: str | os.PathLike[str],
    model_type: str = "unigram",
    normalization: str = "identity",
) -> Path:
    """Trains on `texts`, held in memory, and writes `OUT_PREFIX.model`; the same texts give the same bytes.

    Raises UserError if there is no text or if it is too little for vocab_size pieces.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("tokenizer", out_prefix, "there is no text to train it on", "check the inputs")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,  # and not model_prefix, which would be stored inside the model
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name=normalization,
            num_threads=1,
            byte_fallback=True,
            character_coverage=1.0,
            user_defined_symbols=["\n"],
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            max_sentence_length=1 << 30,  # by default, lines longer than 4192 bytes are dropped
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # how SentencePiece refuses its arguments
        reason, remedy = str(error).rpartition("] ")[2], "change it or give more text"
        if least := re.search(rf"required_chars.* {vocab_size} vs (\d+)", reason):
            reason = f"is less than the {least[1]} pieces that this text needs at least: 256 bytes and its characters"
            remedy = "give more"
        raise UserError("tokenizer vocab_size", vocab_size, reason, remedy) from error
    path = Path(f"{os.fspath(out_prefix)}.model")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return path
