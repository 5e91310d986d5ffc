"""The report of runs: every run that can be is shown, nothing from a file becomes markup, and nothing is fetched."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megabus.errors import UserError
from megabus.report import pictures
from megabus.report.curves import PANELS, POINTS, Tracks, drawn, moving_average
from megabus.report.figure import picture
from megabus.report.history import read_metrics, skipped_spikes, skips
from megabus.report.looks import evaluation_table, sample_table, time_table
from megabus.report.page import gather, names_of, render, write_report
from megabus.report.phases import letters
from megabus.report.pictures import draw_panel, limits, view_of
from megabus.report.plots import _draw_run, _dress, span, stage_table, summary_table
from megabus.report.run_facts import GROWTH_WORDS, MOST_ROWS, faults, final_figures, read_run
from megabus.table import clock
from tests.support.command import Done, run_command
from tests.support.html_page import Page
from tests.support.report_runs import eval_rows, growth_row, looks, rows, start_row, step_row, totals, write_run

ROOT = Path(__file__).parents[2]
NASTY = "</script><script>alert(1)</script><b onclick=alert(2)>\"'&{{ 7919 * 7907 }}"


@pytest.fixture
def two_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages offer two of the six: drawing them is most of the time that these tests take."""
    monkeypatch.setattr(pictures, "VIEWS", [("tokens", False), ("time", True)])


def page_of(*folders: Path) -> Page:
    page = Page(render(gather(folders)))
    assert not page.problems
    return page


@pytest.mark.parametrize(
    "html",
    [
        "<p><b></p></b>",
        "<div>",
        '<img src="https://x.org/a.png">',
        '<link href="/a.css">',
        "<style>a { background: url(b.png) }</style>",
        '<i id="a"></i><i id="a"></i>',
        "<b onclick=alert(1)></b>",
        '<div role="img"></div>',
    ],
)
def test_control_the_parser_finds_what_is_wrong(html):
    assert Page(html).problems


# ---- every run that there can be ---------------------------------------------------------------------------


def rolled_back():
    yield from itertools.takewhile(lambda row: row["step"] <= 50, rows(100, growths=(40,)))
    yield {"event": "save", "step": 40, "stall_s": 0.1, "write_s": 1.0, "bytes": 7, "error": "No space left"}
    yield {"event": "skip", **totals(51), "loss": None, "grad_norm": None}
    back = {"reason": "not finite", "changes": [], "layout": "TP1/PP1/DP4", "saved_layout": "TP2/PP1/DP2"}
    yield {"event": "resume", **totals(30)} | back
    yield from (step_row(step) for step in range(31, 60))
    yield {"event": "resume", **totals(55)} | back | {"reason": "start", "changes": ["eval.every: 1 -> 2"]}
    yield from (step_row(step) for step in range(56, 70))


RUNS = {
    "grown": lambda: rows(100, growths=(30, 60)),
    "never grew": lambda: rows(30),
    "null losses": lambda: (row | {"loss": None} if row["event"] in ("step", "eval") else row for row in rows(30)),
    "every other null": lambda: (
        row | ({"loss": None, "grad_norm": None} if row["step"] % 2 else {}) for row in rows(30)
    ),
    "only begun": lambda: [start_row()],
    "one step": lambda: [start_row(), step_row(1)],
    "not a number": lambda: [start_row(), *(step_row(n, loss=math.nan, unit_error=0.0) for n in (1, 2))],
    "rolled back": rolled_back,
    "without gains": lambda: (row for row in rows(30, growths=(10,)) if row["event"] in ("step", "eval", "growth")),
    "a thousand growths": lambda: rows(1100, 50, range(20, 1020)),
    "long": lambda: rows(5000, 20),
}


@pytest.mark.usefixtures("two_views")
@pytest.mark.parametrize("kind", RUNS)
def test_every_run_is_shown(tmp_path, kind):
    told = list(RUNS[kind]())
    page = page_of(write_run(tmp_path / "run", told, cut='{"event": "step", "st'))
    data = json.loads(page.data)
    (run,) = data["runs"]
    for panel in data["panels"]:  # as long as its places, and short
        for line, curve in zip(panel["lines"], run["curves"][panel["key"]], strict=True):
            for values in (curve or {}).values():
                assert [len(values)] * 3 == [len(run["places"][line["event"]][x]) for x in ("tokens", "flops", "time")]
                assert len(values) <= POINTS
    assert page.count("figure") == len(data["panels"])
    assert len(run["growths"]) == {"grown": 2, "without gains": 1, "a thousand growths": 1000}.get(kind, 0)
    shown = {panel["key"] for panel in data["panels"]}
    if kind == "only begun":
        assert not shown
        assert "No step has been logged yet" in page.words
    if kind == "grown":
        assert shown == {panel.key for panel in PANELS if panel.key != "mfu"} | {
            "gain:s_qk",
            "gain:alpha_attn",
            "gain:output.s_z",
        }
        assert "Model FLOPs utilisation (MFU) (the device's peak is not known: set log.peak_tflops)" in page.words
        assert "d48 L2 H4 KV4 ff96 → d52 L2 H4 KV4 ff96" in page.words
        assert "data schedule" not in page.words
    if kind == "a thousand growths":
        assert f"{1000 - MOST_ROWS} more in metrics.jsonl" in page.words
        assert len(page.data) < 600_000
    if kind == "long":
        assert len(page.data) < 400_000


@pytest.mark.usefixtures("two_views")
def test_runs_beside_each_other(tmp_path):
    one = write_run(tmp_path / "one", rows(60, growths=(20,)))
    two = write_run(tmp_path / "x/two", rows(40), {"model": {"d_model": 64, "kind": "ngpt"}})
    old = write_run(tmp_path / "y/two", [step_row(1), step_row(2)], "none")
    page = page_of(one, two, old)
    assert [run["name"] for run in json.loads(page.data)["runs"]] == [f"{tmp_path.name}/one", "x/two", "y/two"]
    differing = [key for key, _, differ in _config(one, two) if differ]
    assert sorted(differing) == ["model.d_model", "run_dir"]
    assert page.words.count("model.d_model ≠ 48 64 –") == 2  # among those that differ, and among all
    assert "model.kind ngpt ngpt –" not in page.words
    assert "It has not grown." in page.words


def _config(*folders):
    from megabus.report.page import _beside

    return _beside([read_run(folder, "run").config for folder in folders])


def test_names():
    assert names_of(["/a/runs/x", "/b/runs/y"]) == ["x", "y"]
    assert names_of(["/a/runs/x", "/b/runs/x"]) == ["a/runs/x", "b/runs/x"]
    with pytest.raises(UserError, match="is given twice"):
        names_of(["/a/x", "/a/../a/x"])


def test_names_from_files_are_no_formulas(tmp_path):
    """Nor hidden; and a text is shown that UTF-8 cannot write."""
    told = [row | {"reason": "$\\bad{$"} if row["event"] == "growth" else row for row in rows(20, growths=(10,))]
    at = next(number for number, row in enumerate(told) if row["step"] == 10)
    samples = [{"prompt": "\ud800", "text": "\x00\x1b[31m"}]
    told.insert(at, {"event": "sample", **totals(10), "samples": samples, "seconds": 1.0})
    odd = write_run(tmp_path / "_costs $\\bad{$", told)
    page = write_report([odd, write_run(tmp_path / "_$^$", rows(20))], tmp_path / "out")
    assert not Page(page.read_text(encoding="utf-8")).problems
    with picture(tmp_path / "loss.png", (4, 3)) as figure:
        curve, label = _draw_run(figure.add_subplot(), read_metrics(odd), odd.name, ("k", "k"), "tokens", False)
        _dress(figure.axes[0], [], {curve: label}, "tokens", False)
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [label]


@pytest.mark.usefixtures("two_views")
def test_nothing_from_a_file_becomes_markup(tmp_path):
    told = [start_row() | {"layout": NASTY}, step_row(1), growth_row(1, 0) | {"reason": NASTY, "old_layout": NASTY}]
    told += [{"event": "save", "step": 1, "error": NASTY}, *eval_rows(1)]
    told += [row | {"samples": [{"prompt": NASTY, "text": NASTY}]} for row in list(looks(1, 0, "end"))[:1]]
    told += [{"event": "tasks", **totals(1), "when": "end", "scores": {NASTY: 1.0}}]
    told[0]["environment"] = {"hosts": [NASTY], NASTY: NASTY}
    next(row for row in told if row["event"] == "gains")[NASTY] = {
        "p0": 0.0,
        "p5": 0.1,
        "p50": 1,
        "p95": 2,
        "p100": 3,
    }  # a kind of gain
    folder = write_run(tmp_path / "run <b>&\"' ", told, {NASTY: NASTY})
    page = page_of(folder)
    plain = page_of(write_run(tmp_path / "plain", [start_row(), *told[1:2], growth_row(1, 0), *eval_rows(1)]))
    assert page.count("script") == plain.count("script") == 2
    assert page.words.count(NASTY) >= 5
    assert "62615533" not in page.words  # not computed
    assert json.loads(page.data)["runs"][0]["name"] == folder.name


# ---- the numbers -------------------------------------------------------------------------------------------


def test_thinning_keeps_means_and_extremes(tmp_path):
    told = [step_row(step, steps=10_007) for step in range(1, 10_008)]
    told[5000]["unit_error"] = 9e-3
    told[7000]["loss"] = None
    panels = {panel.key: i for i, panel in enumerate(PANELS)}
    found = drawn(Tracks(told, "test"), PANELS)
    (unit,), (speed,) = (found.curves[panels[key]] for key in ("unit", "speed"))
    assert len(unit["y"]) == POINTS
    assert max(unit["y"]) == 9e-3
    assert np.mean(speed["y"]) == pytest.approx(np.mean([row["tokens_per_s"] for row in told]), rel=1e-3)
    spread, smooth, valid = found.curves[panels["loss"]]
    assert valid is None
    losses = [row["loss"] for row in told if row["loss"] is not None]
    assert (min(spread["low"]), max(spread["high"])) == pytest.approx((min(losses), max(losses)), rel=1e-5)
    assert found.places["step"]["tokens"][-1] == pytest.approx(told[-1]["tokens"], rel=1e-5)
    assert None not in smooth["y"]


def test_moving_average():
    y = np.array([1.0, np.nan, 3.0, 8.0, np.nan, np.nan, np.nan, 2.0])
    assert moving_average(y, 1).tolist()[:4] == [1.0, 2.0, 5.5, 5.5]
    assert math.isnan(moving_average(y, 1)[5])
    assert moving_average(y, 100).tolist() == [3.5] * 8


def test_running_means_have_a_panel(tmp_path):
    """With a line for every decay that any run has logged; without means there is none."""

    def run(name, *decays):
        means = {"ema": dict.fromkeys(decays, 3.0)} if decays else {}
        return write_run(tmp_path / name, (row | means if row["event"] == "eval" else row for row in rows(30)))

    report = gather([run("one", "0.9", "0.99"), run("other", "0.999"), run("none")])
    (panel,) = (panel for panel in report.panels if panel.key == "ema")
    assert [line.key for line in panel.lines] == ["loss", "ema|0.9", "ema|0.99", "ema|0.999"]
    at = report.panels.index(panel)
    drawn_lines = [[curve is not None for curve in run.drawn.curves[at]] for run in report.curves]
    assert drawn_lines == [[True, True, True, False], [True, False, False, True], [True, False, False, False]]
    assert "ema" not in {panel.key for panel in gather([tmp_path / "none"]).panels}


def test_faults_are_all_told(tmp_path):
    run = read_run(write_run(tmp_path / "run", rolled_back()), "run")
    assert [(fault["row"]["step"], fault["what"]) for fault in faults(run)] == [
        (40, "failed save"),
        (51, "skipped step"),
        (30, "rollback"),
        (55, "resume"),
    ]
    assert [fault["details"] for fault in faults(run)] == [
        "No space left",
        "no update: loss –, gradient norm –",
        "to step 30, from step 51, past the data that failed",
        "to step 55, from step 59 (4 steps not saved); TP2/PP1/DP2 → TP1/PP1/DP4; eval.every: 1 -> 2",
    ]
    assert run.growths == []  # the growth at step 40 was taken back
    figures = final_figures(run)
    assert (figures["steps"], figures["state"], figures["faults"]) == ("69", "69% of its budget", "4")


def test_a_skipped_step_counts_once():
    """A start does it again; a return to a checkpoint passes over its data, and so it happened."""

    def skip(step):
        return {"event": "skip", **totals(step), "loss": 9.0, "grad_norm": 2.0, "reason": "spike"}

    def back(step, reason):
        return {"event": "resume", **totals(step), "reason": reason, "changes": []}

    killed = [start_row(), *map(step_row, range(1, 6)), skip(6), back(5, "start"), skip(6), step_row(7)]
    assert skipped_spikes(killed) == 1
    assert skipped_spikes([start_row(), skip(1), back(0, "start"), skip(1)]) == 1
    returned = [start_row(), *map(step_row, range(1, 6)), skip(6), skip(7), back(5, "spike"), *map(step_row, (6, 7))]
    assert skipped_spikes(returned) == 2
    assert skipped_spikes([*returned, skip(8), back(7, "start"), skip(8)]) == 3
    assert skipped_spikes([*returned, back(5, "start"), skip(6), skip(7), back(5, "spike"), step_row(6)]) == 2
    assert [row["step"] for row in skips(killed)] == [6]


@pytest.mark.parametrize("budget", ["the same", "raised"])
def test_a_start_that_loses_nothing_is_no_fault(tmp_path, budget):
    """The command of a run that had ended, given again; with a larger budget it trains on. A kill is one."""
    again = {
        "event": "resume",
        **totals(100),
        "reason": "start",
        "layout": "TP2/PP1/DP2",
        "saved_layout": "TP2/PP1/DP2",
    }
    more = [step_row(step, steps=130) for step in range(101, 131)] if budget == "raised" else []
    again |= {"changes": ["train.max_steps: 100 -> 130"] if more else []}
    run = read_run(write_run(tmp_path / "run", [*rows(100), again, *more]), "run")
    assert [(fault["what"], fault["is_fault"]) for fault in faults(run)] == [("resume", False)]
    figures = final_figures(run)
    assert (figures["state"], figures["faults"]) == ("finished", "0")
    assert gather([run.folder]).curves[0].faults == []
    told = [*rows(100), again, *more, {**again, **totals(90)}, *(step_row(step) for step in range(91, 101))]
    killed = read_run(write_run(tmp_path / "killed", told), "killed")
    assert [fault["is_fault"] for fault in faults(killed)] == [False, True]
    assert final_figures(killed)["faults"] == "1"
    assert len(gather([killed.folder]).curves[0].faults) == 1


def test_layouts_of_stages_are_those_that_ran(tmp_path):
    """A run is started again under other layouts, before and after it has grown; nothing ran under one of them."""

    def again(step, layout, stage):
        facts = {"reason": "start", "changes": [], "layout": layout, "saved_layout": "TP1/PP1/DP1"}
        return {"event": "resume", **totals(step, stage)} | facts

    told = [
        *itertools.takewhile(lambda row: row["step"] <= 30, rows(100, growths=(30,))),
        again(20, "TP4/PP1/DP1", 0),  # takes back the growth, and trains nothing
        again(20, "TP1/PP4/DP1", 0),
        *(step_row(step) for step in range(21, 31)),
        growth_row(30, 0) | {"old_layout": "TP1/PP4/DP1"},  # to TP1/PP1/DP4
        step_row(31, 1),
        again(31, "TP1/PP2/DP2", 1),
        step_row(32, 1),
    ]
    run = read_run(write_run(tmp_path / "run", told), "run")
    header, *lines = stage_table(run.curve_rows, run.layouts)
    assert [line[header.index("layout")] for line in lines] == ["TP2/PP1/DP2, TP1/PP4/DP1", "TP1/PP1/DP4, TP1/PP2/DP2"]
    table = summary_table(run.folder)
    assert all(line[header.index("layout")] in table for line in lines)
    only = read_run(write_run(tmp_path / "begun", [start_row()]), "begun")
    assert stage_table(only.curve_rows, only.layouts)[1][3] == "TP2/PP1/DP2"


@pytest.mark.usefixtures("two_views")
def test_final_figures(tmp_path):
    figures = final_figures(read_run(write_run(tmp_path / "run", rows(100, growths=(30, 60))), "run"))
    assert figures["state"] == "finished"
    assert figures["last sizes"] == "d56 L2 H4 KV4 ff96"
    assert (figures["growths"], figures["stall of growths"], figures["sent by growths"]) == ("2", "1.0 s", "6 MiB")
    assert figures["validation loss, last"] == f"{3.1 + 4 / 11:.4f}" == figures["validation loss, best"]
    assert figures["peak memory of a rank"] == "512 MiB"
    assert figures["largest error of a unit row"] == "5.0e-07"
    assert figures["MFU, mean"] == "–"  # which the page leaves out
    assert "MFU, mean" not in page_of(tmp_path / "run").text


def test_first_points_are_cut_off_only_of_many():
    """At most a hundredth and a half of all, and where these take most of the height."""
    for n, least in ((11, 9.0), (66, 9.0), (67, 2.0), (1000, 2.0)):
        values = [9.0, *np.linspace(2.0, 1.0, n - 1).tolist()]
        low, high = span(values, log=False, clipped=True)
        assert low < 1.0
        assert least < high < least + 0.5
    assert span([2.9, *np.linspace(2.0, 1.0, 999).tolist()], log=False, clipped=True)[1] > 2.9


def test_what_kappa_predicts_is_not_flattened_by_what_was_before():
    """A loss that falls from 9 to 3.2 before the first prediction: the axis ends not far above what came with it."""
    loss = [9.0, 6.0, 4.0, 3.2, 3.1, 3.0]
    said = [None, None, None, 3.15, 3.05, 2.9]
    target = next(panel for panel in PANELS if panel.key == "target")
    low, high = limits(target, [[{"y": loss}, {"y": said}, None]])
    assert 2.7 < low < 2.9
    assert 3.2 < high < 3.6
    assert limits(target, [[{"y": loss}, None, None]])[1] > 8  # nothing is predicted: all that was measured


def looked_at():
    told = list(rows(100, growths=(30,)))
    at = next(number for number, row in enumerate(told) if row["event"] == "growth")
    before, after = [*looks(10, 0, "step"), *looks(30, 0, "before growth")], looks(30, 1, "after growth")
    return [*told[:at], *before, told[at], *after, *told[at + 1 :], *looks(100, 1, "end")]


@pytest.mark.usefixtures("two_views")
def test_samples_and_evaluations_lie_along_the_curve(tmp_path):
    folder = write_run(tmp_path / "run", looked_at())
    page, run = page_of(folder), read_run(folder, "run")
    header, measures = evaluation_table(run)
    assert header == ["measure", "step 30, before growth", "step 30, after growth", "step 100, end"]
    assert measures == [
        ["code: nats per token", "2.7000", "2.7000", "2.0000"],
        ["code: bits per byte", "1.3500", "1.3500", "1.0000"],
        ["lines/acc", "0.2800", "0.2800", "0.3500"],
    ]
    assert "code: nats per token 2.7000 2.7000 2.0000" in page.words
    assert [row["step"] for row in sample_table(run)] == ["10", "30", "30", "100"]
    assert [row["tokens"] for row in sample_table(run)] == ["20.5K", "61.4K", "61.4K", "205K"]
    assert "100 205K KING: After 100 steps." in page.words
    data = json.loads(page.data)
    curves, places = data["runs"][0]["curves"], data["runs"][0]["places"]
    assert curves["extra:code"] == [{"y": [2.9, 2.7, 2.7, 2.0]}]
    assert curves["task:lines/acc"] == [{"y": [0.26, 0.28, 0.28, 0.35]}]
    assert places["evaluation"]["tokens"] == [20480, 61440, 61440, 204800]
    assert final_figures(run)["profile"] == "–"
    row = {"event": "profile", **totals(40, 1), "first": 38, "last": 40, "folder": "runs/a/profile", "shares": {}}
    profiled = read_run(write_run(tmp_path / "profiled", [*looked_at(), row]), "profiled")
    assert final_figures(profiled)["profile"] == "steps 38 to 40: runs/a/profile"
    times = time_table(run)
    assert list(times) == ["steps", "growths", "samples", "evaluations of token files", "weights written for tasks"]
    assert times["samples"].startswith("0:08 (")
    steps = sum(2048 / step_row(step)["tokens_per_s"] for step in range(1, 101))
    assert times["steps"] == f"{clock(steps)} ({steps / (steps + 0.5 + 8 + 6 + 2):.1%})"
    assert "samples 0:08 (" in page.words
    assert "Samples and evaluations" not in page_of(write_run(tmp_path / "plain", rows(30))).words
    assert list(time_table(read_run(tmp_path / "plain", "plain"))) == ["steps"]


def phase_row(step, stage, weights, changed=("weights",), **sizes):
    samples = {"weights": weights, "seq_len": 64, "micro_batch_size": 2, "global_batch_size": 8} | sizes
    return (
        {"event": "phase", **totals(step, stage), "share": step / 100, "position": 0} | samples | {"changed": changed}
    )


def test_phases_are_marked_and_listed(tmp_path):
    """One begins with the growth, one is of a run that was resumed and says not what was before."""
    told = list(rows(100, growths=(30,)))
    for step, row in (
        (60, phase_row(60, 1, [0.0, 1.0], None, seq_len=128)),
        (30, phase_row(30, 1, [1.0, 2.5])),
    ):
        at = max(number for number, other in enumerate(told) if other["step"] == step) + 1
        told.insert(at, row)
    page = page_of(write_run(tmp_path / "run", told))
    marks = [
        {"tokens": 61440.0, "name": "a", "text": "weights 1:2.5"},
        {"tokens": 122880.0, "name": "b", "text": "weights 0:1, length 128, micro batch 2, batch 8"},
    ]
    phases = json.loads(page.data)["runs"][0]["phases"]
    assert [{key: phase[key] for key in marks[0]} for phase in phases] == marks
    assert all(0 < phase["time"] < 1 and phase["flops"] > 0 for phase in phases)
    assert "a 30 61.4K 30.0% 1:2.5 64 2 8 b 60 123K 60.0% 0:1 128 2 8" in page.words
    assert "dotted ones are phases" in page.words
    assert page.text.count("b: weights 0:1, length 128, micro batch 2, batch 8") == 1  # where there is room
    assert [letters(number) for number in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]


def test_in_a_crowd_growths_keep_their_labels(tmp_path):
    """Of phases, and of another run's growth close by."""
    told = list(rows(1000, growths=(500, 502)))
    for step in (500, 501, 502):
        at = max(number for number, row in enumerate(told) if row["step"] == step) + 1
        told.insert(at, phase_row(step, 1, [1.0, 1.0]))
    other = write_run(tmp_path / "other", rows(1000, growths=(510,)))
    report = gather([write_run(tmp_path / "run", told), other])
    curves, view = [run.drawn.curves[0] for run in report.curves], view_of(report.curves, "tokens")
    with picture(tmp_path / "loss.png", (14, 4)) as figure:
        axes = figure.add_subplot()
        draw_panel(axes, report.panels[0], report.curves, curves, view)
        shown = [text.get_text() for text in sorted(axes.texts, key=lambda text: text.xy[0])]
    names = [text.partition(":")[0] for text in shown]
    assert [name for name in names if name.isdigit()] == ["1", "2", "1"]
    assert len(names) < 6  # control: it is one


def test_scores_lie_at_the_step_that_they_are_of(tmp_path):
    """On every axis, whenever they came, and nothing else moves."""
    told = list(rows(100, growths=(30,)))
    first, second = ([row for row in looks(step, 0, "step") if row["event"] == "tasks"] for step in (20, 10))
    run = read_run(write_run(tmp_path / "run", [*told[:-9], *first, *told[-9:], *second]), "run")
    plain = read_run(write_run(tmp_path / "plain", told), "plain")
    for x in ("tokens", "flops", "time"):
        assert run.tracks.at("tasks", x).tolist() == [plain.tracks.place(totals(step), x) for step in (10, 20)]
        assert run.tracks.at("step", x).tolist() == plain.tracks.at("step", x).tolist()
    assert run.tracks.column("tasks", "scores|lines/acc").tolist() == [0.26, 0.27]


# ---- what is none ------------------------------------------------------------------------------------------

BAD = {
    "no file": (None, "holds no metrics.jsonl"),
    "empty": ("", "is empty"),
    "one piece": ('{"event": "start"', "is empty"),
    "no json": ('{"event": "start", "step": 0}\nhello\n', "line 2 is no metrics row"),
    "two in a line": ('{"event": "a", "step": 0},{"event": "a", "step": 0}\n', "line 1 is no metrics row"),
    "brackets": ("[" * 100_000 + "\n", "line 1 is no metrics row (RecursionError)"),
    "brackets in a row": (
        '{"event": "start", "step": 0, "environment": ' + '{"a": ' * 40 + "1" + "}" * 41 + "\n",
        "line 1 is no metrics row (RecursionError)",
    ),
    "a step in words": ('{"event": "step", "step": "1"}\n', "line 1 is no metrics row"),
    "no tokens": ('{"event": "step", "step": 1, "loss": 1.0}\n', "of the step row of step 1 is no number"),
    "a loss in words": (
        '{"event": "step", "step": 1, "tokens": 1, "flops": 1, "loss": "low", "tokens_per_s": 1}\n',
        "metrics: loss = low: of the step row of step 1 is no number",
    ),
    "a growth of nothing": ('{"event": "growth", "step": 1, "tokens": 1, "flops": 1}\n', "is no section"),
    "a size in words": (
        json.dumps(growth_row(1, 0) | {"new": {"d_model": "many"}}) + "\n",
        "metrics: d_model = many: of the growth row of step 1 is no size",
    ),
    "bytes in words": (json.dumps(growth_row(1, 0) | {"bytes_sent": "many"}) + "\n", "metrics: bytes_sent = many: of"),
    "samples in words": (
        json.dumps(step_row(1)) + "\n" + json.dumps({"event": "sample", **totals(1), "samples": "text"}) + "\n",
        "metrics: samples = text: of the sample row of step 1 is no list of texts",
    ),
    "weights in words": (
        json.dumps(step_row(1)) + "\n" + json.dumps(phase_row(1, 0, "many")) + "\n",
        "metrics: weights = many: of the phase row of step 1 is no number",
    ),
    "no text": ("\udcff\n", "cannot be read"),
}


def test_metrics_that_are_a_pipe_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=f"^metrics = {tmp_path}/metrics.jsonl: is no regular file; name"):
        gather([tmp_path])


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_run_is_named_in_one_line(tmp_path, kind):
    text, told = BAD[kind]
    if text is not None:
        (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        render(gather([tmp_path]))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_that_cannot_be_read(tmp_path):
    folder = write_run(tmp_path / "run", rows(10))
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    for text in ("a: [", "a0: &a0 [x]\n" + laughs, "[" * 100_000, "a: 1\na: 2", "a: \0"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"^config = .*config.yaml: cannot be read"):
            gather([folder])


# ---- the command, and a browser ----------------------------------------------------------------------------


def report(*args: object) -> Done:
    return run_command("report", *args)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Two runs compared by the command; the folder."""
    root = tmp_path_factory.mktemp("report")
    runs = [write_run(root / "grown", rows(100, growths=(30, 60))), write_run(root / "rolled back", rolled_back())]
    done = report(*runs, "--out", root / "deep/out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{root / 'deep/out/report.html'}\n"
    return root / "deep/out"


def test_command_line(written, tmp_path):
    assert sorted(path.name for path in written.iterdir()) == ["curves.png", "loss.png", "report.html"]
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "loss.png"))
    assert not Page((written / "report.html").read_text()).problems


def test_columns_of_words_are_columns(written):
    text = (written / "report.html").read_text()
    assert all(f'<th scope="col">{name}</th>' in text for name in GROWTH_WORDS)
    assert text.count('<td class="words">') >= len(GROWTH_WORDS)


def test_wrong_command_lines(tmp_path):
    for args, told in (
        ([tmp_path], f"error: run_dir = {tmp_path}: holds no metrics.jsonl"),
        ([tmp_path / "a"], f"error: run_dir = {tmp_path}/a: does not exist; name the directory of a megabus run"),
        ([__file__], f"error: run_dir = {__file__}: is a file; name the directory of a megabus run"),
        ([""], "error: run_dir = '': does not exist; name the directory of a megabus run"),
        (
            [tmp_path / "a", tmp_path / "b"],
            f"error: RUN_DIR = {tmp_path}/a {tmp_path}/b: are several runs; name a folder",
        ),
    ):
        done = report(*args)
        assert done.returncode == 2
        assert done.stderr.startswith(told)
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def browse(page: Path, view: str = "", width: int = 390) -> tuple[str, str]:
    """The document after its scripts have run, and what they complained of."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    options = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    options += [
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=5000",
    ]
    command = [browser, *options, "--enable-logging=stderr", "--dump-dom", f"{page.as_uri()}{view}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize(
    ("view", "shown", "label"),
    [
        ("", "tokens", "tokens"),
        ("#x=flops", "flops", "training compute (FLOPs)"),
        ("#x=time&log=1&hide=1", "time log", "training time (seconds)"),
    ],
)
def test_a_browser_draws_it(written, view, shown, label):
    dom, complaints = browse(written / "report.html", view)
    assert complaints == ""
    assert f'data-shown="{shown}"' in dom
    drawn_ones = Page(dom.replace("url(&quot;#", "url(#"))
    n_panels = drawn_ones.count("figure")
    assert n_panels == drawn_ones.count("svg") > 10
    assert drawn_ones.labels == [label] * n_panels
    assert drawn_ones.text.count("1") >= n_panels  # growths are numbered
    assert "nothing to show" not in drawn_ones.text
    pressed = [a for tag, a in drawn_ones.tags if tag == "button" and a.get("aria-pressed") == "true"]
    assert [a["data-x"] for a in pressed if "data-x" in a] == [shown.split()[0]]
    assert [a["data-toggle"] for a in pressed if "data-toggle" in a] == (["0"] if "hide" in view else ["0", "1"])


@pytest.mark.parametrize(("width", "box"), [(390, "370 225"), (1280, "1000 320")])
def test_the_loss_is_drawn_for_the_window(written, width, box):
    dom, _ = browse(written / "report.html", width=width)
    assert f'viewBox="0 0 {box}"' in dom.partition('data-panel="loss"')[2].partition("</figure>")[0]


def test_a_browser_tells_values(written, tmp_path):
    """The pointer on the first growth of the loss: what is told is what the rows of that place say."""
    page = tmp_path / "report.html"
    point = """<script>setTimeout(() => {
      const svg = document.querySelector("[data-panel=loss] svg"), bounds = svg.getBoundingClientRect();
      const [left, right] = svg.dataset.box.split(" "), [low, high] = svg.dataset.span.split(" ");
      const x = +left + (61440 - low) / (high - low) * (right - left);
      const clientX = bounds.left + x * bounds.width / svg.viewBox.baseVal.width;
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY: bounds.top + 50 }));
    }, 1000)</script></body>"""
    page.write_text((written / "report.html").read_text().replace("</body>", point))
    dom, complaints = browse(page)
    assert complaints == ""
    tip = Page(dom[dom.index('<div class="tip"') :].split("</figure>")[0]).words
    assert tip.startswith("61.44K tokens")
    assert "grown, validation: 4.1" in tip
    assert "grown, growth 1: d 48→52 (κ)" in tip
    assert "rolled back, failed save at step 40" not in tip


def test_control_a_browser_complains(written, tmp_path):
    page = tmp_path / "report.html"
    page.write_text((written / "report.html").read_text().replace('"use strict";', '"use strict"; oops();'))
    dom, complaints = browse(page)
    assert "oops is not defined" in complaints
    assert "data-shown" not in dom
