"""A Python command as its users type it, without starting Python anew: in a fork of this process, which has imported
torch and DeepSpeed already. Importing them is most of what a small command would take."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn


def run_python(
    command: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *command], capture_output=True, text=True)`, for `script ...` and
    `-m module ...`.

    env: the whole environment; this process's own when left out. What a test must leave to a true process: which
    modules a command imports, and what becomes of it when it is killed.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else the fork would write it again
        pid = os.fork()
        if pid == 0:
            _child(words, cwd, env, out, err)
        code = wait_for(pid, timeout)
        out.seek(0)
        err.seek(0)
        if code is None:
            raise subprocess.TimeoutExpired(words, timeout, out.read(), err.read())
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


class Begun:
    """A job that goes on in a fork of this process, which leads a group, while this one does something else."""

    def __init__(self, job: Callable[[], Any]) -> None:
        self._result = tempfile.TemporaryFile()  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.setsid()
            try:
                ended: tuple[Any, str] = (job(), "")
            except BaseException:
                ended = (None, traceback.format_exc())
            self._result.write(pickle.dumps(ended))
            self._result.flush()
            os._exit(0)
        self._code: int | None = None

    @property
    def goes_on(self) -> bool:
        if self._code is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code is None

    def wait(self, timeout: float) -> Any:
        """What the job returned. Raises AssertionError with its traceback, or when it is late and had to be killed."""
        deadline = time.monotonic() + timeout
        while self.goes_on and time.monotonic() < deadline:
            time.sleep(0.01)
        late = self.goes_on
        self.kill()
        assert not late, f"goes on after {timeout:g} s"
        assert self._code == 0, f"ended with {self._code}"
        self._result.seek(0)
        result, error = pickle.loads(self._result.read())
        assert not error, error
        return result

    def kill(self) -> None:
        """The job, and what it has started and not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        if self.goes_on:
            _, status = os.waitpid(self._pid, 0)
            self._code = os.waitstatus_to_exitcode(status)


def wait_for(pid: int, timeout: float, kill: Callable[[int, int], None] = os.kill) -> int | None:
    """The exit code; None for a process that had to be killed. kill: os.killpg where it leads a group."""
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def _child(words: list[str], cwd: Path | None, env: Mapping[str, str] | None, out: IO[str], err: IO[str]) -> NoReturn:
    code = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        code = _run(words)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run(words: list[str]) -> int:
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    gc.disable()  # what was imported before the fork is left alone, and so shared
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
