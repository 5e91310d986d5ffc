"""Documents of a data set of the Hugging Face hub, or of a local folder that is laid out as one."""

from __future__ import annotations

import codecs
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from yaml import YAMLError

from megabus.data.documents import (
    PACKED,
    Meter,
    json_documents,
    json_value,
    not_utf8,
    parquet_documents,
    text_of,
    unpacked,
)
from megabus.data.local_set import CARD, check_card, own_files, passed_over
from megabus.errors import UserError

# How `datasets` would read a file -> what its name ends with if we can. Its own readers type every column by what comes
# first, and fail where another type follows.
READ_HERE = {"json": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}

RETRYING = "datasets.utils.file_utils"  # whose logger tells it


def scripts_of(name: str) -> list[Path]:
    """The files of code in a data set that is a local folder: they are passed over, none is run."""
    folder = Path(name)
    return sorted(folder.glob("*.py")) if folder.is_dir() else []


class DataSet:
    """A split, opened. passed_over: what of a local folder is not read, a line each. Raises UserError for what cannot
    be had."""

    def __init__(self, name: str, subset: str | None, split: str) -> None:
        self.name, self.split = name, split
        self.passed_over: list[str] = []
        datasets = _library()
        self._wrong = (OSError, EOFError, ValueError, zlib.error, datasets.exceptions.DatasetsError)
        folder = Path(name) if os.path.isdir(name) else None
        if folder is not None:
            check_card(folder)
        with self._blaming():
            try:
                # Of a folder that is called as its script is the library refuses all, of its "." nothing.
                opened = os.path.join(name, os.curdir) if scripts_of(name) else name
                self._builder = datasets.load_dataset_builder(opened, subset)
            except (AttributeError, KeyError, TypeError, YAMLError) as error:
                if folder is None:
                    raise
                problem = f"is no card that can be read ({type(error).__name__}: {error})"
                raise UserError("dataset", folder / CARD, problem, "mend it") from error
            except RuntimeError as error:  # a script that would load it, in a file or on the hub: none is run
                raise UserError("dataset", name, f"cannot be read ({error})", "give its files as inputs") from error
        splits = {key: [*map(str, files)] for key, files in (self._builder.config.data_files or {}).items()}
        self._kind = type(self._builder).__module__.rpartition(".")[2]
        self._files = splits.get(split, [])
        if folder is not None:
            if scripts := scripts_of(name):
                names = ", ".join(path.name for path in scripts)
                self.passed_over.append(f"of {name} passed over: {names} (no code of a data set is run)")
            own_files(folder, chain(*splits.values()))
            self.passed_over += passed_over(folder, splits, split)
            self._files = own_files(folder, self._files)
            if splits.get(split):
                self._builder.config.data_files[split][:] = self._files
        self.reads_lines = self._kind == "text"  # each a document, as `datasets` has it

    def documents(self, text_key: str) -> Iterator[str]:
        """The text of every row, streamed."""
        endings = READ_HERE.get(self._kind, ())
        with self._blaming():
            if self._files and all(file.removesuffix(_packed(file)).endswith(endings) for file in self._files):
                for file in self._files:
                    yield from _file_documents(self._builder, file, text_key)
            else:
                for number, row in enumerate(self._builder.as_streaming_dataset(self.split)):
                    yield text_of(row, text_key, "dataset", self.name, f"row {number}")

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except self._wrong as error:
            raise UserError(
                "dataset", self.name, f"cannot be read ({error})", "check name, subset and split"
            ) from error


def _file_documents(builder: Any, file: str, text_key: str) -> Iterator[str]:
    """Of one file of a split, in this machine's file system or behind an address."""
    from datasets import DownloadConfig
    from datasets.utils.file_utils import xopen  # tries again when a connection fails

    access = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    with xopen(file, "rb", download_config=access) as raw:
        if file.endswith(".parquet"):
            yield from parquet_documents(raw, file, text_key, Meter(0))
        else:
            yield from _json_documents(unpacked(raw, _packed(file)), file, text_key)


def _json_documents(stream: IO[bytes], file: str, text_key: str) -> Iterator[str]:
    """Of one array, or of objects line by line: data sets call both .json."""
    first = stream.readline()
    if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            text = (first + stream.read()).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise not_utf8(file, error) from error
        for number, row in enumerate(json_value(text, file, "is", "mend the file")):
            found = row if isinstance(row, dict) else {"text": row}  # an array of texts, as `datasets` has it
            yield text_of(found, text_key, "input", file, f"entry {number}")
    else:
        yield from json_documents(chain([first], stream), file, text_key)


def _packed(file: str) -> str:
    return next((ending for ending in PACKED if file.endswith(ending)), "")


def _library() -> Any:
    """`datasets`, with a place to write to: it locks what it reads there. Raises UserError if there is none."""
    try:
        import datasets

        cache = Path(datasets.config.HF_DATASETS_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        named = [key for key in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME") if os.environ.get(key)]
        key = named[0] if named else "HF_HOME"
        raise UserError(
            key, os.environ.get(key), f"is no place for a cache ({error})", "name a writable folder"
        ) from error
    only_retries(datasets)
    return datasets


def only_retries(datasets: Any) -> None:
    """Let the library log no more than that a connection failed and is tried again: all else it raises too."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.logging.get_logger(RETRYING).setLevel(datasets.logging.WARNING)
