"""Documents of text files, of JSON lines and of parquet, plain or compressed; of tables only the text is read."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megabus.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
KINDS_TOLD = ".txt[.gz|.zst], .jsonl[.gz|.zst] or .parquet"
PARQUET_ROWS = 256  # read at once: a row may hold a book

# What other columns hold is nothing to us: an integer may have any number of digits.
_JSON = json.JSONDecoder(parse_int=float, strict=False)
NAMED = 20  # keys of a row, or columns, that are named
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)  # and strings, which may hold some
DEEPEST = 100
_TYPES = {type(None): "null", bool: "a truth value", float: "a number", list: "a list", dict: "an object"}


def kind_of(path: Path) -> str | None:
    """One of KINDS, by its ending in letters of any size; None for a file that is not read."""
    path = Path(path.name.lower())
    packed = path.suffix in PACKED
    kind = Path(path.stem).suffix if packed else path.suffix
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


class Meter:
    """How much of a list of files has been read, as they lie on disk."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._before = 0
        self._tell: Callable[[], float] = lambda: 0

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(1.0, (self._before + self._tell()) / max(self.total, 1))

    def file(self, tell: Callable[[], float]) -> None:
        """A file begins, of which `tell` says how many bytes were read."""
        self._tell = tell

    def end(self, size: int) -> None:
        """That file, of `size` bytes, has been read."""
        self._before += size
        self._tell = lambda: 0


def file_documents(path: Path, text_key: str, split_documents: str, meter: Meter) -> Iterator[str]:
    """Documents of one file, in its order. Raises UserError for one that cannot be read, or holds no text there."""
    with _blaming(path), path.open("rb") as raw:
        if kind_of(path) == ".parquet":
            yield from parquet_documents(raw, path, text_key, meter)
        else:
            meter.file(raw.tell)
            stream = unpacked(raw, path.suffix.lower())
            if kind_of(path) == ".txt":
                with _finding_line(path):
                    yield from text_documents(stream, split_documents)
            else:
                yield from json_documents(stream, path, text_key)
        meter.end(path.stat().st_size)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read is told of it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("input", path, f"cannot be read ({error})", "check the file") from error


@contextmanager
def _finding_line(path: Path) -> Iterator[None]:
    """Text is decoded in blocks: which line is no UTF-8 is found by reading the file once more, line by line."""
    try:
        yield
    except UnicodeDecodeError as unplaced:
        with path.open("rb") as raw:
            for number, line in enumerate(unpacked(raw, path.suffix.lower()), 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise not_utf8(path, error, number) from error
        raise not_utf8(path, unplaced) from unplaced  # the file was changed meanwhile


def unpacked(raw: IO[bytes], ending: str) -> IO[bytes]:
    """The bytes of a file that is packed as its name's ending says; a file that was cut raises."""
    if ending in PACKED and _size_of(raw) == 0:  # libraries take nothing for no frames
        raise EOFError("it was cut before its first byte")
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
    return raw


def _size_of(raw: IO[bytes]) -> int | None:
    """Of a file its bytes; None where what is streamed does not say."""
    try:
        return os.fstat(raw.fileno()).st_size
    except OSError:  # it is none of this machine's
        return getattr(raw, "size", None)


# ---- text -------------------------------------------------------------------------------------------------


def text_documents(stream: IO[bytes], split_documents: str) -> Iterator[str]:
    """Documents of UTF-8 text, split as --split-documents says."""
    file = io.TextIOWrapper(stream, encoding="utf-8-sig")
    if split_documents == "file":
        yield file.read()
    elif split_documents == "line":
        yield from (line.rstrip("\n") for line in file)
    else:
        yield from _between_blank_lines(file)


def _between_blank_lines(file: Iterable[str]) -> Iterator[str]:
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


# ---- tables -----------------------------------------------------------------------------------------------


def json_documents(stream: Iterable[bytes], path: object, text_key: str) -> Iterator[str]:
    """The text under `text_key` of every line; blank lines are none."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig").strip()  # of every line: files with a mark are joined as they are
        except UnicodeDecodeError as error:
            raise not_utf8(path, error, number) from error
        if not text:
            continue
        row = json_value(text, path, f"line {number} is", "give one object a line")
        if not isinstance(row, dict):
            problem = f"line {number} holds {_type_of(row)}, not an object"
            raise UserError("input", path, problem, "give one object a line")
        yield text_of(row, text_key, "input", path, f"line {number}")


def json_value(text: str, path: object, where: str, remedy: str) -> Any:
    """What JSON says. Raises UserError for what is none; `where` begins it: "line 1 is"."""
    try:
        try:
            return _JSON.decode(text)
        except RecursionError:  # the parser reads all columns or none, and texts lie higher
            return _JSON.decode(_without_depths(text))
    except ValueError as error:
        raise UserError("input", path, f"{where} not JSON ({error})", remedy) from error


def _without_depths(text: str) -> str:
    """JSON with null for whatever lies deeper than DEEPEST, which is told by its brackets alone."""
    kept, depth, begun = [], 0, 0
    for match in _BRACKETS.finditer(text):
        if match[0] in ("[", "{"):
            if depth == DEEPEST:
                kept.append(text[begun : match.start()] + "null")
            depth += 1
        elif match[0] in ("]", "}"):
            depth -= 1
            if depth == DEEPEST:
                begun = match.end()
    return "".join(kept) + (text[begun:] if depth <= DEEPEST else "")


def text_of(row: dict[str, Any], text_key: str, key: str, name: object, where: str) -> str:
    """The text of one row. `text_key` is the name of a column, or leads into objects: `doc.text`.

    Raises UserError of `key` = `name` that says `where` something else is there.
    """
    value: Any = row
    for step in [text_key] if text_key in row else text_key.split("."):
        if not isinstance(value, dict) or step not in value:
            problem = f"{where} has no text under '{text_key}', its keys are {some_of(row)}"
            inner = (f"{outer}.{one}" for outer, found in row.items() if isinstance(found, dict) for one in found)
            raise UserError(key, name, problem, set_text_key(inner, text_key))
        value = value[step]
    if not isinstance(value, str):
        raise no_text(key, name, f"{where} has {_type_of(value)} under '{text_key}'")
    return value


def some_of(names: Iterable[str], most: int = NAMED) -> str:
    """As many of them as a line may hold."""
    found = list(names)
    return f"{', '.join(found[:most])}{', ...' if len(found) > most else ''}"


def set_text_key(inner: Iterable[str], text_key: str) -> str:
    """The remedy. inner: what there is a level below, of which the one that is called as what was asked for is named;
    else the first."""
    found = [*inner]
    named = next((path for path in found if path.rpartition(".")[2] == text_key), found[0] if found else None)
    return "set --text-key" if named is None else f"set --text-key; what lies in another is named so: {named}"


def no_text(key: str, name: object, problem: str) -> UserError:
    return UserError(key, name, f"{problem}, where text should be", "drop such rows, or set --text-key")


def not_utf8(path: object, error: UnicodeDecodeError, first: int = 1) -> UserError:
    """first: the line of the file, counted from 1, that the bytes that were decoded begin with."""
    line = first + error.object.count(b"\n", 0, error.start)
    return UserError("input", path, f"line {line} is not UTF-8 ({error.reason}: {_around(error)})", "convert the file")


def _around(error: UnicodeDecodeError) -> str:
    """The first byte that is none, with what stands around it, as Python writes bytes."""
    return repr(error.object[max(0, error.start - 10) : error.start + 5])


def _type_of(value: object) -> str:
    return "text" if isinstance(value, str) else _TYPES.get(type(value), f"a {type(value).__name__}")


def parquet_documents(raw: IO[bytes], path: object, text_key: str, meter: Meter) -> Iterator[str]:
    """The column `text_key`, or the field of a struct to which it leads; no other column is read."""
    import pyarrow
    from pyarrow.compute import struct_field
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(raw) as table:
            steps = _text_column(table.schema_arrow, path, text_key)
            bytes_a_row = raw.seek(0, io.SEEK_END) / max(table.metadata.num_rows, 1)
            meter.file(lambda: row * bytes_a_row)
            for batch in table.iter_batches(PARQUET_ROWS, columns=[".".join(steps)]):
                column = batch.column(batch.schema.get_field_index(steps[0]))
                for step in steps[1:]:
                    column = struct_field(column, step)
                for value in _values(column):
                    if value is None:
                        raise no_text("input", path, f"row {row} has null under '{text_key}'")
                    text = value.decode() if isinstance(value, bytes) else value
                    row += 1
                    yield text
    except UnicodeDecodeError as error:
        problem = f"row {row} is not UTF-8 under '{text_key}' ({error.reason}: {_around(error)})"
        raise UserError("input", path, problem, "convert it") from error
    except pyarrow.ArrowException as error:
        raise UserError("input", path, f"cannot be read ({error})", "check the file") from error


def _values(column: Any) -> Iterable[str | bytes | None]:
    """All at once, or one by one where one is no UTF-8, so that it is known which."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return (value.as_py() for value in column)


def _text_column(schema: Any, path: object, text_key: str) -> list[str]:
    """Where the text lies: the name of a column, then those of fields of structs."""
    import pyarrow

    kind: Any = pyarrow.struct(list(schema))
    steps = [text_key] if text_key in schema.names else text_key.split(".")
    for step in steps:
        places = kind.get_all_field_indices(step) if pyarrow.types.is_struct(kind) else []
        if len(places) > 1:
            raise UserError("input", path, f"has {len(places)} columns called '{step}'", "rename all but one of them")
        if not places:
            problem = f"has no text under '{text_key}', its columns are {some_of(schema.names)}"
            structs = (outer for outer in schema if pyarrow.types.is_struct(outer.type))
            inner = (f"{outer.name}.{one.name}" for outer in structs for one in outer.type.fields)
            raise UserError("input", path, problem, set_text_key(inner, text_key))
        kind = kind.field(places[0]).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null())
    bare = (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view())  # as older tools write text
    if kind not in (*text, *bare):
        raise no_text("input", path, f"has {kind} under '{text_key}'")
    return steps
