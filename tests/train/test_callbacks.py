"""A user's own callback: told of everything through growths and resumes, and what becomes of a run that it fails in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

import megabus
from megabus.config.schema import CallbackConfig
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from megabus.train import callbacks
from tests.support.launching import launch_forked
from tests.support.small_runs import (
    attempt,
    checkpoints,
    quick_config,
    rows_of,
    start,
    stop_after,
    untimed,
    write_corpus,
)

PAGE = Path(__file__).parents[2] / "docs/callbacks.md"
RAISES = """
import torch.distributed as dist
from megabus import Callback

class Raises(Callback):
    def __init__(self, where, rank):
        self.where, self.rank = where, rank

    def before_growth(self, run):
        if self.where == "before" and dist.get_rank() == self.rank:
            raise KeyError("no such thing")

    def on_row(self, run, row):
        super().on_row(run, row)
        if row["event"] == self.where and row["step"] == 9 and dist.get_rank() == self.rank:
            raise KeyError("no such thing")
"""


INIT = """import json
class Reads(Callback):
    def __init__(self, text):
        json.loads(text)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def of_the_page(tmp_path):
    """The callback that the documents show, as it stands there."""
    (code,) = re.findall(r"```python title=\"watch.py\"\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "watch.py").write_text(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return f"{tmp_path / 'watch.py'}:Watch"


def test_it_is_told_of_all_through_growths_and_a_resume(corpus, tmp_path, of_the_page, capfd):
    """On two ranks that are laid out anew; and the run's bits are those of a run without it."""
    layouts = [{"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 1}]
    changes = {"checkpoint__every": 6, "train__max_tokens": 2400}
    plain = start(quick_config(corpus, tmp_path / "plain", layouts, **changes), 2)
    named = [{"name": of_the_page, "arguments": {"path": str(tmp_path / "seen.txt")}}]
    config = quick_config(corpus, tmp_path / "run", layouts, callbacks=named, **changes)
    first = start(config, 2, stop_after(11))
    second = start(config, 2)
    whole = [a.steps + b.steps for a, b in zip(first, second, strict=True)]
    assert whole == [rank.steps for rank in plain]
    grown = [f"grown at step {row['step']}: loss {row['loss_after']:.4f}" for row in rows_of(config, "growth")]
    assert len(grown) == 2
    assert (tmp_path / "seen.txt").read_text().splitlines() == grown


@pytest.mark.parametrize(("where", "rank"), [("step", 1), ("before", 1), ("growth", 0), ("save", 1)])
def test_a_run_ends_with_a_checkpoint_where_one_raises_on_one_rank(corpus, tmp_path, capfd, where, rank):
    (tmp_path / "raises.py").write_text(RAISES)
    named = {"name": f"{tmp_path / 'raises.py'}:Raises", "arguments": {"where": where, "rank": rank}}
    cap = {"growth__max_tokens": 9 * 128, "checkpoint__every": 9, "train__max_tokens": 128 * 12}
    cap["checkpoint__asynchronous"] = False  # else a save is told when it is done, perhaps at the end
    config = quick_config(corpus, tmp_path / "run", [{"dp": 2}] * 3, callbacks=[named], **cap)
    ranks = attempt(config, 2)
    method = "before_growth" if where == "before" else f"on_{where}"
    problem = f"raised KeyError: 'no such thing' in {method} after step "
    for told in ranks:
        assert told.error.startswith(f"callbacks.0 = Raises: {problem}")
        assert told.error.endswith(
            f"on rank {rank}; all that was trained is saved: mend it and start again, or set on_error: drop"
        )
        assert told.numbers[-1] < 12
    assert checkpoints(config)[-1] == f"step-{ranks[0].numbers[-1]:08d}"
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1  # the rank's own
    assert 'raise KeyError("no such thing")' in err

    if where != "step":
        return
    dropping = config.model_copy(update={"callbacks": [config.callbacks[0].model_copy(update={"on_error": "drop"})]})
    dropping = dropping.model_copy(update={"run_dir": str(tmp_path / "dropping")})
    whole = start(dropping, 2)
    assert whole[0].numbers[-1] > ranks[0].numbers[-1]
    assert capfd.readouterr().err.count("it is told nothing any more") == 1


def test_it_is_refused_before_anything_is_made(corpus, tmp_path):
    """In one line each, on every rank."""
    file = tmp_path / "mine.py"
    file.write_text("from megabus import Callback\nclass Good(Callback):\n    pass\nclass Other:\n    pass\n" + INIT)
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(7)\n")
    cases = [
        (f"{file}:Missing", {}, "callbacks.0 = ", f"{file} has no Missing; name a class of it"),
        (f"{file}:Other", {}, "callbacks.0 = ", "is no megabus.Callback; derive its class from that"),
        (f"{file}:Good", {"every": 3}, "callbacks.0.arguments = ", "are not taken (TypeError: "),
        (f"{file}:Reads", {"text": 3}, "callbacks.0 = ", f"{file}:Reads: cannot be made (TypeError: the JSON object"),
        (f"{file}:Reads", {"text": "{"}, "callbacks.0 = ", "(char 1), mine.py:9); mend the class, or callbacks.0.arg"),
        (f"{tmp_path}/none.py:Good", {}, "callbacks.0 = ", "cannot be imported (FileNotFoundError: "),
        ("no_such_module:Good", {}, "callbacks.0 = ", "No module named 'no_such_module'); mend the name"),
        (f"{tmp_path}/broken.py:Good", {}, "callbacks.0 = ", "broken.py:1); mend the name"),
        (f"{tmp_path}/script.py:Good", {}, "callbacks.0 = ", "(SystemExit: 7, script.py:2); mend the name"),
    ]
    configs = []
    for name, arguments, *_ in cases:
        named = [{"name": name, "arguments": arguments}]
        configs.append(quick_config(corpus, tmp_path / "run", [{}] * 3, callbacks=named))
    (lines,) = run_ranks(1, _refused, configs)
    for line, (*_, begins, holds) in zip(lines, cases, strict=True):
        assert line.startswith(begins), line
        assert holds in line
        assert "\n" not in line
    assert not (tmp_path / "run").exists()
    for name in ("mine.py", "mine:", ":Good", "mine.py:not a name"):
        with pytest.raises(UserError, match=r"callbacks\.0\.name = .*: names no class; write path"):
            quick_config(corpus, tmp_path / "run", [{}] * 3, callbacks=[name])


def _refused(configs):
    import megabus.train.loop as loop

    lines = []
    for config in configs:
        with pytest.raises(UserError) as caught:
            loop.train(config)
        lines.append(str(caught.value))
    return lines


class Own(megabus.Callback):
    """Writes rows of its own, and hears of them as all do."""

    def __init__(self):
        self.heard, self.is_open = [], True

    def on_row(self, run, row):
        assert self.is_open
        self.heard.append((row["event"], row["step"]))
        super().on_row(run, row)

    def on_step(self, run, row):
        if row["step"] == 2:
            run.tell("mine", {"twice": 2 * row["step"], "parts": [float("nan"), 1.0]})

    def on_end(self, run):
        run.tell("end", {})
        self.is_open = False


def test_python_is_given_the_same(corpus, tmp_path):
    config = quick_config(corpus, tmp_path / "run", [{}] * 3, train__max_tokens=128 * 3)
    ((heard, folder),) = run_ranks(1, _from_python, config)
    assert folder == str(tmp_path / "run/checkpoints/step-00000003")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [*heard, ("end", 3)] == [(row["event"], row["step"]) for row in rows]
    (own,) = rows_of(config, "mine")
    assert (own["twice"], own["tokens"], own["parts"]) == (4, 256, [None, 1.0])


def _from_python(config):
    own = Own()
    outcome = megabus.train(config.model_dump(), callbacks=[own])
    with pytest.raises(UserError, match="is no megabus"):
        megabus.train(config, callbacks=[object()])
    own.on_error = "go on"
    with pytest.raises(UserError, match=r"^callbacks\[0\]\.on_error = go on: is neither stop nor drop; "):
        megabus.train(config, callbacks=[own])
    return own.heard, str(outcome.checkpoint)


def test_what_ranks_have_not_alike_is_refused(corpus, tmp_path):
    """As where rank 0 alone is given one: the others would wait for nothing at its first word."""
    config = quick_config(corpus, tmp_path / "run", [{"dp": 2}] * 3)
    told = "callbacks = none: are what rank 1 has, and rank 0 has Own; give every rank as many of the same kind"
    assert run_ranks(2, _of_rank_0, config) == [told] * 2
    assert not (tmp_path / "run").exists()


def _of_rank_0(config):
    with pytest.raises(UserError) as caught:
        megabus.train(config, callbacks=[Own()] if dist.get_rank() == 0 else [])
    return str(caught.value)


TELLS = """
import os, signal, sys
import torch
import torch.distributed as dist
from megabus import Callback

class Hears(Callback):
    def __init__(self):
        self.rows = []

    def on_row(self, run, row):
        if row["event"].startswith("told"):
            self.rows.append((row["event"], row["number"]))

    def on_end(self, run):
        heard = [None] * dist.get_world_size()
        dist.all_gather_object(heard, self.rows)
        run.tell("heard", {"same": all(rows == self.rows for rows in heard), "rows": self.rows})

class Tells(Callback):
    def __init__(self, how):
        self.how = how

    def on_step(self, run, row):
        event, number = "told by " + self.how, row["step"]
        if number == 2 and self.how == "a tensor":
            number = torch.ones(1)
        if number == 2 and self.how == "the trainer's event":
            event = "eval"
        step = {"step": 99} if number == 2 and self.how == "a step" else {}
        run.tell(event, {"number": number, "samples": 5} | step)
        if number == 2 and self.how == "one rank" and dist.get_rank() == 1:
            raise KeyError
        if number == 2 and self.how == "one that leaves" and dist.get_rank() == 1:
            sys.exit("enough")

    def on_row(self, run, row):
        super().on_row(run, row)
        if row["event"] == "told by itself" and self.how == "itself" and row["step"] == 2:
            run.tell("told by itself", {"number": 2})

class Stops(Callback):
    def __init__(self, asks=True):
        self.asks = asks

    def on_row(self, run, row):
        if self.asks:
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError("at the start")
"""


def test_what_cannot_be_told_is_told_on_no_rank(corpus, tmp_path, capfd):
    """By any rank or by one: all go on alike, without that callback, and others hear the same rows."""
    (tmp_path / "tells.py").write_text(TELLS)
    ways = ["a tensor", "the trainer's event", "a step", "one rank", "one that leaves", "itself"]
    tells = {"name": f"{tmp_path / 'tells.py'}:Tells", "on_error": "drop"}
    named = [{"name": f"{tmp_path / 'tells.py'}:Hears"}, *(tells | {"arguments": {"how": how}} for how in ways)]
    config = quick_config(corpus, tmp_path / "run", [{"dp": 2}] * 3, callbacks=named, train__max_tokens=128 * 3)
    start(config, 2)
    (heard,) = rows_of(config, "heard")
    assert heard["same"]
    answers = [["told by itself", 2]] * (1 + callbacks.MOST_ANSWERS)
    assert heard["rows"] == [[f"told by {how}", 1] for how in ways] + answers
    err = capfd.readouterr().err
    assert err.count("it is told nothing any more") == len(ways)
    for told in (
        "Tensor is not JSON serializable",
        "'eval' cannot be told",
        "step = 99: every row has the run's own",
        "raised KeyError: in on_step after step 2, on rank 1; ",
        "raised SystemExit: enough in on_step after step 2, on rank 1; ",
        "'told by itself' is told because it was told",
    ):
        assert told in err


def test_a_whole_run_shows_what_it_is_though_one_raises_at_its_end(corpus, tmp_path):
    """Table, picture and page first, on which the other ranks wait; then the line that the run ends with."""
    (tmp_path / "ends.py").write_text(
        "from megabus import Callback\n"
        "class Ends(Callback):\n"
        "    def on_end(self, run):\n"
        "        if not run.is_rank_0:\n"
        "            raise KeyError('late')\n"
    )
    named = [{"name": f"{tmp_path / 'ends.py'}:Ends"}]
    config = quick_config(corpus, tmp_path / "run", [{"dp": 2}] * 3, callbacks=named, train__max_tokens=128 * 2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    first, second = launch_forked("--config", tmp_path / "run.yaml")
    assert [first.code, second.code] == [2, 2]
    assert (tmp_path / "run/loss.png").exists()
    assert (tmp_path / "run/report.html").exists()
    assert first.out.endswith(f"checkpoint: {tmp_path}/run/checkpoints/step-00000002\n")
    last = first.err.splitlines()[-1]
    assert last.startswith("error: callbacks.0 = Ends: raised KeyError: 'late' in on_end after step 2, on rank 1; all")


def test_one_that_raises_is_told_though_the_run_was_asked_to_stop(corpus, tmp_path, capfd):
    (tmp_path / "tells.py").write_text(TELLS)
    config = quick_config(corpus, tmp_path / "run", [{}] * 3, callbacks=[{"name": f"{tmp_path / 'tells.py'}:Stops"}])
    (rank,) = attempt(config, 1)
    assert rank.error.startswith("callbacks.0 = Stops: raised KeyError: 'at the start' in on_row after step 0")


def test_what_ends_at_the_start_goes_on_with_the_same_bits(corpus, tmp_path):
    """From a checkpoint of step 0, whose loss is not measured once more."""
    (tmp_path / "tells.py").write_text(TELLS)
    stops = {"name": f"{tmp_path / 'tells.py'}:Stops", "arguments": {"asks": False}}
    config, plain = (
        quick_config(corpus, tmp_path / name, [{}] * 3, train__max_tokens=128 * 5, log={"why": True})
        for name in ("run", "plain")
    )
    (rank,) = attempt(config.model_copy(update={"callbacks": [CallbackConfig(**stops)]}), 1)
    assert "raised KeyError: 'at the start' in on_row after step 0" in rank.error
    assert checkpoints(config)[-1] == "step-00000000"
    assert start(config, 1)[0].steps == start(plain, 1)[0].steps
    told = untimed(rows_of(config, "eval"))
    assert told == untimed(rows_of(plain, "eval"))
    assert told[0]["why"] == "κ waits: 1 of 8 evaluations (growth.trigger.min_evals)"


def test_the_trainers_own_events_are_known():
    room = Path(callbacks.__file__).parent
    told = {event for file in room.glob("*.py") for event in re.findall(r'\.tell\(\s*"(\w+)"', file.read_text())}
    assert told - callbacks.OWN == set()
    assert len(told) == len(callbacks.OWN) - 1  # a step is told by one name of two
