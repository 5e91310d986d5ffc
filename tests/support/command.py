"""The command `megabus` in the process of the test: without starting Python and importing torch anew."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

from megabus.cli import main


class Done(NamedTuple):
    """How a command ended; named as `subprocess.CompletedProcess` names it."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*args: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args)])
    return Done(code, out.getvalue(), err.getvalue())
