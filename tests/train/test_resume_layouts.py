"""A run goes on under another layout, on another number of ranks, with other micro batches: the same tokens, step by
step, and the same losses."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from megabus.config import resolve_stages
from megabus.errors import UserError
from megabus.train.resume import check_layouts
from tests.support.small_runs import consumed, rows_of, run_config, start, write_corpus

SAVED, LAST = 4, 24  # goes on for 20 steps, through a growth after step 8
STAGES = [{"d_model": 52, "n_heads": 4, "d_ff": 90}]
RUN = {
    "growth__max_tokens": 1024,
    "growth__stages": STAGES,
    "train__max_tokens": None,
    "train__max_steps": LAST,
    "eval__every": 8,
    "log": {},
    "checkpoint": {"every": SAVED, "keep_last": 99},
}
# ranks, layout of both sizes, samples of a micro batch
ONE, FOUR = (1, {"tp": 1}, 4), (4, {"tp": 2, "pp": 2}, 4)
WAYS = {
    "4 to 1": (FOUR, ONE),
    "4 to 2": (FOUR, (2, {"dp": 2}, 1)),
    "1 to 4": (ONE, (4, {"tp": 2, "dp": 2}, 2)),
    "1 to 2": (ONE, (2, {"pp": 2}, 8)),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, way):
    _, layout, size = way
    return run_config(corpus, run_dir, [layout] * 3, **RUN, train__micro_batch_size=size)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The runs to go on from: their configuration and the tokens of all their steps."""
    made = {}

    def get(way):
        if way[0] not in made:
            config = configured(corpus, tmp_path_factory.mktemp("whole") / "run", way)
            made[way[0]] = (config, consumed(start(config, way[0]), 8))
        return made[way[0]]

    return get


@pytest.mark.parametrize(("before", "after"), WAYS.values(), ids=WAYS)
def test_another_layout_goes_on_with_the_same_tokens(corpus, undisturbed, tmp_path, before, after):
    whole, tokens = undisturbed(before)
    shutil.copytree(whole.run_dir, tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > SAVED:
            shutil.rmtree(folder)
    config = configured(corpus, tmp_path / "run", after)
    told = consumed(start(config, after[0]), 8)
    assert list(told) == list(range(SAVED + 1, LAST + 1))
    assert told == {step: batch for step, batch in tokens.items() if step > SAVED}
    assert len({tuple(batch) for batch in tokens.values()}) == LAST  # control: no two steps are alike

    assert rows_of(config, "resume")[0]["changes"] == []
    assert rows_of(config, "resume")[0]["layout"] != rows_of(config, "resume")[0]["saved_layout"]
    for event, events in (("step", 20), ("eval", 3), ("growth", 1)):
        resumed = rows_of(config, event)[-events:]
        for row, was in zip(resumed, rows_of(whole, event)[-events:], strict=True):
            assert (row["step"], row["tokens"], row["stage"]) == (was["step"], was["tokens"], was["stage"])
            for key in {"loss", "loss_before", "loss_after"} & row.keys():
                assert abs(row[key] - was[key]) <= 1e-5
            assert row.get("lr") == was.get("lr")
    steps = rows_of(whole, "step")
    assert steps[SAVED]["loss"] - steps[-1]["loss"] > 0.1  # control: what is compared moves


def test_a_layout_need_not_fit_what_is_over(corpus, tmp_path):
    """A first stage without three layers, and with batches of 8, goes on on three ranks once it has grown."""
    stages = [{"n_layers": 3, "global_batch_size": 9, "micro_batch_size": 3}]
    run = RUN | {"growth__stages": stages, "growth__max_tokens": 128, "train__max_steps": 12, "eval__every": 4}
    start(run_config(corpus, tmp_path / "run", [{"tp": 1}] * 3, **run, model__n_layers=2), 1)
    for layout in ({"pp": 3}, {"dp": 3}):
        shutil.copytree(tmp_path / "run", there := tmp_path / f"run {layout}")
        longer = run | {"train__max_steps": 14, "preflight": {"enabled": True, "measure": "never"}}
        config = run_config(corpus, there, [layout] * 3, **longer, model__n_layers=2)
        start(config, 3)
        assert [row["step"] for row in rows_of(config, "step")][-2:] == [13, 14]
        for go_on in (partial(resolve_stages, config, 3), partial(check_layouts, config, None, 3)):
            with pytest.raises(UserError, match=r"pipeline ranks without a layer|not divisible by micro_batch_size"):
                go_on()  # the control: from its beginning, or from an older checkpoint
