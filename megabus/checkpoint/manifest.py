"""What a checkpoint directory must hold, to the byte: every file's name, size and SHA-256.

The manifest is written in one canonical form and carries a hash of itself, so a change of any bit of any file,
its own included, is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megabus.durable import sync
from megabus.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2  # of manifest.json and state.json
BLOCK = 1 << 20  # bytes hashed between two heartbeats
THREADS = 4  # that hash files side by side
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


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint as it was written; `rank` wrote it."""

    name: str
    bytes: int
    sha256: str
    rank: int


def settle(path: Path, rank: int, heartbeat: Heartbeat = idle) -> Entry:
    """Make a written file durable, and measure it. heartbeat: called whenever some of it is done."""
    sync(path)
    heartbeat()
    return Entry(path.name, path.stat().st_size, _sha256(path, heartbeat), rank)


def write_manifest(folder: Path, entries: Iterable[Entry]) -> Path:
    path = folder / MANIFEST
    path.write_bytes(_text(entries))
    return path


def read_manifest(folder: Path) -> list[Entry]:
    """The entries in order of names. Raises `DamagedError`, or `UserError` where it cannot be read."""
    path = folder / MANIFEST
    with reading(path):
        raw = path.read_bytes()
    try:
        tree = json.loads(raw)
        whole = _sealed({key: value for key, value in tree.items() if key != "sha256"}) == raw
    except (AttributeError, ValueError):
        whole = False
    if not whole:
        raise DamagedError(path)
    if tree.get("format") != FORMAT:
        problem = f"has format {tree.get('format')}, this megabus reads {FORMAT}"
        raise UserError("checkpoint", path, problem, "use the megabus that wrote it")
    return [Entry(**entry) for entry in tree["files"]]


def check_file(folder: Path, entry: Entry, heartbeat: Heartbeat = idle) -> None:
    """Raise `DamagedError` unless the file is there, of that size and with those bytes."""
    path = folder / entry.name
    with reading(path):
        found = path.stat().st_size
        if found != entry.bytes:
            raise DamagedError(path, f"is damaged ({found} bytes, not {entry.bytes})")
        digest = _sha256(path, heartbeat)
    if digest != entry.sha256:
        raise DamagedError(path, "is damaged (its SHA-256 is not the manifest's)")


def check_files(folder: Path, entries: Iterable[Entry]) -> None:
    """`check_file` of all of them, in threads: hashing lets go of the interpreter."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(partial(check_file, folder), entries))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(path, "is missing") from None
    except OSError as error:
        raise UserError("checkpoint", path, f"cannot be read ({error.strerror})", "mend the file system") from error


def digest_of(folder: Path) -> str:
    """SHA-256 of the manifest itself, by which `latest` names a checkpoint."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _sha256(path: Path, heartbeat: Heartbeat) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            heartbeat()
    return digest.hexdigest()


def _text(entries: Iterable[Entry]) -> bytes:
    files = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    return _sealed({"format": FORMAT, "files": files})


def _sealed(tree: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    return (json.dumps(tree | {"sha256": digest}, indent=1) + "\n").encode()
