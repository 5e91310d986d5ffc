"""What lies beside the weights in a Hugging Face directory: tokenizer, special tokens, longest context."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabus import plain_file
from megabus.data.tokenizer import FILES, Tokenizer, read_tokenizer_files, spellings
from megabus.data.tokenizer.files import CONFIG, MODEL, TREE
from megabus.errors import UserError
from megabus.plain_file import NotPlainError, parse_json, read_regular, shown

# What goes with a tokenizer, and what only another Hugging Face directory can take up.
GENERATION = "generation_config.json"
TOKENIZER_FILES = (*FILES, GENERATION, "vocab.json", "merges.txt")
REMEDY = "give a Hugging Face directory with safetensors weights"
CONTEXT = "max_position_embeddings"  # tokens of the longest sequence
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", CONTEXT)


def inside(path: Path) -> Path:
    """What a file of a directory is, or leads to. Raises `UserError` for a link out of it (see `plain_file.inside`)."""
    try:
        return plain_file.inside(path)
    except OSError as error:
        raise UserError("Hugging Face directory", path, f"cannot be read ({error})", REMEDY) from error
    except NotPlainError as error:
        remedy = "copy there what it links to, if you trust it"
        raise UserError("Hugging Face directory", path, str(error), remedy) from error


def _there(folder: Path, names: Sequence[str]) -> list[str]:
    """Those names that a directory has, whatever it is that has them."""
    return [name for name in names if os.path.lexists(folder / name)]


def _read(path: Path) -> bytes:
    try:
        return read_regular(inside(path))
    except NotPlainError as error:
        raise UserError("Hugging Face directory", path, str(error), REMEDY) from error
    except OSError as error:
        raise UserError("Hugging Face directory", path, f"cannot be read ({error.strerror})", REMEDY) from error


def read_json(path: Path) -> dict[str, Any]:
    raw = _read(path)
    try:
        tree = parse_json(raw)
    except ValueError as error:
        raise UserError("Hugging Face directory", path, f"cannot be read ({error})", REMEDY) from error
    if not isinstance(tree, dict):
        raise UserError("Hugging Face directory", path, "holds no keys", "restore it from another copy")
    return tree


def tokenizer_of(folder: Path) -> tuple[Path | None, str]:
    """The directory, if it has a tokenizer that can be read, and else why it is left behind."""
    there = _there(folder, FILES)
    for name in there:
        inside(folder / name)
    if not there:
        return None, ""
    try:
        Tokenizer(folder)
    except UserError as error:
        return None, f"{error.problem}; {error.remedy}"
    return folder, ""


def rest_of(folder: Path, config: dict[str, Any], tokenizer: Path | None) -> list[str]:
    """Files and keys that only another Hugging Face directory can take up (`copy_rest`). Of a megabus export the
    tokenizer at most, where that is left behind: all else comes from it and the run."""
    if "megabus" in config:
        return _there(folder, FILES) if tokenizer is None else []
    files = [name for name in _there(folder, TOKENIZER_FILES) if tokenizer is None or name not in FILES]
    return files + [key for key in KEYS if config.get(key) is not None]


def check_ids(config: dict[str, Any], vocab_size: int, key: str, name: object, remedy: str) -> None:
    """Raise `UserError` of `key` = `name` for a special token's id that a model of that vocabulary has not. A
    pad_token_id of -1 is none, as the first Llamas have it."""
    for word in (word for word in KEYS if word.endswith("_token_id")):
        said = config.get(word)
        for one in said if isinstance(said, list) else [said]:
            none = one is None or (one == -1 and word == "pad_token_id")
            if not none and (type(one) is not int or not 0 <= one < vocab_size):
                problem = f"has {word} = {shown(one)}, and the model ids below {vocab_size}"
                raise UserError(key, name, problem, remedy)


def without_code(config: dict[str, Any]) -> str:
    """A tokenizer_config.json without auto_map: it names code of others, which transformers would run beside an
    nGPT's own."""
    return json.dumps({key: value for key, value in config.items() if key != "auto_map"}, indent=2) + "\n"


def extends(own: Path, like: Path) -> bool:
    """Whether a tokenizer has all pieces of the one in the directory `like`, under the same ids, and more."""
    if not {TREE, MODEL} & {*_there(like, FILES)}:
        return False
    try:
        return bool(spellings(Tokenizer(like), Tokenizer(own)))
    except UserError:  # one cannot be read, or gives other ids
        return False


def copy_rest(like: Path, out: Path, vocab_size: int, own: Path | None, extended: bool = False) -> dict[str, Any]:
    """Copy `like`'s tokenizer files to `out`; its keys of config.json that go with them. own: the tokenizer that was
    saved with the weights, if one was: `like`'s must be the same, or else `extended` to it, and stays behind. Nothing
    is copied where anything is refused."""
    config, origin = read_json(like / "config.json"), "give the directory that the model came from"
    size = config.get("vocab_size")
    fits = extended and isinstance(size, int) and size <= vocab_size
    if size != vocab_size and not fits:
        remedy = (
            origin if own is None else f"{origin}, or leave --like out, and the tokenizer of the weights is written"
        )
        raise UserError("--like", like, f"has vocab_size {shown(size)}, the model {vocab_size}", remedy)
    check_ids(config, vocab_size, "--like", like, origin)
    there = _there(like, TOKENIZER_FILES)
    if GENERATION in there:
        check_ids(read_json(like / GENERATION), vocab_size, "--like", like / GENERATION, origin)
    if extended:
        there = [name for name in there if name == GENERATION]
    elif own is not None:
        if not {TREE, MODEL} & {*there}:
            problem = "has no tokenizer, and one was saved with the weights"
            raise UserError("--like", like, problem, "leave --like out, and that one is written")
        if not read_tokenizer_files(own).is_same(read_tokenizer_files(like)):
            problem = "has another tokenizer than the one that was saved with the weights"
            raise UserError("--like", like, problem, origin)
    for name in there:
        (out / name).write_bytes(_read(like / name))
    if CONFIG in there:
        (out / CONFIG).write_text(without_code(read_json(like / CONFIG)), encoding="utf-8")
    return {key: config[key] for key in KEYS if config.get(key) is not None}
