"""What a run tells about itself: rows for programs, lines for people, files for TensorBoard and wandb."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megabus.config import RunConfig, Stage, parse_config, resolve_stages
from megabus.config.schema import KappaConfig
from megabus.kappa.monitor import KappaMonitor, KappaView
from megabus.kappa.predictors import StageSpan
from megabus.table import clock
from megabus.train.log import describe, seconds_left, step_line
from megabus.train.metrics import Metrics
from megabus.train.run_dir import open_metrics
from tests.support.forked import run_python

TREE: dict[str, Any] = {
    "model": {"vocab_size": 67, "d_model": 36, "n_layers": 3, "n_heads": 4, "head_dim": 6, "d_ff": 62},
    "layout": {"tp": 2},
    "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "max_steps": 10},
    "optimizer": {"lr": 1e-2},
    "data": {"train": "a", "valid": "b"},
}
STEP = {
    "step": 30,
    "tokens": 3840,
    "flops": 2e9,
    "stage": 0,
    "loss": 3.14159,
    "lr": 1e-2,
    "grad_norm": 0.567,
    "tokens_per_s": 12345.6,
    "tokens_per_s_per_gpu": 3086.4,
    "mfu": None,
    "unit_error": 2e-7,
    "share": 0.375,
}


GAINS = {"step": 31, "s_qk": {"p0": 0.5, "p50": math.nan, "p100": 1.5}}
SAMPLE = {"step": 31, "samples": [{"prompt": "KING: ", "text": "what?"}], "seconds": 1.0}
MEMORY = {"step": 31, "max_bytes": 2**30, "max_rank": 3, "of": "GPU"}


def run_config(run_dir: Path, **log: object) -> RunConfig:
    return parse_config(TREE | {"run_dir": str(run_dir), "log": log})


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return resolve_stages(run_config(tmp_path), 4)[0]


def told(run_dir: Path) -> list[dict[str, Any]]:
    """The rows, read as strict JSON: NaN and Infinity, which Python alone would read, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    with pytest.raises(ValueError, match="no JSON"):  # control: it does refuse
        json.loads('{"loss": NaN}', parse_constant=refuse)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# ---- metrics.jsonl -----------------------------------------------------------------------------------------


def test_rows_are_json(tmp_path: Path) -> None:
    metrics = Metrics(run_config(tmp_path))
    sizes = {"d_model": 36}
    metrics.write("start", {"step": 0, "sizes": sizes, "layout": "TP2/PP1/DP2"})
    metrics.write("step", STEP)
    assert told(tmp_path) == [  # on disk at once: a crash loses no row
        {"event": "start", "step": 0, "sizes": sizes, "layout": "TP2/PP1/DP2"},
        {"event": "step"} | STEP,
    ]
    metrics.close()


def test_what_another_program_raises_ends_no_run(tmp_path: Path) -> None:
    """Such as wandb, when its service has crashed. Our own rows are written; it is told like a full disk."""

    class HandleAbandonedError(Exception):
        pass

    def crashed(*_: object) -> None:
        raise HandleAbandonedError

    metrics = Metrics(run_config(tmp_path, tensorboard=True))
    metrics.wandb = SimpleNamespace(log=crashed, finish=crashed)
    metrics.write("step", STEP)
    assert isinstance(metrics.error, HandleAbandonedError)
    metrics.forget_lost()
    assert metrics.error is None
    metrics.close()
    assert isinstance(metrics.error, HandleAbandonedError)
    assert told(tmp_path) == [{"event": "step"} | STEP]
    assert losses_of(tmp_path / "tensorboard") == [(STEP["step"], pytest.approx(STEP["loss"]))]


def test_wandb_is_told_once_how_a_run_has_ended(tmp_path: Path) -> None:
    for ended_well, code in ((True, None), (False, 1)):
        codes: list[int | None] = []
        metrics = Metrics(run_config(tmp_path))
        metrics.wandb = SimpleNamespace(finish=codes.append)
        if ended_well:
            metrics.close()
        metrics.release()
        metrics.release()
        assert codes == [code]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_null(tmp_path: Path, loss: float) -> None:
    row = STEP | {"loss": loss}
    metrics = Metrics(run_config(tmp_path))
    metrics.write("step", row)
    metrics.close()
    assert told(tmp_path) == [{"event": "step"} | STEP | {"loss": None}]
    assert row["loss"] is loss  # the caller's row is its own


# ---- the lines people read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3599.7, "1:00:00"),
        (3661, "1:01:01"),
        (360000, "100:00:00"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_step_line(stage: Stage) -> None:
    assert describe(stage) == "d36 L3 H4 ff62 TP2/PP1/DP2"
    assert step_line(STEP, stage, None, 125) == (
        "step    30 | d36 L3 H4 ff62 TP2/PP1/DP2 | loss 3.1416 | lr 1.00e-02 | |g| 0.57 | "
        "12,346 tok/s (3,086/rank) | 38% done, 2:05 left"
    )


def test_a_step_line_without_a_pace_says_no_time(stage: Stage) -> None:
    known, unknown = (step_line(STEP, stage, None, seconds) for seconds in (125, None))
    assert known == f"{unknown}, 2:05 left"
    assert unknown.endswith("% done")


def test_time_is_told_from_the_second_step_of_a_start_or_a_growth_on() -> None:
    def left(*pace: tuple[float, float]) -> float | None:
        return seconds_left(deque(pace))

    assert left((0.0, 0.25)) is None
    assert left((0.0, 0.25), (10.0, 0.25)) is None  # a budget that has just been raised
    assert left((0.0, 0.25), (10.0, 0.5)) == 20.0
    assert left((0.0, 0.25), (0.01, 0.75)) == 1.0  # a step is to go: not none
    assert left((0.0, 1.0)) == 0.0


def test_step_line_with_a_known_peak_and_kappa(stage: Stage) -> None:
    line = step_line(STEP | {"mfu": 0.4567}, stage, view_at(progress=0.5), 3661)
    assert line.endswith(" | MFU 45.7% | κ ▕█████░░░|░▏ 50%/80% | 38% done, 1:01:01 left")


def view_at(progress: float) -> KappaView:
    """What the monitor shows once `progress` of the way from a loss of 4 to one of 2 is done."""
    monitor = KappaMonitor(KappaConfig(predictor="constant", constant=2.0))
    monitor.start_stage(StageSpan(0, 1000, 0.8))
    losses = [4.0] * 3 + [4.0 - 2.0 * progress] * 3  # medians of three count
    view = [monitor.observe(1000 * i, 1e6 * i, loss) for i, loss in enumerate(losses)][-1].view
    assert view is not None
    return view


# ---- TensorBoard and wandb ---------------------------------------------------------------------------------


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(run_config(tmp_path, tensorboard=True))
    metrics.write("step", STEP)
    metrics.write("step", STEP | {"step": 31, "loss": math.nan})
    metrics.write("eval", {"step": 31, "loss": 2.5, "reason": "kappa"})
    metrics.write("gains", GAINS)
    metrics.write("memory", MEMORY)
    metrics.write("sample", SAMPLE)
    metrics.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("step/loss")] == [(30, 3.14159)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(31, 2.5)]
    assert [e.step for e in events.Scalars("step/lr")] == [30, 31]
    for name, value in (("gains/s_qk/p0", 0.5), ("gains/s_qk/p100", 1.5), ("memory/max_bytes", 2.0**30)):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(31, value)]
    (text,) = events.Tensors("sample/0/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (31, [b"KING: what?"])
    assert not {"gains/s_qk/p50", "memory/of"} & set(events.Tags()["scalars"])
    assert not {"eval/reason", "step/mfu"} & set(events.Tags()["scalars"])


def test_tensorboard_tells_a_resumed_step_once(tmp_path: Path) -> None:
    """Killed after step 31, resumed at step 30: what came after is told anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, losses in ((None, {30: 3.0, 31: 2.5, 32: 2.25}), (30, {31: 2.0, 32: 1.5})):
        metrics = Metrics(run_config(tmp_path, tensorboard=True), resumed_at)
        for step, loss in losses.items():
            metrics.write("step", STEP | {"step": step, "loss": loss})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(30, 3.0), (31, 2.0), (32, 1.5)]
    assert [row["step"] for row in told(tmp_path)] == [30, 31, 32, 31, 32]


def test_tensorboard_tells_a_rolled_back_step_once(tmp_path: Path) -> None:
    """A return to a checkpoint inside of a run; a start is told by `resumed_at`."""
    metrics = Metrics(run_config(tmp_path, tensorboard=True))
    for step, loss in ((30, 3.0), (31, 2.5), (32, 9.0)):
        metrics.write("step", STEP | {"step": step, "loss": loss})
    metrics.write("resume", {"step": 30, "reason": "not finite"})
    for step, loss in ((31, 2.0), (32, 1.5)):
        metrics.write("step", STEP | {"step": step, "loss": loss})
    metrics.close()
    assert losses_of(tmp_path / "tensorboard") == [(30, 3.0), (31, 2.0), (32, 1.5)]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("step/loss")]


def test_a_start_from_nothing_sets_all_sinks_aside(tmp_path: Path) -> None:
    """Killed before its first checkpoint and started again, twice: no sink has two curves, and none is lost."""
    config = run_config(tmp_path, tensorboard=True)
    ids = []
    for start in (1.0, 2.0, 3.0):
        metrics = open_metrics(config, None)
        ids.append(metrics._wandb_id())  # as where wandb is asked for, which makes its folder
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb/of").write_text(str(start))
        metrics.write("step", STEP | {"step": 1, "loss": start})
        metrics.close()
    assert len(set(ids)) == 3
    for suffix, start in (("-1", 1.0), ("-2", 2.0), ("", 3.0)):
        assert losses_of(tmp_path / f"tensorboard{suffix}") == [(1, start)]
        (row,) = map(json.loads, (tmp_path / f"metrics{suffix}.jsonl").read_text().splitlines())
        assert row["loss"] == start
        assert (tmp_path / f"wandb{suffix}/of").read_text() == str(start)
        assert (tmp_path / f"wandb-id{suffix}").read_text() == ids[int(start) - 1]


def test_whatever_is_called_config_yaml_is_set_aside(tmp_path: Path) -> None:
    """A pipe is not waited for, and a file that is no UTF-8 is another; a link that leads nowhere is not followed."""
    config, path = run_config(tmp_path), tmp_path / "config.yaml"
    found: Any = SimpleNamespace(state=SimpleNamespace(progress=SimpleNamespace(step=30)))
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.write_bytes(b"# caf\xe9\n"),
        lambda: path.symlink_to(tmp_path / "elsewhere"),
        path.mkdir,
    ):
        make()
        for _ in range(2):
            open_metrics(config, found).close()
            text = path.read_text()
        path.unlink()
    assert sorted(path.name for path in tmp_path.glob("config-*")) == [f"config-{n}.yaml" for n in range(1, 5)]
    assert yaml.safe_load(text) == config.model_dump(mode="json")
    assert not (tmp_path / "elsewhere").exists()


def test_sinks_of_one_start_have_one_number(tmp_path: Path) -> None:
    """TensorBoard was not asked for at the first start."""
    for tensorboard in (False, True, True):
        open_metrics(run_config(tmp_path, tensorboard=tensorboard), None).close()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"metrics.jsonl", "metrics-1.jsonl", "metrics-2.jsonl", "tensorboard", "tensorboard-2"} <= names
    assert "tensorboard-1" not in names


def test_a_run_that_goes_on_keeps_its_sinks(tmp_path: Path) -> None:
    found: Any = SimpleNamespace(state=SimpleNamespace(progress=SimpleNamespace(step=30)))
    config = run_config(tmp_path, tensorboard=True)
    for where, losses in ((None, {30: 3.0, 31: 2.5}), (found, {31: 2.0})):
        metrics = open_metrics(config, where)
        identity = metrics._wandb_id()
        for step, loss in losses.items():
            metrics.write("step", STEP | {"step": step, "loss": loss})
        metrics.close()
    assert losses_of(tmp_path / "tensorboard") == [(30, 3.0), (31, 2.0)]
    assert (tmp_path / "wandb-id").read_text() == identity
    assert not list(tmp_path.glob("*-1*"))


def test_no_sink_is_opened_unasked(tmp_path: Path) -> None:
    Metrics(run_config(tmp_path)).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def with_wandb(tmp_path: Path, body: str) -> Path:
    """Run `body`, which has `metrics`, `STEP` and `run`; the run's directory.

    In a fork: wandb starts threads and a service, and later tests fork.
    """
    script = f"""
import json, sys
from pathlib import Path
from megabus.config import parse_config
from megabus.train.metrics import Metrics
config, STEP, MEMORY = parse_config(json.loads(sys.argv[1])), *map(json.loads, sys.argv[2:])
GAINS = dict(step=31, s_qk=dict(p0=0.5, p100=1.5))
run, metrics = Path(config.run_dir), Metrics(config)
{body}
metrics.close()
"""
    run = tmp_path / "run"
    run.mkdir()
    elsewhere = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # whatever should be sent would not arrive
    tree = run_config(run, wandb=True).model_dump_json()
    (tmp_path / "script.py").write_text(script)
    ended = run_python(
        [tmp_path / "script.py", tree, json.dumps(STEP), json.dumps(MEMORY)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | elsewhere | quiet | nowhere,
    )
    assert ended.returncode == 0, ended.stderr
    return run


def test_wandb_offline_stays_on_this_machine(tmp_path: Path) -> None:
    body = """
metrics.write("step", STEP)
metrics.write("eval", {"step": 30, "loss": 2.5})
metrics.write("gains", GAINS)
metrics.write("memory", MEMORY)
metrics.write("sample", dict(step=31, samples=[dict(prompt="KING: ", text="what?")], seconds=1.0))
metrics.write("step", STEP | {"step": 31})  # wandb keeps a step back till the next
assert metrics.wandb.summary["gains/s_qk/p100"] == 1.5, metrics.wandb.summary
assert metrics.wandb.summary["memory/max_bytes"] == 2**30
assert metrics.wandb.summary["sample/texts"]["nrows"] == 1
assert metrics.wandb.settings.mode == "offline"
assert metrics.wandb.summary["step/loss"] == 3.14159
assert metrics.wandb.summary["eval/loss"] == 2.5
assert metrics.wandb.id == (run / "wandb-id").read_text() == metrics._wandb_id()  # also of the next start
"""
    run = with_wandb(tmp_path, body)
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0
    assert len(told(run)) == 6


def test_wandb_hears_of_earlier_steps(tmp_path: Path) -> None:
    """A save ends some steps after the one that it is of, and a return to a checkpoint tells steps anew."""
    body = """
metrics.write("step", STEP)
metrics.write("step", STEP | {"step": 31})
metrics.write("save", {"step": 30, "bytes": 7})
metrics.write("step", STEP | {"step": 32})
metrics.write("resume", {"step": 30})
metrics.write("step", STEP | {"step": 31, "loss": 9.0})
metrics.write("step", STEP | {"step": 32, "loss": 8.0})
metrics.write("step", STEP | {"step": 33, "loss": 7.0})
assert metrics.wandb.summary["save/bytes"] == 7, metrics.wandb.summary
assert metrics.wandb.summary["step/loss"] in (8.0, 7.0), metrics.wandb.summary
"""
    with_wandb(tmp_path, body)
