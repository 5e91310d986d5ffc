"""Start the launcher as its users do, or its `main` in forked ranks; what each rank said, and how it ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import megabus.train.loop  # noqa: F401  here once: it takes a second
from megabus.cli import main
from megabus.testing import ranks as forked
from megabus.testing.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launcher/train.py"
LIMIT = 30.0  # seconds from the error to the end of the last rank
START = 60.0  # and what importing torch and DeepSpeed may take before it, on a busy machine


class Ended(NamedTuple):
    """How a rank ended."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """Nothing of the test run's own ranks. PYTHONPATH is where megabus comes from, if it is not installed."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "PYTHONPATH") if key in os.environ}
    return kept | {"OMP_NUM_THREADS": "1"} | extra


def free_port() -> str:
    return str(forked.free_port())


def launch(*args: object, world: int = 2, limit: float = LIMIT) -> list[Ended]:
    """One plain process a rank, with no launcher to end it; fails if one of them outlives `limit` seconds."""
    port, ranks = free_port(), []
    for rank in range(world):
        ids = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(LAUNCHER), *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **ids),
            )
        )
    try:
        texts = [rank.communicate(timeout=limit) for rank in ranks]
        return [Ended(rank.returncode, *text) for rank, text in zip(ranks, texts, strict=True)]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def launch_forked(
    *args: object, world: int = 2, folders: tuple[Path, ...] = (), encoding: str = "utf-8"
) -> list[Ended]:
    """The launcher's `main` in forked ranks: the same, without starting Python anew.

    folders: the working directory of each rank. encoding: of their terminals.
    """
    return [Ended(*ended) for ended in run_ranks(world, run_launcher, args, folders, encoding, timeout=LIMIT)]


def run_launcher(
    args: tuple[object, ...], folders: tuple[Path, ...] = (), encoding: str = "utf-8"
) -> tuple[int, str, str]:
    """On one rank: its exit code, and what it said."""
    if folders:
        os.chdir(folders[int(os.environ["RANK"])])
    file = partial(tempfile.TemporaryFile, "w+", encoding=encoding)
    with file() as out, file() as err:  # files: the watchdog needs them
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train", *map(str, args)])
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def the_error(ranks: list[Ended]) -> str:
    """All ranks failed, and all that any of them said is one line of rank 0; that line."""
    assert all(rank.code != 0 for rank in ranks)
    assert [rank.err for rank in ranks[1:]] == [""] * (len(ranks) - 1)
    line = ranks[0].err.removesuffix("\n")
    assert line.startswith("error: ")
    assert "\n" not in line
    assert not any("error" in rank.out.lower() or "Traceback" in rank.out for rank in ranks)
    return line


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that lies under a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
