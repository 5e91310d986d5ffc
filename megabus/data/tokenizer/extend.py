"""A tokenizer with more tokens, or with pieces learnt from text. Its own keep their ids: a model can go on with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.models import Unigram

from megabus.data.tokenizer.face import Tokenizer
from megabus.data.tokenizer.fast import Fast
from megabus.data.tokenizer.files import ADDED, BESIDE, CONFIG, MODEL, TREE
from megabus.data.tokenizer.learn import Lesson
from megabus.data.tokenizer.sentence_piece import BPE, USER_DEFINED, SentencePiece
from megabus.data.tokenizer.spelling import SPACE, Written, is_utf8, spellings
from megabus.durable import partial_name, sync
from megabus.errors import UserError
from megabus.plain_file import shown


def extend_tokenizer(
    name: str | os.PathLike[str],
    texts: Sequence[str],
    special: Sequence[str],
    out: Path,
    listed: Sequence[str] = (),
    lesson: Lesson | None = None,
) -> dict[int, list[int]]:
    """Write the directory `out`: the tokenizer with tokens for `texts` and, of a tokenizer.json, for `special`, which
    are left out when ids become text; behind them what a `lesson` gives. Each new id -> the old ids that spell it.

    Tokens are matched in raw text before all else, the longest first. Learnt pieces are byte-pair encoding's: their
    merges come after all that were there, so text that holds none of them keeps its ids. A rank file, which cannot hold
    either, becomes a tokenizer.json; of a directory that holds a tokenizer in two forms the tokenizer.json is extended,
    and the other form left out. listed: texts too, which came in a file. Raises `UserError`, and leaves nothing
    half-written.
    """
    old = Tokenizer(name)
    if lesson is not None:
        _check_learns(old, lesson.n)
    seen: set[str] = set()
    _check_new(old, "--add", texts, seen)
    _check_new(old, "--add-file", listed, seen)
    _check_new(old, "--special", special, seen)
    texts = [*texts, *listed]
    if not (texts or special or lesson):
        remedy = "give tokens, or --special ones, or --learn pieces from text"
        raise UserError("--add", "(missing)", "there is nothing to add", remedy)
    if out.exists():
        raise UserError("out", out, "exists", "choose another, or remove it")
    contents = {file: raw for file, raw in old.files.contents.items() if file in BESIDE and file != ADDED}
    contents |= _extended(Tokenizer(name), texts, special, lesson)
    partial = partial_name(out)
    try:
        partial.mkdir(parents=True)
        try:
            for file, raw in contents.items():
                (partial / file).write_bytes(raw)
                sync(partial / file)
            try:
                spelled = spellings(old, Tokenizer(partial))
            except UserError as error:  # which would name a directory that is no more
                raise UserError("tokenizer", old.name, f"as it is extended {error.problem}", error.remedy) from error
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError("out", out, f"cannot be written ({error})", "make room or choose another place") from error
    return spelled


def _check_learns(tokenizer: Tokenizer, n: int) -> None:
    words = "give words to --add or --add-file, which any tokenizer takes"
    if isinstance(tokenizer.codec, SentencePiece):
        problem, remedy = "is a SentencePiece model, which learns no new pieces", words
        if tokenizer.codec.proto.trainer_spec.model_type == BPE:
            tree = "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            remedy = f"give its {TREE}, which transformers makes ({tree}), or {words}"
        raise UserError("--learn", n, f"{tokenizer.name} {problem}", remedy)
    assert isinstance(tokenizer.codec, Fast)
    if (why := tokenizer.codec.unlearnable) is not None:
        raise UserError("--learn", n, f"{tokenizer.name} {why}", words)


def _check_new(tokenizer: Tokenizer, option: str, texts: Sequence[str], seen: set[str]) -> None:
    """seen: what is to be added, to which these come."""
    codec = tokenizer.codec
    for text in texts:
        if not text:
            raise UserError(option, "''", "is no text", "leave it out")
        if not is_utf8(text):
            raise UserError(option, shown(text), "is no UTF-8", "give it in such a terminal, or in a file")
        piece = _as_piece(text) if isinstance(codec, SentencePiece) else text
        if piece in seen:
            raise UserError(option, text, "is given twice", "give it once")
        seen.add(piece)
        number, ids = codec.id_of(piece), codec.spelled(Written(text, is_text=True))
        if number is not None or (ids and len(ids) == 1):
            known = ids[0] if number is None and ids else number
            raise UserError(option, text, f"is a piece of {tokenizer.name} already ({known})", "leave it out")
        if not ids:
            problem, remedy = f"cannot be spelled by {tokenizer.name}", "leave it out: its row would be made of nothing"
            raise UserError(option, text, problem, remedy)


def _as_piece(text: str) -> str:
    """How SentencePiece writes it."""
    return text.replace(" ", SPACE)


def _extended(
    tokenizer: Tokenizer, texts: Sequence[str], special: Sequence[str], lesson: Lesson | None
) -> dict[str, bytes]:
    """The files that hold the tokens, by name."""
    codec = tokenizer.codec
    if isinstance(codec, SentencePiece):
        if special:
            problem = "would never be found in text: SentencePiece's control symbols are not"
            raise UserError("--special", special[0], problem, "give it to --add")
        return {MODEL: _with_pieces(codec.proto, texts)}
    assert isinstance(codec, Fast)
    backend = codec.backend
    if backend.get_vocab_size(with_added_tokens=True) < codec.n_ids and not isinstance(backend.model, Unigram):
        # The library would number them by how many there are: where ids have gaps, with those of others.
        backend = with_vocab(codec, [*texts, *special])
    # As they stand there: what normalises the text would have to be undone in them.
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if lesson is not None:
        codec = Fast(backend)
        lesson.learn(codec)
        merges = [list(piece.merged) for piece in lesson.pieces if piece.merged is not None]
        backend = with_vocab(codec, [piece.text for piece in lesson.pieces], merges)
    files = {TREE: backend.to_str().encode()}
    if tokenizer.kind == "tiktoken":  # whose file names none
        names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        settings = {name: codec.token_of(number) for name, number in names.items() if number is not None}
        files[CONFIG] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings, indent=2).encode()
    return files


def with_vocab(codec: Fast, texts: Sequence[str], merges: Sequence[list[str]] = ()) -> tokenizers.Tokenizer:
    """The same with pieces after all its ids, and merges after all its own."""
    tree = json.loads(codec.backend.to_str())
    # Added tokens too: reading a file, the library would number anew those that the model's own vocabulary lacks.
    vocab = codec.backend.get_vocab(with_added_tokens=True)
    model = tree["model"]
    model["vocab"] = vocab | {text: number for number, text in enumerate(texts, codec.n_ids)}
    if merges:
        model["merges"] += merges
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def _with_pieces(proto: Any, texts: Sequence[str]) -> bytes:
    for text in texts:
        proto.pieces.add(piece=_as_piece(text), score=0.0, type=USER_DEFINED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    raw: bytes = proto.SerializeToString()
    return raw
