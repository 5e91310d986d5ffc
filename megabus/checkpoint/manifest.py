"""What a checkpoint directory must hold, to the byte: every file's name, size and digest.

The manifest is written in one canonical form and carries a hash of itself, so a change of any bit of any file,
its own included, is seen. That guards against accidents. What somebody made up has hashes too, so nothing outside of
the directory is ever opened, and no link, pipe or device within.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from errno import ELOOP
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megabus.checkpoint.digests import KIND, PATTERN, Digest, kind_of
from megabus.durable import sync
from megabus.errors import UserError
from megabus.plain_file import NotPlainError, check_regular, open_regular, parse_json, read_regular, shown

T = TypeVar("T")

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 3  # of manifest.json and state.json
READS = (2, FORMAT)  # 2 had a SHA-256 for every file, and the same states
BLOCK = 1 << 20  # bytes hashed between two heartbeats
THREADS = 4  # that hash files side by side
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # of all that files of a checkpoint say
ANOTHER_COPY = "restore it from another copy, or take the checkpoint before it, as resume=auto does"


Heartbeat = Callable[[], None]


def idle() -> None:
    """The heartbeat of a caller whom no watchdog watches."""


class DamagedError(UserError):
    """A file of a checkpoint is missing or is not what was written. (What merely cannot be read is a `UserError`.)"""

    def __init__(self, path: Path, how: str = "", remedy: str = ANOTHER_COPY) -> None:
        super().__init__("checkpoint", path, how or "is damaged", remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (Path(str(self.value)), self.problem, self.remedy)


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,250}$")]
_Bytes = Annotated[int, Field(ge=0, lt=2**63)]
_Rank = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint as it was written; `rank` wrote it. Its name is plain: of this directory."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: _Name
    bytes: _Bytes
    digest: Annotated[str, Field(pattern=PATTERN)]
    rank: _Rank


@dataclass(frozen=True)
class _Entry2:
    """The same in format 2."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: _Name
    bytes: _Bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rank: _Rank


_Entries: TypeAdapter[list[Entry]] = TypeAdapter(list[Entry])
_Entries2: TypeAdapter[list[_Entry2]] = TypeAdapter(list[_Entry2])


def settle(path: Path, rank: int, heartbeat: Heartbeat = idle, digest: str | None = None) -> Entry:
    """Make a written file durable, and measure it. heartbeat: called whenever some of it is done. digest: the file's,
    where that was taken while it was written; else it is read again."""
    sync(path)
    heartbeat()
    return Entry(path.name, path.stat().st_size, digest or _digest(path, heartbeat, KIND), rank)


def write_manifest(folder: Path, entries: Iterable[Entry]) -> Path:
    path = folder / MANIFEST
    path.write_bytes(_text(entries))
    return path


def read_manifest(folder: Path) -> list[Entry]:
    """The entries in order of names. Raises `DamagedError`, or `UserError` where it cannot be read."""
    path = folder / MANIFEST
    with reading(path):
        raw = read_regular(path)
    try:
        tree = parse_json(raw)
    except ValueError as error:
        raise DamagedError(path, f"is damaged (it is not JSON as it is saved: {error})") from error
    if not isinstance(tree, dict) or _sealed({key: tree[key] for key in tree if key != "sha256"}) != raw:
        raise DamagedError(path)
    check_format(path, tree)
    if tree.keys() != {"format", "files", "sha256"}:
        raise DamagedError(path, f"is damaged (keys {shown(list(tree))} are not those of a manifest)")
    if tree["format"] == FORMAT:
        entries = validated(_Entries, tree["files"], path, "files")
    else:
        old = validated(_Entries2, tree["files"], path, "files")
        entries = [Entry(entry.name, entry.bytes, f"sha256:{entry.sha256}", entry.rank) for entry in old]
    names = [entry.name for entry in entries]
    if names != sorted(set(names)):
        raise DamagedError(path, "is damaged (files are not in order of names, each once)")
    return entries


def check_format(path: Path, tree: dict[str, Any]) -> None:
    """Raise `UserError` about another version's file, and `DamagedError` where no version wrote its `format`."""
    found = tree.get("format")
    if type(found) is not int or not 0 < found < 2**31:
        raise DamagedError(path, f"is damaged (format = {shown(found)}: is no number of a format)")
    if found not in READS:
        problem = f"has format {found}, this megabus reads {' and '.join(map(str, READS))}"
        raise UserError("checkpoint", path, problem, "use the megabus that wrote it")


def validated(adapter: TypeAdapter[T], tree: Any, path: Path, key: str = "") -> T:
    """What plain JSON values say, by their strict types. Raises `DamagedError` naming the first key that is wrong;
    `key`: that of the tree itself."""
    try:
        return adapter.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([part for part in (key, *map(str, first["loc"])) if part])
        message = first["msg"].removeprefix("Value error, ")
        text = message if first["type"] in ("value_error", "missing") else f"{message}, found {shown(first['input'])}"
        raise DamagedError(path, f"is damaged ({where}: {text})") from error


def check_size(folder: Path, entry: Entry) -> None:
    """Raise `DamagedError` unless the file is there, a regular one, and of that size. It is not opened."""
    path = folder / entry.name
    with reading(path):
        found = check_regular(path)
    if found != entry.bytes:
        raise DamagedError(path, f"is damaged ({found} bytes, not {entry.bytes})")


def check_file(folder: Path, entry: Entry, heartbeat: Heartbeat = idle) -> None:
    """Raise `DamagedError` unless the file is there, of that size and with those bytes."""
    check_size(folder, entry)
    path = folder / entry.name
    with reading(path):
        digest = _digest(path, heartbeat, entry.digest)
    check_digest(path, digest, entry)


def check_digest(path: Path, digest: str, entry: Entry) -> None:
    """Raise `DamagedError` unless it is that of the file as it was written."""
    if digest != entry.digest:
        raise DamagedError(path, f"is damaged (its {kind_of(entry.digest)} is not the manifest's)")


def check_files(folder: Path, entries: Iterable[Entry]) -> None:
    """`check_file` of all of them, in threads: hashing lets go of the interpreter."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(partial(check_file, folder), entries))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What becomes of errors in reading a checkpoint's file: what is not there is damage, what fails may be mended."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(path, "is missing") from None
    except NotPlainError as error:
        raise DamagedError(path, str(error)) from error
    except OSError as error:
        if error.errno == ELOOP:
            raise DamagedError(path, "is behind a link to itself") from error
        raise UserError("checkpoint", path, f"cannot be read ({error.strerror})", "mend the file system") from error


def digest_of(folder: Path) -> str:
    """SHA-256 of the manifest itself, by which `latest` names a checkpoint."""
    return hashlib.sha256(read_regular(folder / MANIFEST)).hexdigest()


def _digest(path: Path, heartbeat: Heartbeat, like: str) -> str:
    digest = Digest(like)
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            heartbeat()
    return digest.text


def _text(entries: Iterable[Entry]) -> bytes:
    files = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    return _sealed({"format": FORMAT, "files": files})


def _sealed(tree: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    return (json.dumps(tree | {"sha256": digest}, indent=1) + "\n").encode()
