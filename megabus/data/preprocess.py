"""Text to token files: reading documents, encoding them in several processes, writing all files or none."""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path

from megabus.data.documents import Meter, file_documents
from megabus.data.encoding import Encoder, encode_all, is_validation
from megabus.data.hub import DataSet
from megabus.data.indexed import IndexedWriter, dtype_for_vocab, meta_path, pair_paths
from megabus.data.inputs import expand_inputs
from megabus.data.staging import all_or_none
from megabus.data.tokenizer import NO_TREE, Tokenizer, train_tokenizer, trained_path
from megabus.errors import UserError, note, warn
from megabus.table import clock

PROGRESS_SECONDS = 5.0
FAR = 2.0  # times what was asked for that validation's share of the tokens may be, or a part of it


class Documents:
    """Every document of the inputs in a fixed order, less those of white space only. Each iteration reads anew."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.name = " ".join(args.inputs) or args.dataset
        self._files, passed_over = expand_inputs(args.inputs)
        self._meter: Meter | None = None
        self.n_mended = 0  # texts of this iteration that held what no encoding can say
        self.n_bytes = 0  # of the texts of this iteration in UTF-8
        self._dataset = DataSet(args.dataset, args.subset, args.split) if args.dataset else None
        if self._dataset is not None:
            passed_over += self._dataset.passed_over
            if self._dataset.reads_lines and args.split_documents is None:
                passed_over.append(
                    f"of {args.dataset} each line is a document: --split-documents line says this is meant"
                )
        for line in passed_over:
            warn(line)

    def __iter__(self) -> Iterator[str]:
        self.n_mended = self.n_bytes = 0
        for text in self._texts():
            if text and not text.isspace():
                whole, n_bytes = without_surrogates(text)
                self.n_mended += whole is not text
                self.n_bytes += n_bytes
                yield whole

    def _texts(self) -> Iterator[str]:
        args = self._args
        if self._dataset is not None:
            yield from self._dataset.documents(args.text_key)
        else:
            self._meter = Meter(sum(path.stat().st_size for path in self._files))
            for path in self._files:
                yield from file_documents(path, args.text_key, args.split_documents, self._meter)

    @property
    def share(self) -> float:
        """How much of the files this iteration has read, from 0 to 1; 0 where that cannot be known. Of packed ones that
        is far ahead of the text that has been encoded, see `Progress.share`."""
        return self._meter.share if self._meter is not None else 0.0


def without_surrogates(text: str) -> tuple[str, int]:
    """The same text, with U+FFFD for halves of surrogate pairs, which JSON can write and no UTF-8 holds; its bytes."""
    try:
        return text, len(text.encode())
    except UnicodeEncodeError:
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return mended, len(mended.encode())


def preprocess(args: argparse.Namespace) -> str:
    """Writes all files beside their final place, then moves them there. Returns the closing line."""
    output = Path(args.out)
    suffixes = ["-train", "-valid"] if args.valid_fraction else [""]
    targets = [path for suffix in suffixes for path in corpus_paths(f"{output}{suffix}")]
    if args.train_tokenizer is not None:
        targets.append(trained_path(f"{output}-tokenizer", args.model_type))
    try:
        with all_or_none(output, targets) as stage:
            documents, around, tokens, rate = write_corpora(args, stage / output.name, suffixes)
    except OSError as error:
        raise UserError("--out", output, f"cannot be written ({error})", "choose another prefix") from error
    counts = f"{documents} documents{around}, {tokens}, {rate:.0f} tokens/s"
    return f"{counts}: {', '.join(map(str, sorted(targets)))}"


def corpus_paths(prefix: str) -> list[Path]:
    return [*pair_paths(prefix), meta_path(prefix)]


def write_corpora(args: argparse.Namespace, prefix: Path, suffixes: list[str]) -> tuple[int, str, str, float]:
    """Writes every file at `prefix`. Returns its documents, what stands around each, its tokens as they are told, and
    how many a second."""
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None and not tokenizer.codec.has_tree:
        warn(f"{tokenizer.name} {NO_TREE}: training refuses it as data.tokenizer, and takes its data without one")
    texts = Documents(args)
    marks = around_documents(tokenizer, args) if tokenizer else None
    if args.valid_fraction:
        check_both_sides(args, texts)  # before the hours that what follows may take
    if tokenizer is None:
        tokenizer = Tokenizer(train_on(texts, args, f"{prefix}-tokenizer"))
    prefix_ids, suffix_ids = marks or around_documents(tokenizer, args)
    sha256 = tokenizer.sha256  # now, since a file that has none is refused
    encoder = Encoder(tokenizer.path, tokenizer.files.fingerprint, args.valid_fraction, prefix_ids, suffix_ids)
    progress, text_bytes = Progress(texts), [0] * len(suffixes)
    with ExitStack() as stack:
        dtype = dtype_for_vocab(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedWriter(f"{prefix}{suffix}", dtype)) for suffix in suffixes]
        batches = stack.enter_context(closing(encode_all(encoder, texts, args.workers)))
        for documents in batches:
            for document in documents:
                writers[document.is_valid].append(document.ids)
                text_bytes[document.is_valid] += document.n_bytes
            progress.add(sum(document.n_bytes for document in documents), sum(d.ids.size for d in documents))
        rate = progress.n_tokens / progress.seconds
        for writer, suffix in zip(writers, suffixes, strict=True):
            if not writer.n_documents:
                raise no_documents(args, texts, suffix, sum(writer.n_documents for writer in writers))
    if texts.n_mended:
        warn(f"{texts.n_mended} document(s) held halves of surrogate pairs, which are U+FFFD now")
    name = args.tokenizer or os.fspath(trained_path(f"{args.out}-tokenizer", args.model_type))
    on_hub = args.tokenizer is not None and not Path(name).exists()
    for writer, suffix, n_bytes in zip(writers, suffixes, text_bytes, strict=True):
        meta = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": name if on_hub else os.fsencode(Path(name).name).decode(errors="replace"),
            "tokenizer_sha256": sha256,
            "eod": tokenizer.eos,
            "document_prefix": prefix_ids,
            "document_suffix": suffix_ids,
            "n_documents": writer.n_documents,
            "n_tokens": writer.n_tokens,
            "n_bytes": n_bytes,
            "dtype": dtype.name,
            "bin_sha256": writer.sha256,
        }
        meta_path(f"{prefix}{suffix}").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    before = f" preceded by {tokenizer.shown(prefix_ids)}" if prefix_ids else ""
    after = f" followed by {tokenizer.shown(suffix_ids)}" if suffix_ids else ""
    around = f", each{' and'.join(filter(None, (before, after)))}" if before or after else ""
    tokens = f"{progress.n_tokens} tokens"
    if args.valid_fraction:
        n_train, n_valid = (writer.n_tokens for writer in writers)
        tokens += f" (train {n_train}, valid {n_valid}: {n_valid / progress.n_tokens:.1%})"
        warn_of_shares(args, [writer.n_documents for writer in writers], n_valid / progress.n_tokens)
    return sum(writer.n_documents for writer in writers), around, tokens, rate


def warn_of_shares(args: argparse.Namespace, n_documents: list[int], share: float) -> None:
    """Where one side has less than half or more than twice the tokens that were asked for: documents stay whole."""
    asked = args.valid_fraction
    if not all(want / FAR <= got <= want * FAR for got, want in ((share, asked), (1 - share, 1 - asked))):
        whole = f"{n_documents[1]} of {sum(n_documents)} documents, which stay whole"
        remedy = "make documents smaller (--split-documents line), or try another --valid-fraction"
        warn(f"--valid-fraction = {asked}: validation has {share:.1%} of the tokens ({whole}); {remedy}")


def around_documents(tokenizer: Tokenizer, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The ids written before and after each document: what --bos and --eos say, else what the tokenizer's own
    post-processor does. A document has an end where that has none, unless with --no-append-eod."""

    def chosen(option: str, word: str | None, own: list[int]) -> list[int]:
        if word is None:
            return own
        try:
            return [] if word == "none" else [tokenizer.id_of(word)]
        except UserError as error:
            raise UserError(option, word, error.problem, error.remedy) from error

    end = (tokenizer.suffix or [tokenizer.eod]) if args.append_eod and args.eos is None else []
    return chosen("--bos", args.bos, tokenizer.prefix), chosen("--eos", args.eos, end)


def check_both_sides(args: argparse.Namespace, texts: Documents) -> None:
    """Raises `UserError` if no document falls to training, or none to validation; reads until there is one of each."""
    found: Counter[bool] = Counter()
    for text in texts:
        found[is_validation(text, args.valid_fraction)] += 1
        if len(found) == 2:
            return
    raise no_documents(args, texts, "-valid" if found[False] else "-train", found.total())


def no_documents(args: argparse.Namespace, texts: Documents, suffix: str, n_documents: int) -> UserError:
    problem = f"gives {n_documents} document(s), of which none goes to {args.out}{suffix}"
    remedy = "give more files, make documents smaller (--split-documents line) or try another --valid-fraction"
    return UserError("input", texts.name, problem, remedy if suffix else "give more text")


def train_on(texts: Documents, args: argparse.Namespace, out_prefix: str) -> Path:
    """Trains a tokenizer on the first --tokenizer-sample-mb of the training documents."""

    n_read = 0

    def sample() -> Iterator[str]:
        nonlocal n_read
        for text in texts:
            if n_read >= args.tokenizer_sample_mb * 1e6:
                return
            if not is_validation(text, args.valid_fraction):
                n_read += len(text.encode())
                yield text

    started, chosen = time.monotonic(), sample()
    first = next(chosen, None)
    if first is None:
        raise no_documents(args, texts, "", 0)
    lines = chain([first], chosen)
    with ticking(lambda: f"tokenizer: {n_read / 1e6:.0f} MB of text read, {clock(time.monotonic() - started)}"):
        path = train_tokenizer(lines, args.train_tokenizer, out_prefix, args.model_type, args.normalization)
    note(f"tokenizer: {args.train_tokenizer} pieces in {time.monotonic() - started:.1f} s")
    return path


@contextmanager
def ticking(line: Callable[[], str]) -> Iterator[None]:
    """Notes the line every few seconds while the block runs, from a thread: libraries do not say how far they are."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            note(line())

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


class Progress:
    """Says on stderr, every few seconds, how far the run is, how fast it goes, and how long it will take."""

    def __init__(self, texts: Documents) -> None:
        self.texts = texts
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
            note(self.line())

    @property
    def share(self) -> float:
        """How much of the files has been encoded: what is read and waits for that is not done."""
        return self.texts.share * self.n_bytes / self.texts.n_bytes if self.n_bytes else 0.0

    def line(self) -> str:
        seconds, share, megabytes = self.seconds, self.share, self.n_bytes / 1e6
        speed = f"{megabytes / seconds:.1f} MB/s, {self.n_tokens / seconds:.0f} tokens/s"
        done = f", {share:.0%} done, {clock(seconds * (1 / share - 1))} left" if share else ""
        return f"{megabytes:.0f} MB of text, {self.n_tokens} tokens, {speed}{done}"
