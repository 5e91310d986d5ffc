"""Megatron-LM's IndexedDataset pair on disk: `PREFIX.bin` (raw tokens) and `PREFIX.idx` (where they lie).

`.idx`, little-endian, as `megatron/core/datasets/indexed_dataset.py` lays it out:

    9s      magic b"MMIDIDX\\0\\0"
    u64     version, 1
    u8      dtype code, see DTYPES
    u64     S = number of sequences
    u64     D = number of document boundaries (documents + 1)
    i32[S]  tokens in each sequence
    i64[S]  byte offset of each sequence in .bin
    i64[D]  index of each document's first sequence; the first is 0, the last is S
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from megabus.durable import partial_name, sync
from megabus.errors import UserError
from megabus.plain_file import NotPlainError, parse_json, read_regular, shown

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
REBUILD = "run megabus preprocess again"
CHECKED = 1 << 20  # entries of an index that are checked at once


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """The smallest token dtype Megatron itself would choose: uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def meta_path(prefix: str | os.PathLike[str]) -> Path:
    """The optional sidecar `PREFIX.meta.json`, in which megabus preprocess notes how a corpus was made."""
    return Path(f"{os.fspath(prefix)}.meta.json")


def read_meta(prefix: str | os.PathLike[str]) -> dict | None:
    """The sidecar's content; None without a sidecar, as for a corpus that Megatron's own tool made."""
    path = meta_path(prefix)
    try:
        with _blaming(path):
            raw = read_regular(path, links=True)
    except FileNotFoundError:
        return None
    except NotPlainError as error:
        raise UserError("data", path, str(error), REBUILD) from error
    try:
        meta = parse_json(raw)
    except ValueError as error:
        raise UserError("data", path, f"is not JSON ({error})", REBUILD) from error
    if not isinstance(meta, dict):
        raise UserError("data", path, "holds no keys", REBUILD)
    kinds = {"vocab_size": int, "n_tokens": int, "n_bytes": int, "tokenizer_sha256": str, "tokenizer": str}
    if missing := {"vocab_size", "n_tokens"} - meta.keys():  # the rest came later
        raise UserError("data", path, f"lacks {', '.join(sorted(missing))}", REBUILD)
    for key, kind in kinds.items():
        if key in meta and type(meta[key]) is not kind:
            raise UserError("data", path, f"has {key} = {shown(meta[key])}, which is no {kind.__name__}", REBUILD)
    return meta


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read is told of it; that there is none is for the caller to tell."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise UserError("data", path, problem, "check its permissions and the disk") from error


def pair_paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(`PREFIX.bin`, `PREFIX.idx`); the prefix itself may hold dots."""
    return Path(f"{os.fspath(prefix)}.bin"), Path(f"{os.fspath(prefix)}.idx")


def _absent(prefix: str | os.PathLike[str], path: Path) -> UserError:
    """A prefix is often given as the name of one of its two files."""
    given = Path(prefix)
    if given.suffix in (".bin", ".idx") and all(other.is_file() for other in pair_paths(given.with_suffix(""))):
        problem = "is the name of one of two files, and both begin with the prefix that is asked for"
        return UserError("data", given, problem, f"give {given.with_suffix('')}")
    problem = "is no regular file" if path.exists() else "the file does not exist"
    return UserError("data", path, problem, f"check the prefix or {REBUILD}")


class IndexedTokens:
    """Read-only memory map of one pair. Opening it checks that the two files are whole and belong together.

    Raises UserError for a missing file, a foreign or truncated `.idx`, or a `.bin` of another size.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = pair_paths(prefix)
        for path in (self.bin_path, self.idx_path):
            with _blaming(path):
                if not path.is_file():
                    raise _absent(prefix, path)
        with _blaming(self.idx_path):
            self.dtype, self.sequence_lengths, self.pointers, self.document_indices = _read_index(self.idx_path)
        self.n_sequences = len(self.sequence_lengths)
        self.n_documents = len(self.document_indices) - 1
        self.n_tokens = int(self.sequence_lengths.sum(dtype=np.int64))

        found, expected = self.bin_path.stat().st_size, self.n_tokens * self.dtype.itemsize
        if found != expected:
            problem = f"holds {found} bytes where {self.idx_path.name} says {expected}"
            raise UserError("data", self.bin_path, problem, REBUILD)
        if self.n_tokens == 0:  # np.memmap cannot map an empty file, and nothing could be trained on it
            raise UserError("data", self.bin_path, "holds no tokens (0 bytes)", REBUILD)
        with _blaming(self.bin_path):
            self._tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return self.n_tokens

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the flat stream, shape (stop - start,): a view of the map, not a copy."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens} in {self.bin_path}")
        return self._tokens[start:stop]

    def sequence(self, index: int) -> np.ndarray:
        """Tokens of one sequence, shape (sequence_lengths[index],)."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens(start, start + int(self.sequence_lengths[index]))

    def document_lengths(self, start: int, stop: int) -> list[int]:
        """How tokens [start, stop) of the flat stream are divided among documents: lengths above 0, in order. The first
        document may have begun before, the last may go on. Few entries of the index are read, whatever its size."""
        first = bisect_right(range(self.n_documents), start, key=self._document_start)
        last = bisect_left(range(self.n_documents), stop, lo=first, key=self._document_start)
        cuts = {start, *map(self._document_start, range(first, last)), stop}  # a set: documents may be empty
        return np.diff(sorted(cuts)).tolist()

    def _document_start(self, document: int) -> int:
        """The first token of a document; where only empty ones follow, the stream's end."""
        sequence = int(self.document_indices[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < self.n_sequences else self.n_tokens


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype, lengths int32[S], pointers int64[S], document indices int64[D]), mapped, not loaded."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise UserError("data", path, f"truncated: {size} bytes, its header alone has {HEADER.size}", REBUILD)
    with path.open("rb") as file:
        magic, version, code, n_sequences, n_boundaries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        problem = f"not a Megatron index: it starts with {magic!r}, not {MAGIC!r}"
        raise UserError("data", path, problem, f"check the prefix or {REBUILD}")
    if version != VERSION or code not in DTYPES:
        problem = f"index version {version} with dtype code {code} is unknown (version {VERSION} is read)"
        raise UserError("data", path, problem, REBUILD)
    expected = HEADER.size + 12 * n_sequences + 8 * max(n_boundaries, 1)  # even no document has one boundary
    if size != expected:
        problem = f"{'truncated' if size < expected else 'too long'}: {size} bytes, not {expected}"
        raise UserError("data", path, problem, REBUILD)

    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size, shape=(expected - HEADER.size,))
    lengths = raw[: 4 * n_sequences].view("<i4")
    pointers = raw[4 * n_sequences : 12 * n_sequences].view("<i8")
    documents = raw[12 * n_sequences :].view("<i8")
    dtype = np.dtype(DTYPES[code])
    if not np.issubdtype(dtype, np.integer):
        raise UserError("data", path, f"holds numbers of type {dtype}, which are no tokens", REBUILD)
    if not _contiguous(lengths, pointers, dtype.itemsize) or not _bounds(documents, n_sequences):
        raise UserError("data", path, "damaged: offsets, lengths and documents disagree", REBUILD)
    return dtype, lengths, pointers, documents


def _contiguous(lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> bool:
    """Whether sequences lie one after another, as every known writer lays them: else there is no flat stream."""
    stop = 0
    for first in range(0, len(lengths), CHECKED):
        some = lengths[first : first + CHECKED].astype(np.int64)
        stops = stop + np.cumsum(some) * itemsize
        if some.min() < 0 or not np.array_equal(stops - some * itemsize, pointers[first : first + CHECKED]):
            return False
        stop = int(stops[-1])
    return True


def _bounds(documents: np.ndarray, n_sequences: int) -> bool:
    """Whether documents follow each other, from the first sequence to the last."""
    ordered = all(
        (some[1:] >= some[:-1]).all()
        for some in (documents[first : first + CHECKED + 1] for first in range(0, len(documents), CHECKED))
    )
    return bool(documents[0] == 0 and documents[-1] == n_sequences and ordered)


class IndexedWriter:
    """Streams documents into a new pair; the pair appears under its names only when the block succeeds.

        with IndexedWriter("data/corpus", dtype_for_vocab(32000)) as writer:
            writer.append(ids)

    Tokens go straight to disk; memory holds four bytes per document. If the block raises, the temporaries
    are removed and a pair already at that prefix is left as it was.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type[np.generic]) -> None:
        self.bin_path, self.idx_path = pair_paths(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, kind in DTYPES.items() if kind == self.dtype.type)
        self._limits = np.iinfo(self.dtype)
        self._lengths = array("i")
        self.n_tokens = 0
        self._sum = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the tokens in `.bin` so far."""
        return self._sum.hexdigest()

    @property
    def n_documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> IndexedWriter:
        self._partial = {path: partial_name(path) for path in (self.bin_path, self.idx_path)}
        self._bin = self._partial[self.bin_path].open("wb")
        return self

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Adds one document of one sequence. Raises ValueError for ids the dtype cannot hold."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and not self._limits.min <= ids.min() <= ids.max() <= self._limits.max:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit in {self.dtype}")
        data = ids.astype(self.dtype.newbyteorder("<")).tobytes()
        self._bin.write(data)
        self._sum.update(data)
        self._lengths.append(ids.size)
        self.n_tokens += ids.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._bin.close()
            for partial in self._partial.values():
                partial.unlink(missing_ok=True)

    def _commit(self) -> None:
        """Writes the index, makes both files durable, then renames them."""
        lengths = np.array(self._lengths, dtype=np.int32)
        pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        header = HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents))
        with self._partial[self.idx_path].open("wb") as idx:
            idx.write(header)
            for column, kind in ((lengths, "<i4"), (pointers, "<i8"), (documents, "<i8")):
                idx.write(column.astype(kind).tobytes())
            _flush_to_disk(idx)
        _flush_to_disk(self._bin)
        for path, partial in self._partial.items():
            partial.replace(path)
        sync(self.bin_path.parent)


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
