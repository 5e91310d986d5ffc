"""The one exception for whatever a user can mend."""

from __future__ import annotations

from typing import Any


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

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their args, here the text, where __init__ wants its parts; __dict__ carries `one_rank`.
        return type(self), (self.key, self.value, self.problem, self.remedy), self.__dict__
