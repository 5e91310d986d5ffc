"""The lines of the log, row by row: each thing is told once, and what cannot be known is not told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from megabus.config import parse_config, resolve_stages
from megabus.kappa.monitor import KappaMonitor
from megabus.train.log import Log
from megabus.train.run import span_of
from tests.support.tiny_config import BASE

TOTALS = {"tokens": 640, "flops": 2e9, "stage": 0}
STEP = {"event": "step", "loss": 3.1, "lr": 1e-2, "grad_norm": 0.5, "mfu": None, "share": 0.25} | TOTALS
STEP |= {"tokens_per_s": 100.0, "tokens_per_s_per_gpu": 100.0}


@pytest.fixture
def run():
    """As much of one as the log asks for."""
    config = parse_config(yaml.safe_load(BASE))
    stages = resolve_stages(config, 1)
    monitor = KappaMonitor(config.growth.trigger.model_copy(update={"predictor": "constant", "constant": 1.0}))
    monitor.start_stage(span_of(stages[0], 0, 0.0))
    for number in range(3):
        monitor.observe(number, float(number), 3.0 - number)
    view = monitor.view(3, 3.0)
    return SimpleNamespace(config=config, stages=stages, stage=stages[0], share=0.25, view=view, can_grow=True)


@pytest.fixture
def lines(run, capfd):
    """What the log says of rows."""
    log = Log()

    def said(*rows):
        for row in rows:
            log.on_row(run, {"step": 10, "share": run.share} | TOTALS | row)
        return capfd.readouterr().out.splitlines()

    return said


def test_kappa_has_a_bar_where_something_grows(run, lines):
    (line,) = lines(STEP)
    assert "| κ ▕" in line
    assert "MFU" not in line
    run.can_grow = False
    (line,) = lines(STEP)
    assert "κ" not in line
    assert "25% done" in line
    assert not lines(STEP | {"step": 11})  # log.every: 10


def test_a_loss_is_told_once(run, lines):
    """After a growth, and where a phase begins; with its bits, where these are known."""
    evaluated = {"event": "eval", "loss": 2.0, "bits_per_byte": 1.25}
    assert lines(evaluated) == ["step    10 | validation loss 2.0000, 1.2500 bits/byte"]
    growth = {"event": "growth", "reason": "kappa", "from_stage": 0, "loss_before": 2.0, "loss_after": 2.0000001}
    run.stage = run.stages[1]
    (line,) = lines(growth | {"stall_s": 1.0, "bytes_sent": 2**20}, evaluated | {"loss": 2.0000001})
    assert "GROWTH (kappa) d36 L3" in line
    assert "loss 2.000000 -> 2.000000 | 1.0 s, 1.0 MiB sent" in line
    longer = lines(evaluated | {"loss": 1.5, "bits_per_byte": None, "ema": {0.9: 1.75}, "why": "κ waits"})
    assert longer == [
        "step    10 | validation loss 1.5000",
        "step    10 | validation loss of running means: 1.7500 with decay 0.9",
        "step    10 | κ waits",
    ]


def test_what_else_is_looked_at(run, lines):
    samples = {"weights": [1.0, 2.0], "seq_len": 8, "micro_batch_size": 1, "global_batch_size": 4}
    told = lines(
        {"event": "phase"} | samples,
        {"event": "phase", "changed": ["seq_len"]} | samples,
        {"event": "sample", "samples": [{"prompt": "KING:\n", "text": "hé\x1b[31m"}]},
        {"event": "sample", "samples": [{"prompt": "A", "text": "\n" * 3}, {"prompt": "B", "text": "b\n\n\n\nc\n\nd"}]},
        {"event": "evaluation", "when": "end", "loss": {"a": 1.0, "b": 2.0}, "bits_per_byte": {"a": None, "b": 0.5}},
        {"event": "tasks", "when": "end", "error": "exit code 1: no"},
        {"event": "tasks", "when": "step", "step": 7, "scores": {"lines/acc": 0.25}},
        {"event": "profile", "first": 2, "last": 4, "folder": "run/profile", "shares": {"aten::mm": 0.5}},
        {"event": "skip", "loss": 9.0, "grad_norm": 2.0, "loss_limit": 4.0, "grad_norm_limit": 1.0},
        {"event": "skip", "loss": 3.12345, "grad_norm": 2.12345, "loss_limit": 4.0, "grad_norm_limit": 1.23456},
        {"event": "skip", "loss": float("nan"), "grad_norm": float("inf")},
    )
    sizes = "{weights: [1.0, 2.0], seq_len: 8, micro_batch_size: 1, global_batch_size: 4}"
    assert told == [
        f"step    10 | PHASE at 25%: {sizes}",
        "step    10 | PHASE at 25%: {seq_len: 8}",
        "step    10 | sample: KING:",
        "           | hé\\x1b[31m",
        "step    10 | sample: A\\n\\n\\n",
        "step    10 | sample: Bb\\n\\n\\n\\n",
        "           | c",
        "           | ",
        "           | d",
        "step    10 | a (end): loss 1.0000",
        "step    10 | b (end): loss 2.0000, 0.5000 bits/byte",
        "step    10 | tasks (end): failed, exit code 1: no",
        "step     7 | tasks (step): lines/acc 0.2500",
        "step    10 | profile of steps 2 to 4 in run/profile: aten::mm 50%",
        "step    10 | loss 9.0000 |g| 2: no update, a spike: loss above 4 and |g| above 1",
        "step    10 | loss 3.1235 |g| 2.123: no update, a spike: |g| above 1.235",
        "step    10 | loss nan |g| inf: no update",
    ]
