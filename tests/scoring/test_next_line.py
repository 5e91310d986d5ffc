"""The task of lm-evaluation-harness that asks which line of a local text comes next."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.support.later import Later

TASK = Path(__file__).parents[2] / "configs/eval/lines/megabus_next_line.yaml"
tasks = Later("lm_eval.tasks")


def next_lines(*args, **options):
    return runpy.run_path(str(TASK.with_name("utils.py")))["next_lines"](*args, **options)


def write_text(folder, n_lines=40):
    """Lines that say their number; headings and an endless line between them are no questions."""
    path = folder / "book.txt"
    lines = [f"  this is line number {i} of it\n\nHEADING\n{'long ' * 60}\n" for i in range(n_lines)]
    path.write_text("".join(lines))
    return path


def test_the_right_choice_is_the_line_that_follows(tmp_path):
    path = write_text(tmp_path)
    rows = list(next_lines(str(path), 30)["test"])
    assert len(rows) == 30
    for row in rows:
        numbers = [int(line.split()[4]) for line in row["before"].split("\n")]
        follows = numbers[-1] + 1
        assert numbers == [*range(follows - 6, follows)]
        choices = [int(line.split()[4]) for line in row["choices"]]
        assert choices[row["label"]] == follows
        assert len({*choices}) == 4
    assert {row["label"] for row in rows} == {0, 1, 2, 3}
    assert rows == list(next_lines(str(path), 30)["test"])
    assert rows != list(next_lines(str(path), 30, seed=1)["test"])


def test_the_harness_asks_so(tmp_path):
    metadata = {"text": str(write_text(tmp_path)), "questions": 3}
    known = tasks.TaskManager(include_path=str(TASK.parent), include_defaults=False, metadata=metadata)
    (task,) = known.load("megabus_next_line")["tasks"].values()
    (first, *others) = task.test_docs()
    assert len(others) == 2
    requests = task.construct_requests(first, task.doc_to_text(first), metadata=("megabus_next_line", 0, 1))
    assert [request.args for request in requests] == [(first["before"], "\n" + line) for line in first["choices"]]
    assert task.doc_to_target(first) == first["label"]


def test_what_is_no_text_is_told(tmp_path):
    for text, told in (
        (None, "name the text: --metadata"),
        (tmp_path / "none.txt", "none.txt: is no file; check the path"),
        (write_text(tmp_path, 9), "has 9 lines of four words or more; give 10 or more"),
    ):
        with pytest.raises(SystemExit, match=told):
            next_lines(text)
