"""Token files at a URL, copied to this machine before they are read: whole, compared with what is known of them, and
only then under their name."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megabus.data.indexed import read_meta
from megabus.durable import open_lock, sync
from megabus.errors import UserError

BLOCK = 8 * 2**20  # bytes that are asked for at once
AGAIN = 1.0  # seconds between looks at a lock that another rank holds
LOCK, NEW = ".lock", ".new"
OPTIONAL = ".meta.json"


def is_url(path: str) -> bool:
    return "://" in path


def default_cache() -> Path:
    """$XDG_CACHE_HOME/megabus, or that of ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megabus"


def listed(pattern: str) -> list[str]:
    """URLs that a pattern of a URL matches, in the order of their names."""
    with _blaming(pattern):
        system, path = _opened(pattern)
        return sorted(system.unstrip_protocol(name) for name in system.glob(path))


def local_prefix(url: str, cache: Path | None = None, heartbeat: Callable[[], object] = int) -> str:
    """A copy of the pair, and of its sidecar where it has one, in a folder of its own within `cache`.

    What is there was whole when it came, and is used as it is, without a word to the network: delete the folder to
    have it fetched anew. Of several processes one fetches, and the others wait. heartbeat: called meanwhile.
    Raises UserError where it cannot be fetched, or is not what its server or its sidecar says; then nothing is left.
    """
    name = url.rstrip("/").rpartition("/")[2]
    folder = (cache or default_cache()) / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        with _cache_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(f"{folder.name}{LOCK}"), heartbeat):
                if not folder.is_dir():
                    _fetch(url, name, folder, heartbeat)
    return str(folder / name)


def _fetch(url: str, name: str, folder: Path, heartbeat: Callable[[], object]) -> None:
    """All files into a folder beside `folder`, which then gets its name."""
    new = folder.with_name(f"{folder.name}{NEW}")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir()
    try:
        sums: dict[str, str] = {}
        for ending in (OPTIONAL, ".idx", ".bin"):
            with _blaming(f"{url}{ending}"):
                system, path = _opened(f"{url}{ending}")
                if ending == OPTIONAL and not system.exists(path):
                    continue
                sums[ending] = _copy(system, path, new / f"{name}{ending}", heartbeat)
        expected = (read_meta(new / name) or {}).get("bin_sha256")
        if expected is not None and sums[".bin"] != expected:
            problem = f"came with SHA-256 {sums['.bin'][:12]}..., its .meta.json says {str(expected)[:12]}..."
            raise UserError("data", f"{url}.bin", problem, "put the files there again, all of one run of preprocess")
        sync(new)
        new.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _copy(system: Any, path: str, target: Path, heartbeat: Callable[[], object]) -> str:
    """The SHA-256 of what was copied. Raises EOFError where that is less or more than the server says there is."""
    size, digest, copied, cache = system.size(path), hashlib.sha256(), 0, target.parent.parent
    with system.open(path, "rb", block_size=BLOCK) as source, target.open("wb") as file:
        while block := source.read(BLOCK):
            with _cache_errors(cache):
                file.write(block)
            digest.update(block)
            copied += len(block)
            heartbeat()
        if size is not None and copied != size:
            raise EOFError(f"{copied} bytes came of {size}")
        with _cache_errors(cache):
            file.flush()
            os.fsync(file.fileno())
    return digest.hexdigest()


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, with what its own configuration and the environment say of credentials."""
    import fsspec  # with all that it imports half a second

    return fsspec.core.url_to_fs(url, use_listings_cache=False)


@contextmanager
def _blaming(url: str) -> Iterator[None]:
    """Whatever a file system raises is told of the URL: each has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if (cause := _other_cause(error)) is not None:
            raise _not_fetched(url, cause) from error
        raise UserError("data", url, "is not there", "check the URL") from error
    except ImportError as error:
        raise UserError("data", url, f"needs a package ({error})", "install it") from error
    except Exception as error:
        raise _not_fetched(url, error) from error


def _not_fetched(url: str, error: BaseException) -> UserError:
    message = " ".join(str(error).split()) or type(error).__name__
    remedy = "check the network and the credentials, and start again"
    return UserError("data", url, f"cannot be fetched ({message})", remedy)


def _other_cause(error: FileNotFoundError) -> BaseException | None:
    """Over HTTP fsspec raises this for whatever goes wrong, such as a refused connection: what did, unless a server has
    said that there is no such file."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
        if getattr(cause, "status", None) is not None:  # of an HTTP answer
            break
    is_absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410)
    return None if is_absent else cause


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """What goes wrong there is of the cache, not of the server."""
    try:
        yield
    except OSError as error:
        problem = f"cannot hold a copy ({error.strerror or error})"
        raise UserError("data.cache", cache, problem, "make room, or choose another directory") from error


@contextmanager
def _locked(path: Path, heartbeat: Callable[[], object]) -> Iterator[None]:
    """The lock of a file, which the kernel frees however a process ends."""
    with open_lock(path) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                heartbeat()
                time.sleep(AGAIN)
        yield
