"""Which line of a text comes next, for lm-evaluation-harness; needs nothing of megabus."""

import random
from pathlib import Path

import datasets

BEFORE, CHOICES, LONGEST = 6, 4, 200  # lines that are read, lines to choose from, characters of one


def next_lines(text=None, questions=64, seed=0, **_):
    """A plain text as the split `test`: lines of it, the one that follows, and others of the same text from elsewhere.

    lm-eval passes --metadata and --model_args here. The same text, number and seed give the same questions.
    """
    if text is None:
        raise SystemExit("""error: name the text: --metadata '{"text": "book.txt"}'""")
    path = Path(text)
    if not path.is_file():
        raise SystemExit(f"error: text = {text}: is no file; check the path")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line) <= LONGEST and line.count(" ") >= 3]  # headings say nothing
    need = BEFORE + CHOICES
    if len(lines) < need:
        raise SystemExit(f"error: text = {text}: has {len(lines)} lines of four words or more; give {need} or more")
    draw = random.Random(seed)
    rows = []
    for _number in range(int(questions)):
        at = draw.randrange(BEFORE, len(lines))
        others = draw.sample([line for line in dict.fromkeys(lines) if line != lines[at]], CHOICES - 1)
        label = draw.randrange(CHOICES)
        rows.append({"before": "\n".join(lines[at - BEFORE : at]), "label": label})
        rows[-1]["choices"] = [*others[:label], lines[at], *others[label:]]
    return {"test": datasets.Dataset.from_list(rows)}
