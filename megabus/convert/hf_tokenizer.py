"""A SentencePiece tokenizer as Hugging Face's `tokenizer.json`, which gives the same ids.

transformers' own Llama conversion would put a space before the text, which our tokenizers do not have.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megabus.checkpoint.contents import TOKENIZER
from megabus.errors import UserError

SPACE = "▁"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of SentencePiece's pieces
NEVER = -1e9  # a score that no way through a text affords


def write_tokenizer(model: Path, out: Path) -> dict[str, int | None]:
    """Write tokenizer.json, tokenizer_config.json and the model itself; the special ids for config.json."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    kinds = {1: _unigram, 2: _bpe}
    if proto.trainer_spec.model_type not in kinds:
        raise UserError("tokenizer", model, "is neither unigram nor bpe", "export it yourself")
    # These never match text in SentencePiece; tokenizers would try them.
    pieces = [(piece.piece, NEVER if piece.type in (CONTROL, UNUSED) else piece.score) for piece in proto.pieces]
    named = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id(), "pad": processor.pad_id()}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(proto, set(named.values())),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto)},
        "pre_tokenizer": _spelled_bytes() if proto.trainer_spec.model_type == 1 else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(proto)},
        "model": kinds[proto.trainer_spec.model_type](pieces, processor.unk_id(), proto.trainer_spec.byte_fallback),
    }
    (out / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    tokens = {f"{name}_token": pieces[i][0] for name, i in named.items() if i >= 0}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shutil.copyfile(model, out / TOKENIZER)
    return {f"{name}_token_id": i if i >= 0 else None for name, i in named.items() if name != "unk"}


def _added(proto: Any, special: set[int]) -> list[dict[str, Any]]:
    """Special tokens, and what the user defined: matched in the raw text before all else."""
    return [
        {
            "id": i,
            "content": piece.piece.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": i in special,
        }
        for i, piece in enumerate(proto.pieces)
        if i in special or piece.type == USER_DEFINED
    ]


def _normalizers(proto: Any) -> list[dict[str, Any]]:
    spec = proto.normalizer_spec
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _decoders(proto: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _spelled_bytes() -> dict[str, Any]:
    """Cut text that spells a byte's piece after its <: the unigram model of tokenizers would read it as that byte."""
    pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _unigram(pieces: list[tuple[str, float]], unk: int, byte_fallback: bool) -> dict[str, Any]:
    return {"type": "Unigram", "unk_id": unk, "vocab": pieces, "byte_fallback": byte_fallback}


def _bpe(pieces: list[tuple[str, float]], unk: int, byte_fallback: bool) -> dict[str, Any]:
    """SentencePiece merges whatever gives the best-scored piece; tokenizers wants the pairs in that order."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(ids[left], ids[right]) for left, right in cuts if left in ids and right in ids]
        merges += [(-score, pair) for pair in sorted(pairs)]
    merges.sort(key=lambda merge: merge[0])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unk][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[pieces[left][0], pieces[right][0]] for _, (left, right) in merges],
    }
