"""One face of every tokenizer, whatever library reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from megabus.data.tokenizer.files import TREE, TokenizerFiles, read_tokenizer_files
from megabus.data.tokenizer.spelling import Written, is_utf8
from megabus.errors import UserError
from megabus.plain_file import shown


class Codec(Protocol):
    """What a library makes of the files. n_ids: one more than the largest id; prefix, suffix: the ids that its own
    post-processor puts around a text; encode gives the text's own ids, without these.
    symbols: what text must spell to be a special token, or one that its makers defined; has_tree: whether an export can
    say it in a tokenizer.json."""

    n_ids: int
    bos: int | None
    eos: int | None
    prefix: list[int]
    suffix: list[int]

    @property
    def symbols(self) -> list[str]: ...

    @property
    def has_tree(self) -> bool: ...

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, number: int) -> str:
        """As the vocabulary writes it; empty where an id is no token."""
        ...

    def written(self, number: int) -> Written: ...

    def spelled(self, token: Written) -> list[int] | None:
        """A token of another vocabulary that writes its tokens alike, in this one's; None where that cannot be. As it
        stands within a text: without what is put before one that begins, or taken from its ends."""
        ...


class Tokenizer:
    """A Hugging Face tokenizer.json, a SentencePiece model or a tiktoken rank file: a file, a directory or a hub name.

    vocab_size: one more than its largest id, which a model's vocabulary may exceed. Text that spells a special token
    of a tokenizer.json is that token, as it is for transformers. Raises `UserError` for what is no tokenizer.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self.files = read_tokenizer_files(name)
        self.name, self.path, self.kind = self.files.name, self.files.path, self.files.kind
        self.codec = codec_of(self.files)
        self._check_added()
        self.vocab_size = self.codec.n_ids
        self.bos, self.eos = self.codec.bos, self.codec.eos
        self.prefix, self.suffix = self.codec.prefix, self.codec.suffix

    def _check_added(self) -> None:
        """transformers gives an id to each token that only the files beside a tokenizer have: texts that spell it would
        have other ids here, and its id might be given to another."""
        remedy = "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        remedy = f"make a {TREE} of all in transformers: {remedy}"
        for token, number in self.files.added:
            known = self.codec.id_of(token) if isinstance(token, str) and is_utf8(token) else None
            # Of a tokenizer.json it takes what that says of a token's id.
            if known is None or (self.kind != "tokenizers" and str(known) != str(number)):
                problem = f"has not {shown(token)}, which the files beside it add as {shown(number)}"
                raise self.files.fault(problem, remedy)
        for token, key in self.files.named:
            if self.codec.id_of(token) is None:
                raise self.files.fault(f"has not {shown(token)}, which the files beside it name as {key}", remedy)

    @property
    def sha256(self) -> str:
        """By which data and weights know it."""
        return self.files.sha256

    @property
    def eod(self) -> int:
        """The id that ends a document. Raises `UserError` where the files name none."""
        if self.eos is None:
            problem = "names no end-of-text token"
            raise self.files.fault(problem, "name it as eos_token in tokenizer_config.json, or with --eos")
        return self.eos

    @property
    def start(self) -> list[int]:
        """What stands before a text that begins: the post-processor's own, else the end of a document before."""
        return self.prefix or [self.eod]

    @cached_property
    def gaps(self) -> list[int]:
        """Ids below vocab_size that are no token, as some files have them."""
        return [number for number in range(self.vocab_size) if not self.codec.token_of(number)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises `UserError` for a text that it cannot spell, as one without an unknown token has them."""
        try:
            return self.codec.encode(list(texts))
        except Exception as error:
            if type(error) is not Exception:  # all that the library tokenizers raises is no narrower
                raise
            problem = f"cannot spell a text ({shown(str(error))})"
            remedy = "leave such texts out, or take a tokenizer that has an unknown token"
            raise self.files.fault(problem, remedy) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self.codec.decode(list(ids))

    def id_of(self, token: str) -> int:
        """token: its id, or as the vocabulary writes it. Raises `UserError` for another."""
        is_id = token.isascii() and token.isdigit()
        found = int(token) if is_id else self.codec.id_of(token)
        if found is None or found >= self.vocab_size or not self.codec.token_of(found):
            problem = f"is neither a token of {self.name} nor an id below {self.vocab_size}"
            raise UserError("token", token, problem, "give one of its special tokens, or none")
        return found

    def shown(self, ids: Sequence[int]) -> str:
        """Special tokens for people: `<s> (1)`. What a terminal would obey is escaped."""
        text = " ".join(f"{self.codec.token_of(number)} ({number})" for number in ids)
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def codec_of(files: TokenizerFiles) -> Codec:
    # Each of these imports a library that the others do without.
    if files.kind == "sentencepiece":
        from megabus.data.tokenizer.sentence_piece import SentencePiece

        return SentencePiece(files)
    if files.kind == "tiktoken":
        from megabus.data.tokenizer.tiktoken import read_ranks

        return read_ranks(files)
    from megabus.data.tokenizer.fast import read_tree

    return read_tree(files)


ROWLESS = "give the model rows for them: by transformers' resize_token_embeddings, or in a run with extend_vocabulary"


def open_tokenizer(
    name: str | os.PathLike[str], vocab_size: int, remedy: str = "give the one that made its data"
) -> Tokenizer:
    """The tokenizer of a model with that vocabulary. Raises `UserError` where it has ids that the model has not.

    remedy: of the tokenizer that lies with the weights, for which no other can be given, `ROWLESS`.
    """
    tokenizer = Tokenizer(name)
    if tokenizer.vocab_size > vocab_size:
        problem = f"has {tokenizer.vocab_size} pieces, the model {vocab_size}"
        raise UserError("tokenizer", tokenizer.name, problem, remedy)
    return tokenizer


NO_TREE = "is a SentencePiece model of words or characters, of which an export can make no tokenizer.json"


def check_carried(tokenizer: Tokenizer, vocab_size: int, key: str, path: str | os.PathLike[str]) -> None:
    """Raise `UserError` under `key` for a tokenizer that cannot go with a model of that vocabulary: no checkpoint of it
    would be read, or no export written."""
    if tokenizer.vocab_size > vocab_size:  # less is a vocabulary that was padded
        problem = f"has {tokenizer.vocab_size} pieces, model.vocab_size is {vocab_size}"
        raise UserError(
            key, path, problem, "set model.vocab_size to that or more if it made the data; else give its own"
        )
    if not tokenizer.codec.has_tree:
        raise UserError(key, path, NO_TREE, "leave it out, and the export is without a tokenizer")
