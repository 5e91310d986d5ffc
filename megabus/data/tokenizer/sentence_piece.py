"""SentencePiece tokenizers: loading one, training one.

One that is trained here loses nothing that a text says: bytes outside the vocabulary fall back to byte pieces, "\\n" is
a piece of its own, white space is neither trimmed nor collapsed, and by default characters are not normalised. The one
exception is U+2581, which SentencePiece uses for the space and decodes as one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megabus.data.tokenizer.files import CONFIG, REMEDY, TokenizerFiles
from megabus.data.tokenizer.spelling import SPACE, Written, of_byte
from megabus.durable import partial_name
from megabus.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of SentencePiece's pieces
UNIGRAM, BPE = 1, 2  # types of its models, of which a tokenizer.json can say what they do; others are word and char


class SentencePiece:
    """A `Codec` of a SentencePiece model. What stands around a text only the files beside it say."""

    def __init__(self, files: TokenizerFiles) -> None:
        try:
            if not files.raw:  # which the library takes for no model given
                raise RuntimeError("no bytes")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=files.raw)
        except (RuntimeError, ValueError) as error:  # ValueError where its complaint quotes what is no UTF-8
            raise files.fault("is no tokenizer that is known", REMEDY) from error
        self.n_ids: int = self._processor.vocab_size()
        own = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id(), "pad": self._processor.pad_id()}
        named = {name: files.special(f"{name}_token") for name in own}
        ids = [self.id_of(token) if (token := named[name]) else number for name, number in own.items()]
        self.bos, self.eos, self.pad = (number if number is not None and number >= 0 else None for number in ids)
        self.unk: int = self._processor.unk_id()
        settings = files.tree(CONFIG)  # whose keys the post-processor that transformers makes of them follows
        self.prefix = [self.bos] if settings.get("add_bos_token") and self.bos is not None else []
        self.suffix = [self.eos] if settings.get("add_eos_token") and self.eos is not None else []

    @property
    def proto(self) -> Any:
        """The model's own protobuf."""
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self._processor.serialized_model_proto())
        return proto

    @property
    def has_tree(self) -> bool:
        """Whether a tokenizer.json can be made of it."""
        return self.proto.trainer_spec.model_type in (UNIGRAM, BPE)

    @property
    def symbols(self) -> list[str]:
        return [piece.piece for piece in self.proto.pieces if piece.type == USER_DEFINED]

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._processor.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def id_of(self, token: str) -> int | None:
        number = self._processor.piece_to_id(token)
        return number if self._processor.id_to_piece(number) == token else None

    def token_of(self, number: int) -> str:
        return self._processor.id_to_piece(number)

    def written(self, number: int) -> Written:
        token = self.token_of(number)
        if self._types[number] == BYTE:  # <0x0A>
            return of_byte(int(token[3:-1], 16))
        is_text = self._types[number] in (CONTROL, USER_DEFINED)
        return Written(token.replace(SPACE, " ") if is_text else token, is_text)

    def spelled(self, token: Written) -> list[int] | None:
        ids: list[int] = (self._within_text if token.is_text else self._of_pieces).encode(token.text)
        return None if self.unk in ids else ids

    @cached_property
    def _types(self) -> list[int]:
        return [piece.type for piece in self.proto.pieces]

    @cached_property
    def _within_text(self) -> Any:
        """The same model, of text that stands within another: no space is put before it, and none is taken."""
        proto = self.proto
        proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @cached_property
    def _of_pieces(self) -> Any:
        """The same model, of text that is written as its pieces are: nothing is put before it or changed in it."""
        proto = self.proto
        proto.normalizer_spec.CopyFrom(
            type(proto.normalizer_spec)(name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
        )
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def train_sentence_piece(
    texts: Iterable[str], vocab_size: int, path: Path, model_type: str, normalization: str = "identity"
) -> Path:
    """Trains on `texts`, held in memory, and writes a model at `path`; the same texts give the same bytes.

    model_type: unigram or bpe. Raises UserError if there is no text or if it is too little for vocab_size pieces.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("tokenizer", path, "there is no text to train it on", "check the inputs")
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
    partial = partial_name(path)
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return path
