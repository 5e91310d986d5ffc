"""The one exception for whatever a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: names the key (or file), its value, what is wrong with it and the remedy, in one line.

    The launcher prints it on rank 0 only, without a traceback, and every rank exits non-zero. An error that other
    ranks need not meet (a token read from a bad disk block) is marked `one_rank`, and that rank prints it.
    """

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        self.one_rank = False
        text = f"{key} = {value}: {problem}; {remedy}"
        super().__init__(" ".join(text.split()))
