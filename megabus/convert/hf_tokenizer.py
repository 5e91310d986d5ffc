"""A run's tokenizer as Hugging Face's `tokenizer.json` and what transformers reads beside it.

Files that came as such go out as they are. What SentencePiece or a rank file says is told in the library's own terms;
transformers' conversion of a Llama would put a space before the text, which our tokenizers do not have. That ids are
the same is found out by both on a few hundred odd lines.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from megabus.convert.hf_rest import without_code
from megabus.data.tokenizer import Tokenizer
from megabus.data.tokenizer.fast import Fast
from megabus.data.tokenizer.files import CONFIG, MODEL, TREE
from megabus.data.tokenizer.odd_text import Difference, differences, odd_lines
from megabus.data.tokenizer.sentence_piece import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePiece,
)
from megabus.data.tokenizer.spelling import SPACE
from megabus.errors import UserError, warn
from megabus.plain_file import shown

MANY = 1 << 20  # spaces that a text may begin with
NEVER = -1e9  # a score that no way through a text affords


def write_tokenizer(path: Path, out: Path) -> dict[str, int | None]:
    """Write tokenizer.json, tokenizer_config.json and the files they are made of; the special ids for config.json.

    Warns of ids that are not the original's, and says what to do about it.
    """
    tokenizer = Tokenizer(path)
    tokenizer.files.write(out)
    codec = tokenizer.codec
    names = {name: None if i is None else codec.token_of(i) for name, i in (("bos", codec.bos), ("eos", codec.eos))}
    if isinstance(codec, SentencePiece):
        names |= {
            name: None if i is None else codec.token_of(i) for name, i in (("unk", codec.unk), ("pad", codec.pad))
        }
        tree = _tree(codec, {*names.values()})
        (out / TREE).write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    elif isinstance(codec, Fast) and tokenizer.kind == "tiktoken":
        (out / TREE).write_text(codec.backend.to_str(), encoding="utf-8")
    else:
        names["pad"] = tokenizer.files.special("pad_token")
    pad, theirs = names.get("pad"), tokenizer.files.tree(CONFIG)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": token for name, token in names.items() if token is not None}
    if tokenizer.kind != "tokenizers":  # the class that reads a model itself knows what these files may leave out
        settings |= {key: value for key, value in theirs.items() if value is not None}
    elif theirs:
        settings = theirs
    (out / CONFIG).write_text(without_code(settings), encoding="utf-8")
    _compare(tokenizer, Tokenizer(out))
    return {
        "bos_token_id": codec.bos,
        "eos_token_id": codec.eos,
        "pad_token_id": None if pad is None else codec.id_of(pad),
    }


def _compare(ours: Tokenizer, exported: Tokenizer) -> None:
    if isinstance(ours.codec, SentencePiece) and isinstance(exported.codec, Fast):
        exported.codec.backend.encode_special_tokens = True  # that text spells them makes these alone differ by design
    lines = odd_lines(ours.codec.symbols)
    remedy = f"Where your texts have such, encode them with the {MODEL} beside it"
    _tell(differences(lines, ours, exported.encode_batch), len(lines), f"the export's {TREE}", ours.name, remedy)


def compare_as_read(out: Path, whose: str = "the export's") -> None:
    """Warns where transformers' AutoTokenizer gives other ids than a directory's own tokenizer.json, or none.

    It cuts text as the class does that tokenizer_config.json or the model's kind names (tokenization_auto.py), whatever
    tokenizer.json says.
    """
    try:
        from transformers import AutoTokenizer, logging
    except ImportError:
        _not_compared(": it is not installed")
        return
    try:
        exported = Tokenizer(out)
    except UserError as error:  # of a directory that --like names
        _not_compared(f": {error}")
        return
    lines = odd_lines(exported.codec.symbols)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it knows no type of model that is ours, and need not
    try:
        theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        found = differences(lines, exported, lambda texts: theirs(texts, add_special_tokens=False)["input_ids"])
    except Exception as error:  # transformers raises whatever the files that others wrote lead it to
        _not_compared(f", which fails ({type(error).__name__}: {shown(str(error))})")
        return
    finally:
        logging.set_verbosity(verbosity)
    kind = type(theirs).__name__
    remedy = f"It follows its class {kind}: read the tokenizer with PreTrainedTokenizerFast.from_pretrained"
    _tell(found, len(lines), "transformers' AutoTokenizer", f"{whose} {TREE}", remedy)


def _not_compared(why: str) -> None:
    warn(f"the ids of {TREE} are not compared with those of transformers' AutoTokenizer{why}")


def _tell(found: list[Difference], n_lines: int, who: str, original: str, remedy: str) -> None:
    if found:
        first = min(found, key=lambda difference: len(difference.text))
        warn(
            f"{who} gives other ids than {original} for {len(found)} of {n_lines} odd texts, such as "
            f"{shown(first.text)}: {first.others}, not {first.ids}. {remedy}"
        )


def _tree(codec: SentencePiece, special: set[str | None]) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece model."""
    proto, kinds = codec.proto, {UNIGRAM: _unigram, BPE: _bpe}
    if not codec.has_tree:
        problem, remedy = "is neither unigram nor bpe", "train one of these, or export with --like"
        raise UserError("tokenizer", "SentencePiece model", problem, remedy)
    raw, late = _symbols(proto)
    highest = max((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)

    def score(piece: Any) -> float:
        if piece.type in (UNKNOWN, CONTROL, UNUSED):
            return NEVER  # these never match text in SentencePiece; tokenizers would try them
        if piece.type == USER_DEFINED:  # as SentencePiece's unigram_model.cc scores them
            return len(piece.piece.encode()) * highest - 0.1
        return piece.score

    pieces = [(piece.piece, score(piece)) for piece in proto.pieces]
    unigram = proto.trainer_spec.model_type == UNIGRAM
    cuts = [_spelled_bytes()] if unigram else [_kept_whole(late)] if late else []
    model = kinds[proto.trainer_spec.model_type](pieces, codec.unk, proto.trainer_spec.byte_fallback)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(proto, special, raw),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto)},
        "pre_tokenizer": cuts[0] if cuts else None,
        "post_processor": _post_processor(codec),
        "decoder": {"type": "Sequence", "decoders": _decoders(proto)},
        "model": model | ({"ignore_merges": True} if late and not unigram else {}),
    }


def _post_processor(codec: SentencePiece) -> dict[str, Any] | None:
    """What stands around a text, as transformers puts it there."""
    tokens = {codec.token_of(number): number for number in (*codec.prefix, *codec.suffix)}
    if not tokens:
        return None

    def around(text: str, side: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": codec.token_of(number), "type_id": side}} for number in ids]
            for ids in (codec.prefix, codec.suffix)
        )
        return [*before, {"Sequence": {"id": text, "type_id": side}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {one: {"id": one, "ids": [number], "tokens": [one]} for one, number in tokens.items()},
    }


def _symbols(proto: Any) -> tuple[set[str], list[str]]:
    """What the user defined: pieces to match in the raw text, and those to match once it is normalised.

    SentencePiece guards them from being normalised, which `tokenizers` does to those of the raw text, but it takes the
    text before and after one for two texts: then each would get a space before it, or lose those at its ends.
    """
    spec = proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if not (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        return set(pieces), []
    mapped = _mapping(spec)
    late = [piece for piece in pieces if mapped(piece) == piece]
    return set(pieces) - set(late), late


def _mapping(spec: Any) -> Callable[[str], str]:
    """What becomes of a text's characters, without what becomes of its white space."""
    if not spec.precompiled_charsmap:
        return lambda text: text
    return normalizers.Precompiled(spec.precompiled_charsmap).normalize_str


def _added(proto: Any, special: set[str | None], raw: set[str]) -> list[dict[str, Any]]:
    """Special tokens, and what the user defined: matched in the raw text before all else."""
    return [
        {
            "id": i,
            "content": piece.piece.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.piece in special,
        }
        for i, piece in enumerate(proto.pieces)
        if piece.piece in special or piece.piece in raw
    ]


def _normalizers(proto: Any) -> list[dict[str, Any]]:
    spec = proto.normalizer_spec
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        # Of letters with marks, of jamo and of \r\n `tokenizers` maps the first alone and loses the rest.
        if "nfkc" in spec.name:
            steps.append({"type": "NFKC"})
        line_end = "".join(map(_mapping(spec), "\r\n"))
        steps.append({"type": "Replace", "pattern": {"String": "\r\n"}, "content": line_end})
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    suffix = spec.add_dummy_prefix and proto.trainer_spec.treat_whitespace_as_suffix
    if spec.remove_extra_whitespaces:
        steps += [_replaced(r"\A +", ""), _replaced(" {2,}", " ")]
    if spec.add_dummy_prefix and not suffix:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if spec.remove_extra_whitespaces:
        steps.append(_replaced(rf"{SPACE}+\z", ""))
    return steps + ([_replaced(r"(?<=.)\z", SPACE)] if suffix else [])


def _replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoders(proto: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix and not proto.trainer_spec.treat_whitespace_as_suffix:
        start = MANY if spec.remove_extra_whitespaces else 1
        steps.append({"type": "Strip", "content": " ", "start": start, "stop": 0})
    return steps


def _kept_whole(symbols: list[str]) -> dict[str, Any]:
    """Cut what the user defined out of the text, the longest first."""
    pattern = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


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
