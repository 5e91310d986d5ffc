"""A command: its arguments, and how its process ends. Nothing heavy is imported: bad input ends before torch is."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from errno import ENOMEM
from pathlib import Path
from typing import Any, NoReturn

from megabus.errors import UserError, note, show_anything

PATIENCE = 5.0  # seconds that a rank leaves rank 0 to tell bad input in
PEER_GONE = ("closed by peer", "reset by peer")  # gloo's words for it
# torch's words for it, on CPUs and, where it is no OutOfMemoryError, on GPUs; the kernel's.
NO_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)
MORE = "free some, or use a machine with more"  # of commands that have no better advice
OUTCOME = "MEGABUS_OUTCOME"  # names a file to leave the outcome in
DEAF = "stdout: its reader, such as tee, is gone; start the same command again, with stdout to a file"
LOST = "lost the connection to another rank, which has probably ended: its log says why. Start the same command again"


NPROC = ("--nproc-per-node", "--nproc")  # torchrun's name for it, and a short one


class Parser(argparse.ArgumentParser):
    """A wrong command line is told in one line, as any other bad input; a description is printed as it is written.

    The `~` of `--output=~/x`, which shells leave alone, is read as that of `--output ~/x`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self._words: Sequence[str] | None = None

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._words = args
        return super().parse_args(_at_home(args), namespace)

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        self._words = args
        return super().parse_intermixed_args(_at_home(args), namespace)

    def error(self, message: str) -> NoReturn:
        words = sys.argv[1:] if self._words is None else self._words
        raise UserError("command line", shlex.join(words), message, "see --help")


def _at_home(words: Sequence[str] | None) -> list[str]:
    def expand(match: re.Match[str]) -> str:
        return match[1] + os.path.expanduser(match[2])

    return [re.sub(r"^(--[\w-]+=)(~[^/]*)(?=/|$)", expand, word) for word in (sys.argv[1:] if words is None else words)]


class RankParser(Parser):
    """Of a command with one process a rank. No abbreviations: ranks are given the same words less `NPROC`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
        self.add_argument(*NPROC, type=int, metavar="N", help="start N ranks on this machine")


def run(main: Callable[[], int], advice: str = MORE) -> int:
    """The exit code of `main`, with bad input told in one line. What the terminal cannot show is shown as "?".

    advice: what to do where memory is short. What the reader of stdout no longer wants, such as `head`, is lost in
    silence; what a full disk has no room for is told.
    """
    fill_streams()
    try:
        code = _run(main, advice)
    except SystemExit as ended:  # argparse's, after its help
        if ended.code or (lost := _lost_of_stdout()) is None:
            raise
        code = 1
    except OSError:
        if (lost := _lost_of_stdout("\n")) is None:  # what has failed may be gone from its buffer
            raise
        code = 1
    else:
        lost = _lost_of_stdout()
    if lost is not None:
        note(f"error: stdout: cannot be written ({lost.strerror}); make room, or send it elsewhere")
        _silence_stdout()
    return code if lost is None else code or 1


def _run(main: Callable[[], int], advice: str) -> int:
    try:
        return main()
    except UserError as error:
        note(f"error: {error}")
        tell_outcome("refused")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not memory_is_short(error):
            raise
        note(f"error: {_no_memory(error, advice)}")
        return 1
    finally:
        if _reader_is_gone():  # Python writes what it still holds when it ends, and would tell that it cannot
            _silence_stdout()


def fill_streams() -> None:
    """Give stdin, stdout and stderr a place where they are closed (`>&-`), which shows nothing. Else the next files to
    be opened, a checkpoint's too, would have their numbers, and libraries write to 1 and 2 whatever these are."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    show_anything(sys.stdout)


def _silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lost_of_stdout(more: str = "") -> OSError | None:
    """Why what was printed cannot be written, and `more`, if it cannot."""
    try:
        print(more, end="", flush=True)
    except OSError as error:
        return error
    except ValueError:  # it was closed
        return None
    return None


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
    except (OSError, TypeError, ValueError):  # there is none, it is closed, or it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def tell_outcome(word: str) -> None:
    """Leave how a run ended, "finished", "stopped" or "refused", where the one who started it has asked for it.

    Launchers do not pass exit codes on: torchrun's is 1 for all, and a code other than 0 makes both torchrun and
    deepspeed kill the ranks that have not ended yet. Called by rank 0.
    """
    if os.environ.get(OUTCOME):
        with contextlib.suppress(OSError):  # a full disk: no outcome is read as a failure
            Path(os.environ[OUTCOME]).write_text(f"{word}\n")


def run_rank(main: Callable[[], int], advice: str = MORE) -> int:
    """The same of a rank: rank 0 alone tells bad input, a traceback says whose it is, a peer's loss needs none. That
    nobody reads stdout any more is told where something raises for it, as `say` does not."""
    fill_streams()

    def telling() -> int:
        try:
            return main()
        except UserError as error:
            tell_torchrun(f"error: {error}")
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():  # `_run` is silent: a job must not end so
                note(f"error: {DEAF}")
                tell_torchrun(f"error: {DEAF}")
            if memory_is_short(error):  # which `_run` tells, and ends with
                tell_torchrun(f"error: {_no_memory(error, advice)}")
            raise

    try:
        return _run(telling, advice) if _rank() == "0" else main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK") == "0":  # of another machine, where torchrun has a page of its own
            tell_torchrun(f"error: {error}")
        # A launcher ends all ranks when one has ended: were this the first, rank 0 could not tell why.
        time.sleep(PATIENCE)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if peer_is_gone(error):
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f": {LOST} ({where.name}: {str(error).splitlines()[0]})"
            message = "\n".join((message, *getattr(error, "__notes__", ())))
        elif memory_is_short(error):
            message = f": {_no_memory(error, advice)}"
        else:
            message = f" failed:\n{traceback.format_exc()}"
        note(f"rank {_rank()}{message}")
        tell_torchrun(f"rank {_rank()}{message}".rstrip())
        return 1


def memory_is_short(error: Exception) -> bool:
    """Whether it says that there is no more memory, Python's, torch's or the kernel's, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return getattr(error, "errno", None) == ENOMEM or any(words in str(error) for words in NO_MEMORY)


def _no_memory(error: Exception, advice: str) -> str:
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return f"out of memory: {advice} ({said})"


def peer_is_gone(error: Exception) -> bool:
    """Whether it says that the connection to another rank was closed."""
    return any(words in str(error) for words in PEER_GONE)


def tell_torchrun(text: str) -> None:
    """Leave why this rank ends where torchrun looks for it. Below what a rank has said it writes a traceback of its own
    and some 25 lines about ranks, and ends them with this."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # a full disk: torchrun then says that it knows nothing
            Path(place).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def end_rank(main: Callable[[], int], advice: str = MORE) -> NoReturn:
    """Run `main`, and end the process whatever became of it."""
    code = run_rank(main, advice)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    # Not sys.exit: after an error the communication threads would wait for ranks that are gone.
    os._exit(code)


def _rank() -> str:
    return os.environ.get("RANK", "0")
