"""Pictures and tables of runs: what they show is what the metrics say."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megabus.errors import UserError
from megabus.report.history import read_metrics
from megabus.report.plots import MOST_FLAGS, plot_loss, summary_table
from tests.support.command import run_command

ROOT = Path(__file__).parents[2]
SMALL = {"d_model": 96, "n_layers": 4, "n_heads": 3, "n_kv_heads": 3, "d_ff": 384, "n_params": 2_160_000}
LARGE = {"d_model": 144, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4, "d_ff": 576, "n_params": 4_350_000}


def at(step):
    return {"step": step, "tokens": 1000 * step, "flops": 2e9 * step}


def step_row(step, loss):
    return {"event": "step", **at(step), "loss": loss, "tokens_per_s": 1000.0, "stage": 0}


def eval_row(step, loss):
    return {"event": "eval", **at(step), "loss": loss, "stage": 0, "kappa_progress": 0.5}


def growth_row(step, stage, old=SMALL, new=LARGE, reason="kappa"):
    return {
        "event": "growth",
        **at(step),
        "from_stage": stage,
        "to_stage": stage + 1,
        "old": old,
        "new": new,
        "old_layout": "TP1/PP1/DP4",
        "new_layout": "TP2/PP1/DP2",
        "loss_before": 4.0,
        "loss_after": 4.00004,
        "reason": reason,
        "stall_s": 2.5,
    }


def run_with(tmp_path, rows, name="run"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def grown_run(tmp_path, name="run", growths=(40,), steps=100):
    rows = []
    for step in range(1, steps + 1):
        rows.append(step_row(step, 3 + 5 / step))
        if step % 10 == 0:
            rows.append(eval_row(step, 3.1 + 5 / step))
        if step in growths:
            rows.append(growth_row(step, growths.index(step)))
    return run_with(tmp_path, rows, name)


def drawn(monkeypatch, *args, **kwargs):
    """The figure that `plot_loss` would save."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    plot_loss(*args, **kwargs)
    return figures[0]


def phase_row(step, **samples):
    names = ("weights", "seq_len", "micro_batch_size", "global_batch_size")
    samples = dict(zip(names, ([1, 1], 32, 4, 8), strict=True)) | samples
    return {"event": "phase", **at(step), "share": step / 100, "changed": [*samples][:2]} | samples


def test_phases_are_marked_as_on_the_page(tmp_path, monkeypatch):
    """With their letters, on every axis; a phase that a resume took back is not."""
    folder = grown_run(tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows += [phase_row(25, weights=[2, 1]), phase_row(60, seq_len=64)]
    rows.sort(key=lambda row: row["step"])
    folder = run_with(tmp_path, [*rows, phase_row(110), {"event": "resume", **at(100)}], "phases")
    for x, scale in (("tokens", 1000), ("flops", 2e9), ("time", 1 / 3600)):
        axes = drawn(monkeypatch, [folder], tmp_path / "out.png", x).axes[0]
        flags = {text.get_text(): text.xy[0] for text in axes.texts}
        del flags["d 96→144, L 4→6 (κ)"]
        assert [*flags] == ["b: weights 1:1, length 64", "a: weights 2:1, length 32"]
        places = [60, 25] if x != "time" else [60 + 2.5, 25]
        assert [*flags.values()] == pytest.approx([place * scale for place in places]), x
    bad = run_with(tmp_path, [*rows, phase_row(90, seq_len="long")], "bad")
    with pytest.raises(UserError, match=r"^metrics: seq_len = long: of the phase row of step 90 is no number"):
        plot_loss([bad], tmp_path / "out.png")


# ---- reading


def test_a_line_being_written_is_left_out(tmp_path):
    folder = run_with(tmp_path, [step_row(1, 5.0), {"event": "checkpoint", "step": 1}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert read_metrics(folder) == [step_row(1, 5.0)]


def test_a_resumed_run_counts_once(tmp_path):
    """Crash after 30, checkpoint at 15: the rows from 20 on are told again, a growth among them."""
    first = [step_row(10, 5.0), step_row(20, 4.0), eval_row(20, 4.1), growth_row(20, 0), step_row(30, 3.0)]
    again = [step_row(20, 4.5), eval_row(20, 4.6), growth_row(20, 0), step_row(30, 3.5)]
    resume = {"event": "resume", **at(15)}
    assert read_metrics(run_with(tmp_path, [*first, resume, *again])) == [first[0], *again]
    assert read_metrics(run_with(tmp_path, [*first[:4], resume, *again], "at_once")) == [first[0], *again]
    twice = [*first, resume, *again, resume, *again]
    assert read_metrics(run_with(tmp_path, twice, "twice")) == [first[0], *again]


def test_a_resume_keeps_the_step_it_starts_from(tmp_path):
    """All rows of the checkpoint's own step were told before it was written: none is told again."""
    rows = [step_row(20, 4.0), eval_row(20, 4.1), growth_row(20, 0), eval_row(20, 4.1), step_row(30, 3.0)]
    resume = {"event": "resume", **at(20)}
    assert read_metrics(run_with(tmp_path, [*rows, resume])) == rows[:4]
    assert read_metrics(run_with(tmp_path, rows, "control")) == rows


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="is empty"):
        read_metrics(run_with(tmp_path, []))
    for number, line in enumerate(("{", "[]", '{"loss": 3}')):
        folder = run_with(tmp_path, [step_row(1, 5.0)], f"bad{number}")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError, match="line 2"):
            read_metrics(folder)


WRONG_ROWS = {
    "step": (step_row(1, 5.0) | {"step": True}, "line 1 is no metrics row"),
    "huge": (step_row(1, 5.0) | {"step": 10**400}, "line 1 is no metrics row"),
    "tokens": (step_row(1, 5.0) | {"tokens": None}, "metrics: tokens = None: of the step row of step 1 is no number"),
    "flops": (eval_row(1, 5.0) | {"flops": math.inf}, "metrics: flops = inf: of the eval row of step 1 is no number"),
    "loss": (eval_row(1, 5.0) | {"loss": "low"}, "metrics: loss = low: of the eval row of step 1 is no number"),
    "huge loss": (step_row(1, 5.0) | {"loss": 10**30}, "of the step row of step 1 is no number"),
    "speed": (step_row(1, 5.0) | {"tokens_per_s": [1]}, "metrics: tokens_per_s = [1]: of the step row"),
    "stall": (growth_row(1, 0) | {"stall_s": None}, "metrics: stall_s = None: of the growth row of step 1"),
    "size": (growth_row(1, 0) | {"new": {"d_model": True}}, "metrics: d_model = True: of the growth row of step 1"),
    "sizes": (growth_row(1, 0) | {"old": [1]}, "metrics: old = [1]: of the growth row of step 1 is no section"),
    "stage": ({"event": "resume", **at(1), "stage": [1]}, "metrics: stage = [1]: of the resume row of step 1 is no"),
    "layout": ({"event": "start", **at(0), "layout": 5}, "metrics: layout = 5: of the start row of step 0 is no text"),
}


@pytest.mark.parametrize("which", WRONG_ROWS)
def test_values_that_no_run_writes_are_named(tmp_path, which):
    """In rows of runs of others, for whatever reads them: the picture, the table, a plan beside what happened."""
    row, told = WRONG_ROWS[which]
    folder = run_with(tmp_path, [step_row(0, 5.0), row][::-1])
    for read in (read_metrics, summary_table):
        with pytest.raises(UserError, match=re.escape(told)):
            read(folder)
    with pytest.raises(UserError, match=re.escape(told)):
        plot_loss([folder], tmp_path / "loss.png")


# ---- the table


def test_summary_table(tmp_path):
    header, rule, first, second = summary_table(grown_run(tmp_path)).splitlines()
    assert set(rule) == {"─", " "}
    assert first.split()[0] == "0"
    for cell in ("d96 L4 H3 KV3 ff384", "2.16M", "TP1/PP1/DP4", "40K", "8.00e+10", "3.6000 → 3.2250"):
        assert cell in first
    for cell in (" κ ", "4.0000 → 4.0000", "2.5 s"):
        assert cell in first
    for cell in ("d144 L6 H4 KV4 ff576", "TP2/PP1/DP2", "60K", "1.20e+11", "3.2000 → 3.1500"):
        assert cell in second
    places = [line.index(cell) for line, cell in ((header, "layout"), (first, "TP1"), (second, "TP2"))]
    assert len(set(places)) == 1


def test_summary_table_of_a_run_that_has_not_grown(tmp_path):
    rows = [step_row(1, 5.0), step_row(2, float("nan"))]
    start = {"event": "start", **at(0), "stage": 0, "sizes": SMALL, "layout": "TP1/PP2/DP1"}
    assert "–" in summary_table(run_with(tmp_path, rows)).splitlines()[-1]
    told = summary_table(run_with(tmp_path, [start, *rows], "told")).splitlines()[-1]
    assert "d96 L4" in told
    assert "TP1/PP2/DP1" in told


def test_a_log_that_begins_with_a_resume_says_so(tmp_path):
    """As of a checkpoint that was copied alone: its stage and sizes are known, and what came before is not."""
    resume = at(40) | {"event": "resume", "reason": "start", "stage": 2, "sizes": LARGE, "layout": "TP1/PP1/DP1"}
    run = run_with(tmp_path, [resume, step_row(50, 3.0), eval_row(50, 3.1)])
    stage, *told = summary_table(run).splitlines()[2:]
    assert stage.split()[:1] == ["2"]
    assert f"d{LARGE['d_model']} " in stage
    assert stage.split()[stage.split().index("TP1/PP1/DP1") + 1] == "10"  # steps
    assert told == ["not in this log: the first 40 step(s) and 2 growths, which came before the run was resumed here"]
    whole = run_with(tmp_path, [at(0) | {"event": "start"}, step_row(10, 3.0), resume, step_row(50, 3.0)], "whole")
    assert "not in this log" not in summary_table(whole)


@pytest.mark.parametrize("key", ["tokens", "flops", "sizes"])
def test_a_first_resume_of_odd_values_is_named(tmp_path, key):
    rows = [at(40) | {"event": "resume", key: "x"}, step_row(50, 3.0)]
    with pytest.raises(UserError, match=f"metrics: {key} = x: of the resume row of step 40 is no "):
        summary_table(run_with(tmp_path, rows))


# ---- the picture


@pytest.mark.parametrize("x", ["flops", "tokens", "time"])
@pytest.mark.parametrize("log_x", [False, True])
def test_growth_labels_never_overlap(tmp_path, monkeypatch, x, log_x):
    runs = [grown_run(tmp_path, "a", (5, 6, 20, 60, 99)), grown_run(tmp_path, "b", (6, 70))]
    figure = drawn(monkeypatch, runs, "unused.png", x, log_x)
    axes = figure.axes[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts].count("d 96→144, L 4→6 (κ)") == 7
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    flat = [box.translated(0, -box.y0) for box in boxes]
    assert any(a.overlaps(b) for a, b in itertools.combinations(flat, 2))  # control: in one row they would
    assert all(box.y0 >= axes.bbox.y1 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_growths_without_number_have_lines_but_no_labels(tmp_path, monkeypatch):
    for n, labels in ((MOST_FLAGS, MOST_FLAGS), (MOST_FLAGS + 1, 0)):
        axes = drawn(monkeypatch, [grown_run(tmp_path, f"run{n}", tuple(range(1, n + 1)))], "unused.png").axes[0]
        assert len(axes.lines) == 2 + n
        assert len(axes.texts) == labels


def test_curves_are_the_metrics(tmp_path, monkeypatch):
    rows = [step_row(1, float("nan")), step_row(2, 5.0), eval_row(2, 5.1), growth_row(2, 0), eval_row(4, 4.0)]
    figure = drawn(monkeypatch, [run_with(tmp_path, rows)], "unused.png", "tokens")
    train, valid, growth = figure.axes[0].lines
    assert train.get_xydata().tolist() == [[2000, 5.0]]
    assert valid.get_xydata().tolist() == [[2000, 5.1], [4000, 4.0]]
    assert set(growth.get_xdata()) == {2000}


def test_time_counts_speed_and_stalls(tmp_path, monkeypatch):
    rows = [step_row(3600, 5.0), growth_row(3600, 0), step_row(7200, 4.0)]  # 1000 tokens a step, and a second
    figure = drawn(monkeypatch, [run_with(tmp_path, rows)], "unused.png", "time")
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([1.0, 2.0 + 2.5 / 3600])


def test_command_line(tmp_path):
    run, out = grown_run(tmp_path), tmp_path / "loss.png"
    command = ["plot", "--out", out, "--x", "tokens", "--log-x"]
    done = run_command(*command, run)
    assert done.returncode == 0, done.stderr
    assert "d96 L4" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    failed = run_command(*command, tmp_path)
    assert failed.returncode != 0
    assert failed.stderr.startswith("error: run_dir = ")


def test_training_needs_no_matplotlib():
    probe = "import sys, megabus.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], env={"PYTHONPATH": str(ROOT)}).returncode == 0
