"""What lies beside the weights in a Hugging Face directory: tokenizer, special tokens, longest context."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece

from megabus.checkpoint.contents import TOKENIZER
from megabus.errors import UserError
from megabus.plain_file import parse_json, read_regular

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    TOKENIZER,
)
REMEDY = "give a Hugging Face directory with safetensors weights"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


BLOBS, SNAPSHOTS = "blobs", "snapshots"  # of a model in the hub's cache, whose snapshots hold links to its blobs


def inside(path: Path) -> Path:
    """What a file of a directory is, or leads to. Raises `UserError` for a link out of the directory, unless to the
    blobs of the same model in the hub's cache: else whoever makes a directory has any file of ours read or copied."""
    try:
        folder, found = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise UserError("Hugging Face directory", path, f"cannot be read ({error})", REMEDY) from error
    blobs = [folder.parents[1] / BLOBS] if folder.parent.name == SNAPSHOTS else []
    if not any(found.is_relative_to(root) for root in (folder, *blobs)):
        problem = f"is a link to {found}, outside of the directory"
        raise UserError("Hugging Face directory", path, problem, "copy there what it links to, if you trust it")
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        tree = parse_json(read_regular(inside(path)))
    except (OSError, ValueError) as error:
        raise UserError("Hugging Face directory", path, f"cannot be read ({error})", REMEDY) from error
    if not isinstance(tree, dict):
        raise UserError("Hugging Face directory", path, "holds no keys", "restore it from another copy")
    return tree


def tokenizer_of(folder: Path) -> Path | None:
    """Its SentencePiece model, if it has one. (Llama 3's tokenizer.model is none.)"""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    inside(path)
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        return None
    return path


def rest_of(folder: Path, config: dict[str, Any], tokenizer: Path | None) -> list[str]:
    """Files and keys that only another Hugging Face directory can take up (`copy_rest`). None of a megabus export: its
    own come from its SentencePiece model and its run."""
    if "megabus" in config:
        return []
    files = [name for name in TOKENIZER_FILES if (folder / name).exists() and (tokenizer is None or name != TOKENIZER)]
    return files + [key for key in KEYS if config.get(key) is not None]


def copy_rest(like: Path, out: Path, vocab_size: int) -> dict[str, Any]:
    """Copy `like`'s tokenizer files to `out`; its keys of config.json that go with them."""
    config = read_json(like / "config.json")
    if config.get("vocab_size") != vocab_size:
        problem = f"has vocab_size {config.get('vocab_size')}, the model {vocab_size}"
        raise UserError("--like", like, problem, "give the directory that the model came from")
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copyfile(inside(like / name), out / name)
    return {key: config[key] for key in KEYS if config.get(key) is not None}
