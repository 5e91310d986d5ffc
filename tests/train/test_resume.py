"""A run that was interrupted and started again computes what it would have computed: in its layout bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megabus.report.history import read_metrics
from tests.support.small_runs import (
    Told,
    checkpoints,
    killed_after,
    read_state_of,
    rows_of,
    run_config,
    start,
    stop_after,
    untimed,
    write_corpus,
)

# Twelve steps, four in each stage: growths come after steps 4 and 8.
STAGES = [
    {"d_model": 52, "n_heads": 4, "d_ff": 90, "max_tokens": 512},
    {"n_layers": 5, "seq_len": 32, "lr": 3e-3},
]
BUDGET = {"growth__max_tokens": 512, "train__max_tokens": 2048, "eval__every": 3, "eval__tokens": 128}
# Layouts of the stages; other changes; the interrupted run's checkpoint section, and after which steps it stops.
CASES = {
    "tp dp pp": ([{"tp": 2}, {"dp": 2}, {"pp": 2}], {"growth__moments": "grow"}, {"every": 3}, (2, 4, 6, 9)),
    "zero2 bf16 reset": (
        [{"dp": 2}, {"tp": 2}, {"dp": 2}],
        {
            "train__zero_stage": 2,
            "train__precision": "bf16",
            "train__logit_power": 0.5,
            "growth__moments": "reset",
            "growth__settle": {"max_angle": 1e-3, "tokens": 320},
            "optimizer__max_angle": 2e-3,
            "optimizer__gate": 0.5,
        },
        {"every": 1, "asynchronous": False},
        (4, 6, 9),
    ),
    "gpt carry": (
        [{"pp": 2}, {"tp": 2}, {"pp": 2}],
        {"model__kind": "gpt", "growth__moments": "carry", "optimizer__weight_decay": 0.1},
        {"every": 5},
        (2, 6, 8),
    ),
    "gpt bf16 reset": (
        [{"tp": 2}, {"pp": 2}, {"dp": 2}],
        {"model__kind": "gpt", "train__precision": "bf16", "growth__moments": "reset", "growth__write": "clone"},
        {"asynchronous": False},
        (3, 4, 8),
    ),
    "fresh layers on none": (
        [{"tp": 2}, {"dp": 2}, {"pp": 2}],
        {"model__n_layers": 0, "growth__depth": "fresh"},
        {"every": 4},
        (4, 9),
    ),
    "four": (
        [{"tp": 2, "pp": 2}, {"pp": 2}, {"tp": 2}],
        {
            "growth__moments": "grow",
            "growth__rewarm": {"share": 0.2, "tokens": 320},
            "optimizer__schedule": "log",
            "optimizer__warmup_share": 0.3,
            "optimizer__gate": 0.5,
            "optimizer__eps": 1e-4,
        },
        {"every": 2},
        (6,),
    ),
}
GROWTHS, LAST = [4, 8], 12


def halved(layout):
    """A step of 8 samples takes two micro batches."""
    return {"micro_batch_size": 4 // layout.get("dp", 1)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def config_of(corpus):
    def make(case, run_dir, **changes):
        layouts, options, *_ = CASES[case]
        stages = [
            stage | halved(layout) | {"layout": layout} for stage, layout in zip(STAGES, layouts[1:], strict=True)
        ]
        micro = {"train__micro_batch_size": halved(layouts[0])["micro_batch_size"]}
        changes = BUDGET | micro | options | {"growth__stages": stages} | changes
        return run_config(corpus, run_dir, layouts, **changes)

    return make


def world_of(case):
    return 4 if case == "four" else 2


@pytest.fixture(scope="module")
def undisturbed(config_of, tmp_path_factory):
    """The whole run at one go: what its ranks saw, and its configuration."""
    made = {}

    def get(case):
        if case not in made:
            config = config_of(case, tmp_path_factory.mktemp("whole") / "run")
            made[case] = (start(config, world_of(case)), config)
        return made[case]

    return get


def goes_on_as(whole: list[Told], part: list[Told]):
    """After every step each rank's masters, moments and weights are those of the undisturbed run, to the bit."""
    for undisturbed_rank, rank in zip(whole, part, strict=True):
        assert rank.steps == [step for step in undisturbed_rank.steps if step.step in rank.numbers]


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bitwise(case, config_of, undisturbed, tmp_path):
    """Stopped before the growths, right after them, and between: losses, gradient norms, validations, growths, and
    the state of all ranks after every step are the undisturbed run's."""
    whole, whole_config = undisturbed(case)
    assert whole[0].numbers == list(range(1, LAST + 1))
    *_, saving, stops = CASES[case]
    config = config_of(case, tmp_path / "run", checkpoint=saving)
    first = 1
    for last in (*stops, LAST):
        ranks = start(config, world_of(case), *([stop_after(last)] if last < LAST else []))
        goes_on_as(whole, ranks)
        for rank in ranks:
            assert rank.numbers == list(range(first, last + 1))
            assert rank.stopped == (last < LAST)
        if last in GROWTHS and config.growth.moments == "reset":
            assert read_state_of(config, last)["optimizer_step"] == 0  # there were no moments to save
        first = last + 1
    assert [row["step"] for row in rows_of(config, "resume")] == list(stops)
    assert [row["stage"] for row in rows_of(config, "resume")] == [sum(at <= last for at in GROWTHS) for last in stops]
    told = untimed(read_metrics(config.run_dir))
    assert told == untimed(read_metrics(whole_config.run_dir))
    assert [row["step"] for row in told if row["event"] == "growth"] == GROWTHS
    assert read_state_of(config, LAST)["monitor"] == read_state_of(whole_config, LAST)["monitor"]


def test_a_killed_run_repeats_what_it_had_not_saved(config_of, undisturbed, tmp_path):
    """Killed twice and stopped once, its metrics tell every step exactly once, and what the undisturbed run told."""
    whole, whole_config = undisturbed("tp dp pp")
    config = config_of("tp dp pp", tmp_path / "run", checkpoint={"every": 3})
    metrics = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(RuntimeError, match=r"ended with \[-9, -9\]"):
        start(config, 2, killed_after(3))  # before it was saved: nothing is there to go on from
    assert [row["step"] for row in rows_of(config, "step")] == [1, 2, 3]
    with pytest.raises(RuntimeError, match=r"ended with \[-9, -9\]"):
        start(config, 2, killed_after(6))
    assert checkpoints(config) == ["latest", "step-00000003", "step-00000004"]
    with metrics.open("a") as file:
        file.write('{"event": "step", "step": 7, "lo')  # torn
    second = start(config, 2, stop_after(7))
    assert second[0].numbers == [5, 6, 7]
    third = start(config, 2)
    assert third[0].numbers == [8, 9, 10, 11, 12]
    goes_on_as(whole, second)
    goes_on_as(whole, third)
    every = [json.loads(line) for line in metrics.read_text().splitlines()]  # the torn line is gone
    assert [row["step"] for row in every if row["event"] == "step"] == [1, 2, 3, 4, 5, 6, *range(5, 13)]
    told = read_metrics(config.run_dir)
    assert [row["step"] for row in told if row["event"] == "step"] == list(range(1, LAST + 1))
    assert untimed(told) == untimed(read_metrics(whole_config.run_dir))
    assert (tmp_path / "run/metrics-1.jsonl").exists()  # of the start that had saved nothing


def files(folder: Path):
    """All that a run has left, but for its lock."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_finished_run_does_nothing_more(undisturbed, config_of, tmp_path):
    """Started again it trains, validates and saves nothing; with a larger budget it goes on."""
    whole, whole_config = undisturbed("tp dp pp")
    run = tmp_path / "run"
    shutil.copytree(whole_config.run_dir, run)
    config = config_of("tp dp pp", run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(whole_config.run_dir, str(run)))
    before = files(run)
    for rank, was in zip(start(config, 2), whole, strict=True):
        assert (rank.steps, rank.stopped, rank.checkpoint) == ([], False, f"{run}/checkpoints/step-00000012")
        assert rank.begun == was.steps[-1].digest
    after = files(run)
    more = after.pop("metrics.jsonl").removeprefix(before["metrics.jsonl"]).decode().splitlines()
    assert [json.loads(line)["event"] for line in more] == ["resume"]
    assert json.loads(more[0])["changes"] == []
    assert after == {name: content for name, content in before.items() if name != "metrics.jsonl"}

    ranks = start(config_of("tp dp pp", run, train__max_tokens=2560), 2)
    assert [rank.numbers for rank in ranks] == [[13, 14]] * 2
    assert rows_of(config, "resume")[-1]["changes"] == ["train.max_tokens: 2048 -> 2560"]
    assert [row["step"] for row in read_metrics(run) if row["event"] == "step"] == list(range(1, 15))
    assert checkpoints(config) == ["latest", "step-00000012", "step-00000014"]


def test_which_checkpoints_are_kept(config_of, tmp_path):
    """Saved every third step, at growths and at the end; kept: the last two, and for good every sixth step's."""
    keep = {"every": 3, "keep_last": 2, "keep_every": 6}
    config = config_of("tp dp pp", tmp_path / "run", checkpoint=keep)
    start(config, 2)
    assert checkpoints(config) == ["latest", *(f"step-{step:08d}" for step in (6, 9, 12))]
    saves = rows_of(config, "save")
    assert [row["step"] for row in saves] == [3, 4, 6, 8, 9, 12]
    for row in saves:
        assert row["error"] is None
        assert row["stall_s"] > 0 < row["write_s"]
        folder = tmp_path / "run/checkpoints" / f"step-{row['step']:08d}"
        sizes = [path.stat().st_size for path in folder.glob("*") if path.name != "manifest.json"]
        assert row["bytes"] > 0
        assert not sizes or row["bytes"] == sum(sizes)
