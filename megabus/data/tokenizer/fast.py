"""Tokenizers that Hugging Face's library `tokenizers` computes: those of a tokenizer.json, and those made for it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tokenizers

from megabus.data.tokenizer.files import TREE, TokenizerFiles
from megabus.data.tokenizer.spelling import Written, of_byte
from megabus.plain_file import shown

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
AT_ENDS = re.compile(r"^\^|\\[AzZ]|\$$")  # of a regular expression that matches where a text begins or ends alone
# Where no file names the special tokens, as beside a bare tokenizer.json.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Fast:
    """A `Codec` of the library. bos, eos: names of special tokens; without one, that which the post-processor writes,
    or else that which has a usual name."""

    def __init__(self, backend: Any, bos: str | None = None, eos: str | None = None) -> None:
        self.backend = backend
        # What was stored for somebody's training would cut our documents, fill them up, or spell them by chance.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        ids = sorted(backend.get_vocab(with_added_tokens=True).values())
        self.n_ids = ids[-1] + 1 if ids else 0
        self.added = backend.get_added_tokens_decoder()
        self.prefix, self.suffix = self._around(ids)
        self._symbols = [token.content for token in self.added.values()]
        named = {token.content for token in self.added.values() if token.special}
        self.bos = self._special(bos, self.prefix, BOS_NAMES, named)
        self.eos = self._special(eos, self.suffix, EOS_NAMES, named)

    def _around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text. Which ids are the text's own is seen by a text that is
        spelled in one place alone, with it and without: the library itself says it only of some post-processors."""
        for number in ids:
            text = self.token_of(number)
            try:
                bare = [] if number in self.added else self.backend.encode(text, add_special_tokens=False).ids
                whole = self.backend.encode(text, add_special_tokens=True).ids if bare else []
            except Exception:  # the library's, of a token that is cut into what the vocabulary lacks
                continue
            places = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
            if len(places) == 1:
                return whole[: places[0]], whole[places[0] + len(bare) :]
        return [], []  # no token of it is ever found in a text

    def _special(self, name: str | None, written: list[int], usual: tuple[str, ...], named: set[str]) -> int | None:
        if name is None and len(written) == 1:
            return written[0]
        chosen = name if name is not None else next((token for token in usual if token in named), None)
        return None if chosen is None else self.id_of(chosen)

    @property
    def symbols(self) -> list[str]:
        return self._symbols

    @property
    def has_tree(self) -> bool:
        return True

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token_of(self, number: int) -> str:
        return self.backend.id_to_token(number) or ""

    def written(self, number: int) -> Written:
        token = self.token_of(number)
        if number in self.byte_of:
            return of_byte(self.byte_of[number])
        return Written(token, number in self.added)

    def spelled(self, token: Written) -> list[int] | None:
        if token.is_text:
            ids = self._within_text.encode(token.text, add_special_tokens=False).ids
            whole = all(self._leaves_nothing(cut) for cut in self._cut(token.text))
        elif not self._writes_pieces_as_text:
            return None
        else:  # before it come neither what text is cut into nor what is put before it
            ids = [part.id for part in self.backend.model.tokenize(token.text)]
            whole = self._leaves_nothing(token.text)
        return ids if whole and self.unknown not in ids else None

    def _cut(self, text: str) -> list[str]:
        """What the model is given of a text, one after the other."""
        normalizer, pre_tokenizer = self._within_text.normalizer, self._within_text.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if pre_tokenizer is None else [cut for cut, _ in pre_tokenizer.pre_tokenize_str(text)]

    def _leaves_nothing(self, cut: str) -> bool:
        """A BPE without a piece for what it does not know leaves that out, and says nothing."""
        if self._model["type"] != "BPE" or self.unknown is not None:
            return True
        parts = self.backend.model.tokenize(cut)
        return bool(parts) and parts[-1].offsets[1] == len(cut.encode())

    @cached_property
    def _within_text(self) -> Any:
        """The same tokenizer, of text that stands within another."""
        tree = json.loads(self.backend.to_str())
        tree |= {key: _without_ends(tree[key]) for key in ("normalizer", "pre_tokenizer")}
        return tokenizers.Tokenizer.from_str(json.dumps(tree))

    @cached_property
    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = json.loads(self.backend.to_str())["model"]
        return model

    @cached_property
    def byte_of(self) -> dict[int, int]:
        """Ids that stand for a byte of a character that the vocabulary lacks, and that byte."""
        vocab = self.backend.get_vocab(with_added_tokens=False) if self._model.get("byte_fallback") else {}
        pieces = {number: token for token, number in vocab.items() if BYTE_PIECE.fullmatch(token)}
        return {number: int(token[3:-1], 16) for number, token in pieces.items() if number not in self.added}

    @property
    def unlearnable(self) -> str | None:
        """Why no merges can be added to it; None where they can."""
        if (kind := self._model["type"]) != "BPE":
            return f"is of the kind {kind}, and only one of byte-pair encoding (BPE) learns new pieces"
        if not self._writes_pieces_as_text:
            return "marks the pieces that go on with a word or end one, and such a one learns no new pieces"
        return None

    @property
    def _writes_pieces_as_text(self) -> bool:
        """And does not mark those that go on with a word, or end one."""
        marks = self._model.get("continuing_subword_prefix"), self._model.get("end_of_word_suffix")
        return self._model["type"] in ("BPE", "Unigram") and not any(marks)

    @property
    def unknown(self) -> int | None:
        """The id of what the vocabulary has no piece for."""
        token = self._model.get("unk_token")
        return self._model.get("unk_id") if token is None else self.id_of(token)


def _without_ends(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A step of tokenizer.json without what it does where a text begins and ends."""
    if step is None or step["type"] in ("Prepend", "Strip"):
        return None
    pattern = step.get("pattern")
    if step["type"] == "Replace" and isinstance(pattern, dict) and AT_ENDS.search(pattern.get("Regex", "")):
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    step = step | {key: value for key, value in never.items() if key in step}
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            step[key] = [part for part in map(_without_ends, step[key]) if part is not None]
    return step


def read_tree(files: TokenizerFiles) -> Fast:
    """The tokenizer of a tokenizer.json; what lies beside it names its special tokens. Raises `UserError`."""
    names = files.special("bos_token"), files.special("eos_token")
    try:
        fast = Fast(tokenizers.Tokenizer.from_buffer(files.raw), *names)
    except Exception as error:  # the library raises nothing narrower
        tree, remedy = files.tree(TREE), "give its directory's tokenizer.json"
        if "model" in tree:
            raise files.fault(f"cannot be read by the library tokenizers ({shown(str(error))})") from error
        if "vocab" in tree and "config" in tree:
            raise files.fault("is a tekken file of mistral-common, which is not read", remedy) from error
        raise files.fault(f"is JSON, and no {TREE}: it has no model", remedy) from error
    for number in (*fast.prefix, *fast.suffix):
        if not fast.token_of(number):
            raise files.fault(f"its post-processor writes the id {number} around a text, which is no token of it")
    return fast
