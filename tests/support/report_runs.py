"""Run directories as runs write them, of any length and with any accident, for what reads them."""

from __future__ import annotations

import json
import math

import yaml

KINDS = ("s_qk", "alpha_attn", "output.s_z")


def totals(step, stage=0):
    return {"step": step, "tokens": 2048 * step, "flops": 3e9 * step, "stage": stage}


def sizes(stage):
    return {
        "d_model": 48 + 4 * stage,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "d_ff": 96,
        "n_params": 10**5 + stage,
    }


def environment():
    return {
        "started": "2026-11-25T10:00:00+00:00",
        "ranks": 4,
        "torch": "2.13.0",
        "hosts": ["a"],
        "memory_bytes": 2**34,
    }


def start_row():
    return {"event": "start", **totals(0), "sizes": sizes(0), "layout": "TP2/PP1/DP2", "environment": environment()}


def step_row(step, stage=0, steps=100, **facts):
    wave = math.sin(step * 0.7)
    return {
        "event": "step",
        **totals(step, stage),
        "loss": 3 + 4 / (1 + 0.1 * step) + 0.1 * wave,
        "lr": 1e-2 * min(1, (steps - step + 1) / (0.2 * steps)),
        "grad_norm": 1 + 0.5 * wave,
        "tokens_per_s": 9000 + 500 * wave,
        "tokens_per_s_per_gpu": 2250 + 125 * wave,
        "mfu": None,
        "unit_error": 2e-7 * (1.5 + wave),
        "share": step / steps,
    } | facts


def eval_rows(step, stage=0):
    gains = {kind: {f"p{p}": 0.05 + 1e-4 * step * (p - 50) / 50 for p in (0, 5, 25, 50, 75, 95, 100)} for kind in KINDS}
    loss = 3.1 + 4 / (1 + 0.1 * step)
    kappa = {
        "kappa": 0.8,
        "kappa_progress": step % 40 / 40,
        "kappa_target": 3.5,
        "kappa_mp": 3.2,
        "kappa_loss": loss,
    }
    yield {"event": "eval", **totals(step, stage), "loss": loss, "bits_per_byte": loss / 3} | kappa
    yield {"event": "gains", **totals(step, stage)} | gains
    memory = {"max_bytes": 2**29 + step, "max_rank": 1, "mean_bytes": 2**28, "min_bytes": 2**27, "of": "process"}
    yield {"event": "memory", **totals(step, stage)} | memory


def growth_row(step, stage):
    facts = {"old_layout": "TP2/PP1/DP2", "new_layout": "TP1/PP1/DP4", "reason": "kappa", "unit_error": 1e-7}
    losses = {"loss_before": 4.0, "loss_after": 4.0000004, "stall_s": 0.5, "bytes_sent": 3 * 2**20, "bytes_kept": 2**19}
    stages = {"from_stage": stage, "to_stage": stage + 1, "old": sizes(stage), "new": sizes(stage + 1)}
    return {"event": "growth", **totals(step, stage + 1)} | stages | facts | losses


def looks(step, stage, when):
    """What `log.samples` and `eval.extra` have written."""
    samples = [{"prompt": "KING:\n", "text": f"After {step} steps."}]
    yield {"event": "sample", **totals(step, stage), "samples": samples, "seconds": 2.0}
    losses = {"loss": {"code": 3 - step / 100}, "bits_per_byte": {"code": (3 - step / 100) / 2}, "seconds": 1.5}
    yield {"event": "evaluation", **totals(step, stage), "when": when} | losses
    scores = {"scores": {"lines/acc": 0.25 + step / 1000}, "seconds": 60.0, "write_s": 0.5}
    yield {"event": "tasks", **totals(step, stage), "when": when} | scores


def rows(steps=100, every=10, growths=()):
    """A run that ends well, and grows after these steps."""
    stage = 0
    yield start_row()
    yield from eval_rows(0)
    for step in range(1, steps + 1):
        yield step_row(step, stage, steps)
        if step % every == 0:
            yield from eval_rows(step, stage)
        if step in growths:
            yield growth_row(step, stage)
            stage += 1


def write_run(folder, told, config=None, cut=""):
    """`cut`: what a killed run left of a last line."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in told) + cut
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    tree = {"run_dir": str(folder), "model": {"d_model": 48, "kind": "ngpt"}, "growth": {"stages": [{"d_model": 52}]}}
    if config != "none":
        (folder / "config.yaml").write_text(yaml.safe_dump(tree | (config or {})))
    return folder
