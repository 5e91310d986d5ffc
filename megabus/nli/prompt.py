"""A pair as text, and its label as the text that follows."""

from __future__ import annotations

import string
from dataclasses import dataclass

from megabus.errors import UserError
from megabus.nli.pairs import LABELS

# GPT-3's template for such tasks (Brown et al. 2020, appendix G), as in lm-evaluation-harness's MNLI.
TEMPLATE = "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:"
VERBALIZERS = (" True", " Neither", " False")  # in the order of LABELS


@dataclass(frozen=True)
class Template:
    """text: with {premise} and {hypothesis}, and {{ for a brace; labels: what follows it, in the order of LABELS."""

    text: str = TEMPLATE
    labels: tuple[str, ...] = VERBALIZERS

    def __post_init__(self) -> None:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None]
        except ValueError as error:
            raise UserError("--template", self.text, f"is malformed ({error})", "write {{ and }} for braces") from error
        unknown = [name for name in names if name not in ("premise", "hypothesis")]
        if unknown:
            raise UserError("--template", self.text, f"has a field {{{unknown[0]}}}", "use {premise} and {hypothesis}")
        if "hypothesis" not in names or len(names) != len(set(names)):
            problem = "must hold {hypothesis} once, and {premise} at most once"
            raise UserError("--template", self.text, problem, "see --help for the default")
        for label, text in zip(LABELS, self.labels, strict=True):
            if not text.strip():
                raise UserError("--labels", f"{label}={text!r}", "is blank", "give it a word")
            if self.labels.count(text) > 1:
                raise UserError("--labels", f"{label}={text!r}", "is another label's too", "give each its own word")

    def prompt(self, premise: str, hypothesis: str) -> str:
        return self.text.format(premise=premise, hypothesis=hypothesis)

    def before_premise(self, hypothesis: str) -> str | None:
        """The prompt's text up to the premise; None where it has none."""
        head = ""
        for text, name, _, _ in string.Formatter().parse(self.text):
            head += text
            if name == "premise":
                return head
            head += hypothesis if name else ""
        return None
