"""Documents of a data set of the Hugging Face hub, or of a local folder that is laid out as one."""

from __future__ import annotations

import codecs
import os
import tempfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

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
from megabus.errors import UserError

# How `datasets` would read a file -> what its name ends with if we can. Its own readers type every column by what comes
# first, and fail where another type follows.
READ_HERE = {"json": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}

RETRYING = "datasets.utils.file_utils"  # whose logger tells it


def scripts_of(name: str) -> list[Path]:
    """The files of code in a data set that is a local folder: they are passed over, none is run."""
    folder = Path(name)
    return sorted(folder.glob("*.py")) if folder.is_dir() else []


def dataset_documents(name: str, subset: str | None, split: str, text_key: str) -> Iterator[str]:
    """The text of every row of a split, streamed. Raises UserError for what cannot be had."""
    datasets = _library()
    try:
        try:
            # Of a folder that is called as its script is the library refuses all, of the same folder's "." nothing.
            folder = os.path.join(name, os.curdir) if scripts_of(name) else name
            builder = datasets.load_dataset_builder(folder, subset)
        except RuntimeError as error:  # a script that would load it, in a file or on the hub: none is run
            raise UserError("dataset", name, f"cannot be read ({error})", "give its files as inputs") from error
        files = (builder.config.data_files or {}).get(split, [])
        endings = READ_HERE.get(type(builder).__module__.rpartition(".")[2], ())
        if files and all(file.removesuffix(_packed(file)).endswith(endings) for file in files):
            for file in files:
                yield from _file_documents(builder, file, text_key)
        else:
            for number, row in enumerate(builder.as_streaming_dataset(split)):
                yield text_of(row, text_key, "dataset", name, f"row {number}")
    except (OSError, EOFError, ValueError, zlib.error, datasets.exceptions.DatasetsError) as error:
        raise UserError("dataset", name, f"cannot be read ({error})", "check name, subset and split") from error


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
