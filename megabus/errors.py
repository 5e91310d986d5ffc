"""The one exception for whatever a user can mend."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any, TextIO

LONGEST = 2000  # characters of a value and of a problem that are told: a file may put a book into them
REPLACING = ("replace", "backslashreplace")  # what streams do that never raise for a character


class UserError(Exception):
    """Bad input: names the key (or file), its value, what is wrong with it and the remedy, in one line.

    All ranks raise it together (see `megabus.parallel.agree`). The launcher prints it on rank 0 only, without a
    traceback, and every rank exits non-zero.
    """

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(printable(f"{key} = {_short(str(value))}: {_short(problem)}; {remedy}"))

    def within(self, where: str) -> UserError:
        """The same of a key inside of something that is named; without a key, of that thing itself."""
        return UserError(f"{where}: {self.key}" if self.key else where, self.value, self.problem, self.remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their args, here the text, where __init__ wants its parts.
        return type(self), (self.key, str(self.value), self.problem, self.remedy)


def printable(text: str) -> str:
    """In one line, and without what a terminal would obey: texts come from files and their names too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def say(text: str) -> None:
    """Print a line. A log on a full disk must not end a run, so what cannot be printed is lost."""
    with contextlib.suppress(OSError):
        show_anything(sys.stdout)
        print(text, flush=True)


def note(text: str) -> None:
    """The same on stderr, which is not where results are looked for."""
    with contextlib.suppress(OSError):
        show_anything(sys.stderr)
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """The same on stderr, marked as a warning, in one line."""
    note(f"warning: {printable(text)}")


def show_anything(stream: TextIO | None) -> None:
    """From now on, what a stream's encoding lacks (Latin-1, or ASCII under LC_ALL=C) shows as "?" and never raises."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors not in REPLACING:
        stream.reconfigure(errors="replace")
