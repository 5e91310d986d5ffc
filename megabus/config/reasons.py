"""Why a model grows, and what each reason is called."""

from __future__ import annotations

from typing import Literal, NamedTuple

Reason = Literal["kappa", "cap", "marginal"]


class Words(NamedTuple):
    """flag: at a growth in a picture. met: in the log's line."""

    flag: str
    met: str


REASONS: dict[str, Words] = {
    "kappa": Words("κ", "κ is met"),
    "cap": Words("cap", "the stage's cap is reached"),
    "marginal": Words("return", "the next size gives more"),
}
