"""Text to token files: reading documents, encoding them in several processes, writing all files or none."""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from megabus.data.indexed import IndexedWriter, dtype_for_vocab, meta_path
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.errors import UserError

# What a file name ends with (less .gz or .zst) -> the `datasets` builder that reads it, None for plain text.
BUILDERS = {".txt": None, ".jsonl": "json", ".parquet": "parquet"}
BATCH_CHARACTERS = 1 << 20
PROGRESS_SECONDS = 5.0


# ---- reading ----------------------------------------------------------------------------------------------


def read_documents(args: argparse.Namespace) -> Iterator[str]:
    """Every document of the inputs in a fixed order, less those of white space only."""
    if args.dataset:
        source = table_documents("dataset", args.dataset, args.text_key, args.dataset, args.subset, args.split)
    else:
        source = (text for path in expand_inputs(args.inputs) for text in file_documents(path, args))
    return (text for text in source if text and not text.isspace())


def expand_inputs(patterns: list[str]) -> list[Path]:
    """Files named, matched, or lying under the directories named: sorted within each pattern."""
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in BUILDERS)
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise UserError("input", pattern, "no readable file is there", "check the path or quote the glob")
        files += found
    return files


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def file_documents(path: Path, args: argparse.Namespace) -> Iterator[str]:
    kind = _kind(path)
    if kind not in BUILDERS or (kind == ".txt" and path.suffix == ".zst"):
        raise UserError("input", path, "unknown kind of file", "give .txt[.gz], .jsonl[.gz|.zst] or .parquet")
    builder = BUILDERS[kind]
    if builder is None:
        return text_documents(path, args.split_documents)
    return table_documents("input", str(path), args.text_key, builder, data_files=str(path))


def text_documents(path: Path, split_documents: str) -> Iterator[str]:
    """Documents of one UTF-8 text file, split as --split-documents says."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if split_documents == "file":
                yield file.read()
            elif split_documents == "line":
                yield from (line.rstrip("\n") for line in file)
            else:
                yield from _between_blank_lines(file)
    except UnicodeDecodeError as error:
        raise UserError("input", path, f"is not UTF-8 ({error})", "convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("input", path, f"cannot be read ({error})", "check the file") from error


def _between_blank_lines(file: IO[str]) -> Iterator[str]:
    """Two blank lines in a row, or more, end a document; a single one is a paragraph break inside it."""
    document: list[str] = []
    blank = 0
    for line in file:
        blank = 0 if line.strip() else blank + 1
        if blank == 2:
            yield "".join(document).strip("\n")
            document.clear()
        document.append("\n" if blank else line)
    yield "".join(document).strip("\n")


def table_documents(
    key: str, name: str, text_key: str, path: str, subset: str | None = None, split: str = "train", **options: Any
) -> Iterator[str]:
    """The column `text_key` of what `datasets.load_dataset(path, subset, ...)` streams.

    `key` and `name` say in an error where the rows came from.
    """
    import datasets  # seconds to import, and plain text does without

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what is raised below anyway
    try:
        rows = datasets.load_dataset(path, subset, split=split, streaming=True, **options)
        for number, row in enumerate(rows):
            if not isinstance(row.get(text_key), str):
                problem = f"row {number} has no text under '{text_key}', its keys are {', '.join(row)}"
                raise UserError(key, name, problem, "set --text-key")
            yield row[text_key]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = "check the file (.zst needs zstandard)" if key == "input" else "check name, subset and split"
        raise UserError(key, name, f"cannot be read ({error})", remedy) from error


# ---- encoding ---------------------------------------------------------------------------------------------

# Of a batch: [(is it a validation document, its ids)], and the batch's size in bytes.
Encoded = tuple[list[tuple[bool, np.ndarray]], int]

_tokenizer: Tokenizer  # one per process: `start_worker` loads it


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to know; `encode` is a pure function of its batch."""

    tokenizer_path: Path
    valid_fraction: float
    append_eod: bool

    def encode(self, texts: list[str]) -> Encoded:
        end = [_tokenizer.eod] if self.append_eod else []
        dtype = dtype_for_vocab(_tokenizer.vocab_size)
        documents = [
            (is_validation(text, self.valid_fraction), np.array(_tokenizer.encode(text) + end, dtype=dtype))
            for text in texts
        ]
        return documents, sum(len(text.encode()) for text in texts)


def start_worker(tokenizer_path: Path) -> None:
    """Loads the tokenizer once per process, where Encoder.encode finds it."""
    global _tokenizer
    _tokenizer = Tokenizer(tokenizer_path)


def is_validation(text: str, fraction: float) -> bool:
    """Whether the hash of the text falls in `fraction`: equal texts stay on one side, in whatever order."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Batches of whole documents, about BATCH_CHARACTERS characters each."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(encoder: Encoder, texts: Iterable[str], workers: int) -> Generator[Encoded, None, None]:
    """encoder.encode of every batch, in order; at most four batches per worker are in flight."""
    if workers == 1:
        start_worker(encoder.tokenizer_path)
        yield from map(encoder.encode, in_batches(texts))
        return
    # Spawned, not forked: `datasets` has started threads, whose locks a fork would copy as they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (encoder.tokenizer_path,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in in_batches(texts):
            pending.append(pool.submit(encoder.encode, batch))
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the whole run ----------------------------------------------------------------------------------------


def preprocess(args: argparse.Namespace) -> str:
    """Writes all files beside their final place, then renames them. Returns the closing line."""
    output = Path(args.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as stage:
            documents, tokens, rate = write_corpora(args, Path(stage) / output.name)
            files = [staged.replace(output.parent / staged.name) for staged in sorted(Path(stage).iterdir())]
    except OSError as error:
        raise UserError("output", output, f"cannot be written ({error})", "choose another prefix") from error
    return f"{documents} documents, {tokens} tokens, {rate:.0f} tokens/s: {', '.join(map(str, files))}"


def write_corpora(args: argparse.Namespace, prefix: Path) -> tuple[int, int, float]:
    """Writes every file at `prefix`. Returns its documents, tokens, and tokens encoded per second."""
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if args.valid_fraction:
        check_both_sides(args)  # before the hours that what follows may take
    if tokenizer is None:
        tokenizer = Tokenizer(train_on_inputs(args, f"{prefix}-tokenizer"))
    suffixes = ["-train", "-valid"] if args.valid_fraction else [""]
    encoder = Encoder(tokenizer.path, args.valid_fraction, args.append_eod)
    progress = Progress()
    with ExitStack() as stack:
        dtype = dtype_for_vocab(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedWriter(f"{prefix}{suffix}", dtype)) for suffix in suffixes]
        batches = stack.enter_context(closing(encode_all(encoder, read_documents(args), args.workers)))
        for documents, n_bytes in batches:
            for is_valid, ids in documents:
                writers[is_valid].append(ids)
            progress.add(n_bytes, sum(ids.size for _, ids in documents))
        rate = progress.n_tokens / progress.seconds
        for writer, suffix in zip(writers, suffixes, strict=True):
            if not writer.n_documents:
                raise no_documents(args, suffix, sum(writer.n_documents for writer in writers))
    for writer, suffix in zip(writers, suffixes, strict=True):
        meta = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "eod": tokenizer.eod,
            "n_documents": writer.n_documents,
            "n_tokens": writer.n_tokens,
            "dtype": dtype.name,
            "bin_sha256": writer.sha256,
        }
        meta_path(f"{prefix}{suffix}").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return sum(writer.n_documents for writer in writers), progress.n_tokens, rate


def check_both_sides(args: argparse.Namespace) -> None:
    """Raises `UserError` if no document falls to training, or none to validation; reads until there is one of each."""
    found: Counter[bool] = Counter()
    for text in read_documents(args):
        found[is_validation(text, args.valid_fraction)] += 1
        if len(found) == 2:
            return
    raise no_documents(args, "-valid" if found[False] else "-train", found.total())


def no_documents(args: argparse.Namespace, suffix: str, n_documents: int) -> UserError:
    problem = f"gives {n_documents} document(s), of which none goes to {args.output}{suffix}"
    remedy = "give more files, make documents smaller (--split-documents line) or try another --valid-fraction"
    return UserError("input", " ".join(args.inputs) or args.dataset, problem, remedy if suffix else "give more text")


def train_on_inputs(args: argparse.Namespace, out_prefix: str) -> Path:
    """Trains a tokenizer on the first --tokenizer-sample-mb of the training documents."""

    def sample() -> Iterator[str]:
        left = args.tokenizer_sample_mb * 1e6
        for text in read_documents(args):
            if left <= 0:
                return
            if not is_validation(text, args.valid_fraction):
                left -= len(text.encode())
                yield text

    started, texts = time.monotonic(), sample()
    first = next(texts, None)
    if first is None:
        raise no_documents(args, "", 0)
    path = train_tokenizer(chain([first], texts), args.train_tokenizer, out_prefix, args.model_type, args.normalization)
    print(f"tokenizer: {args.train_tokenizer} pieces in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return path


class Progress:
    """Says on stderr, every few seconds, how far the run is and how fast it goes."""

    def __init__(self) -> None:
        self.started = self.reported = time.monotonic()
        self.n_bytes = self.n_tokens = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, n_bytes: int, n_tokens: int) -> None:
        self.n_bytes += n_bytes
        self.n_tokens += n_tokens
        if time.monotonic() - self.reported >= PROGRESS_SECONDS:
            self.reported = time.monotonic()
            megabytes = self.n_bytes / 1e6
            speed = f"{megabytes / self.seconds:.1f} MB/s, {self.n_tokens / self.seconds:.0f} tokens/s"
            print(f"{megabytes:.0f} MB, {self.n_tokens} tokens, {speed}", file=sys.stderr)
