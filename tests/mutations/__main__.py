"""Plant each fault in a copy of a checkout, run the tests that are to notice it, and print which did.

python -m tests.mutations                     # all of them, in this checkout: some seconds each
python -m tests.mutations --only growth/      # those whose file's name has this in it
python -m tests.mutations --root ../old       # in another checkout, with that one's tests
python -m tests.mutations --control           # the same tests without a fault: all must pass

killed: a test failed. survived: all passed. stale: the fault has no place any more, or one of its tests is gone.
broken: pytest ended otherwise, or not in time, so that no test has said anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.faults import FAULTS, Fault
from tests.mutations.plant import place_of, runs_of
from tests.support.forked import wait_for

HERE = Path(__file__).resolve().parents[2]
LIMIT = 900.0  # seconds; a fault may make ranks wait for each other
FAILED, PASSED, EMPTY = 1, 0, 5  # of pytest's exit codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout; this one when left out")
    parser.add_argument("--only", default="", help="a part of the names of files")
    parser.add_argument("--control", action="store_true", help="plant nothing: every test must pass")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a fault may take")
    args = parser.parse_args()
    _import_heavy()
    survived, wanted = 0, "survived" if args.control else "killed"
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(
            args.root, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv", "runs", "data.*")
        )
        for fault in (fault for fault in FAULTS if args.only in fault.file):
            begun = time.monotonic()
            fault = fault._replace(new=fault.old) if args.control else fault
            word = _outcome(fault, copy, args.limit)
            survived += word != wanted
            change = " ".join(f"{fault.old.strip()} -> {fault.new.strip() or '(nothing)'}".split())
            print(f"{word:9} {time.monotonic() - begun:4.0f} s  {fault.file}: {change}", flush=True)
    print(f"{survived} not {wanted}")
    return int(survived > 0)


def _import_heavy() -> None:
    """All but megabus, once: each fault's tests run in a fork of this process."""
    import deepspeed  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo

    torch.set_num_threads(1)


def _outcome(fault: Fault, copy: Path, limit: float) -> str:
    try:
        path, runs = place_of(fault, copy), runs_of(fault, copy)
    except (LookupError, ValueError) as error:
        return f"stale ({error})"
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        for arguments in runs:
            code = _tested(copy, arguments, limit)
            if code != PASSED:
                return _word(code, arguments)
        return "survived" if runs else "stale (no tests)"
    finally:
        path.write_text(sound, encoding="utf-8")


def _word(code: int | None, arguments: list[str]) -> str:
    if code is None:
        return "broken (no end in time)"
    if code == EMPTY:
        return f"stale (nothing is selected by {' '.join(arguments)})"
    return "killed" if code == FAILED else f"broken ({code})"


class _Collection:
    """For pytest: a file that cannot be imported ends it; with -x that could count as a test that failed."""

    def pytest_collectreport(self, report) -> None:
        import pytest

        if report.failed:
            pytest.exit(str(report.longrepr), pytest.ExitCode.INTERRUPTED)


def _tested(copy: Path, arguments: list[str], limit: float) -> int | None:
    """pytest's exit code in a fork; None where it did not end."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
        os.chdir(copy)
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "megabus")]:
            del sys.modules[name]
        os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        import pytest

        # By `pythonpath` the copy, which is the root, comes before this checkout.
        os._exit(int(pytest.main(["-x", "-o", "pythonpath=.", *arguments], [_Collection()])))
    return wait_for(pid, limit, kill=os.killpg)


if __name__ == "__main__":
    sys.exit(main())
