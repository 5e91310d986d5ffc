"""The files that a tokenizer is made of: found by what they hold, carried whole, and told apart by a hash.

What lies in them was written by others. It is parsed as plain data, never run, and links lead out of no directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megabus.errors import UserError
from megabus.hub import local_copy
from megabus.plain_file import NotPlainError, inside, parse_bulk_json, parse_json, read_regular, shown

TREE, MODEL = "tokenizer.json", "tokenizer.model"
# What transformers takes from beside a tokenizer.json: names of special tokens, and the chat's template.
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
ADDED = "added_tokens.json"  # what slow tokenizers of transformers add to a tokenizer.model
BESIDE = (CONFIG, MAP, ADDED, "chat_template.jinja")
FILES = (TREE, MODEL, *BESIDE)
KINDS = "a Hugging Face tokenizer.json, a SentencePiece model or a tiktoken rank file"
REMEDY = f"give {KINDS}, or a directory of one"
ANOTHER_COPY = "get it from another copy"
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?")  # a line of a tiktoken file: a token in base64, and its rank

Kind = Literal["tokenizers", "sentencepiece", "tiktoken"]


@dataclass(frozen=True)
class TokenizerFiles:
    """name: as it was given; path: the file or directory that it is; contents: bytes by name, of `FILES`."""

    name: str
    path: Path
    contents: Mapping[str, bytes]

    @property
    def main(self) -> str:
        return TREE if TREE in self.contents else MODEL

    @property
    def raw(self) -> bytes:
        return self.contents[self.main]

    @property
    def kind(self) -> Kind:
        if self.main == TREE:
            return "tokenizers"
        return "tiktoken" if _RANK.fullmatch(self.raw.partition(b"\n")[0]) else "sentencepiece"

    def fault(self, problem: str, remedy: str = ANOTHER_COPY) -> UserError:
        return UserError("tokenizer", self.name, problem, remedy)

    @cached_property
    def fingerprint(self) -> str:
        """Of the bytes themselves: whether files have changed."""
        return hashlib.sha256(self.raw).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """Of what decides ids. A tokenizer.json that transformers has saved anew is the same one."""
        return self.fingerprint if self.main == MODEL else hashlib.sha256(_canonical(self)).hexdigest()

    @property
    def known_as(self) -> frozenset[str]:
        """Hashes of all files that say what this tokenizer is: many directories hold it in two forms."""
        beside = [hashlib.sha256(self.contents[MODEL]).hexdigest()] if MODEL in self.contents else []
        return frozenset([self.sha256, *beside])

    def is_same(self, other: TokenizerFiles) -> bool:
        """Whether one of the two is another form of the other. That both came from one tokenizer.model, to which
        their makers have added other tokens, makes them no less different."""
        return self.sha256 in other.known_as or other.sha256 in self.known_as

    def tree(self, name: str) -> dict[str, Any]:
        """What a JSON file of these says; nothing where it is not there."""
        if name not in self.contents:
            return {}
        where = "" if name == TREE else f"{name} beside it "
        try:
            tree = (parse_bulk_json if name == TREE else parse_json)(self.contents[name])
        except ValueError as error:
            raise self.fault(f"{where}is not JSON ({error})") from error
        if not isinstance(tree, dict):
            raise self.fault(f"{where}holds no keys")
        return tree

    @property
    def added(self) -> list[tuple[Any, Any]]:
        """(token, id) of all that transformers adds to a tokenizer.model, as the files beside it say."""
        listed = self.tree(CONFIG).get("added_tokens_decoder")
        there = listed.items() if isinstance(listed, dict) else ()
        named = [(_content(one), number) for number, one in there]
        return [*self.tree(ADDED).items(), *named]

    @property
    def named(self) -> list[tuple[str, str]]:
        """(token, key) of the special tokens that the files beside it name, as transformers reads them."""
        settings = self.tree(CONFIG)
        said = [settings] if "added_tokens_decoder" in settings else [settings, self.tree(MAP)]
        found: list[tuple[str, str]] = []
        for key, value in ((key, value) for tree in said for key, value in tree.items()):
            if key.endswith("_token"):
                several = [value]
            elif key in ("additional_special_tokens", "extra_special_tokens"):
                several = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
            else:
                continue
            found += [(token, key) for token in map(_content, several) if isinstance(token, str) and token]
        return found

    def special(self, key: str) -> str | None:
        """The special token that tokenizer_config.json or special_tokens_map.json names under `key`. Raises `UserError`
        for what is no token: transformers would read none of the files."""
        for file in (CONFIG, MAP):
            said = self.tree(file).get(key)
            value = _content(said)
            if isinstance(value, str):
                return value
            if said is not None:
                raise self.fault(f"{file} beside it says {key} = {shown(said)}, which is no token", "restore it")
        return None

    def write(self, folder: Path) -> list[Path]:
        """All of them into a directory, under their names."""
        for name, raw in self.contents.items():
            (folder / name).write_bytes(raw)
        return [folder / name for name in self.contents]


def _content(token: Any) -> Any:
    """What a token is, which may be said with how it is matched."""
    return token.get("content") if isinstance(token, dict) else token


def read_tokenizer_files(name: str | os.PathLike[str]) -> TokenizerFiles:
    """name: a file, a directory, or a tokenizer's name on the Hugging Face hub. Raises `UserError`.

    A directory is read as transformers reads it: its tokenizer.json, and its tokenizer.model where it has no other.
    """
    text = os.fspath(name)
    path = local_copy(text, FILES, "tokenizer")
    try:
        if path.is_dir():
            contents = _of_folder(path)
        elif path.name in (TREE, MODEL) and path.is_file():  # with what goes with it, as its directory is read
            others = BESIDE if path.name == MODEL else FILES[1:]
            contents = {path.name: read_regular(path, links=True)} | _of_folder(path.parent, others)
        else:
            raw = read_regular(path, links=True)
            contents = {TREE if raw.lstrip()[:1] in (b"{", b"[") else MODEL: raw}
    except FileNotFoundError as error:
        raise UserError("tokenizer", text, "the file does not exist", "check the path or train one") from error
    except OSError as error:
        raise UserError("tokenizer", text, f"cannot be read ({error.strerror})", REMEDY) from error
    except NotPlainError as error:
        raise UserError("tokenizer", text, str(error), REMEDY) from error
    if not contents.keys() & {TREE, MODEL}:
        problem, remedy = f"holds no {TREE} and no {MODEL}", REMEDY
        if (path / "vocab.json").exists() or (path / "vocab.txt").exists():
            remedy = f"make its {TREE} in transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise UserError("tokenizer", text, problem, remedy)
    return TokenizerFiles(text, path, contents)


def _of_folder(folder: Path, names: tuple[str, ...] = FILES) -> dict[str, bytes]:
    found = [name for name in names if os.path.lexists(folder / name)]
    return {name: read_regular(inside(folder / name), links=True) for name in found}


def _canonical(files: TokenizerFiles) -> bytes:
    tree = files.tree(TREE)
    tree = {key: value for key, value in tree.items() if key not in ("truncation", "padding")}
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):  # "a b" before tokenizers 0.20
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        tree["model"] = model | {"merges": merges}
    return json.dumps(tree, sort_keys=True).encode()
