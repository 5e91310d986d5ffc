"""Implementations of AdamW: the same run with any of them, through a growth and a resume; clear words for none.
And the gated one, against the paper's equations in fp64."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from megabus.config.schema import OptimizerConfig
from megabus.engine import adam as adam_room
from megabus.engine.adam import Segment, make_adam
from tests.support.small_runs import quick_config, refusal, rows_of, start, stop_after, write_corpus

LAYOUTS = [{"tp": 2}, {"dp": 2}, {"pp": 2}]
# Twelve steps: growths come after steps 4 and 8.
STAGES = [
    {"d_model": 52, "n_heads": 3, "d_ff": 90, "max_tokens": 512, "layout": LAYOUTS[1]},
    {"n_layers": 5, "seq_len": 32, "lr": 3e-3, "layout": LAYOUTS[2]},
]
BUDGET = {"growth__max_tokens": 512, "train__max_tokens": 2048, "eval__every": 6}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def losses(config):
    return [(row["step"], row["loss"]) for row in rows_of(config, "step")]


@pytest.mark.usefixtures("deepspeed_adam")
def test_deepspeeds_is_torchs_to_rounding(corpus, tmp_path):
    found = {}
    for name in ("torch", "deepspeed"):
        asked = {"optimizer__implementation": name, "log": {"every": 1}, "growth__stages": STAGES}
        config = quick_config(corpus, tmp_path / name, LAYOUTS, **BUDGET | asked)
        if name == "deepspeed":  # of torch's, test_resume.py shows that it changes no bit
            start(config, 2, stop_after(6))  # after the first growth
        ranks = start(config, 2)
        assert ranks[0].steps[-1].optimizer_step == 12  # the moments, and their count, came along
        found[name] = losses(config)
    assert len(found["torch"]) == len(found["deepspeed"]) == 12
    for (step, a), (other, b) in zip(found["torch"], found["deepspeed"], strict=True):
        assert step == other
        assert abs(a - b) <= 1e-4


def test_what_is_not_there_is_told(corpus, tmp_path):
    """The registry's apex, a web toolkit, is not NVIDIA's."""

    def another_apex():
        sys.modules["apex"] = types.ModuleType("apex")

    config = quick_config(corpus, tmp_path / "run", LAYOUTS, optimizer__implementation="apex")
    assert "optimizer.implementation = apex: cannot be used here (ModuleNotFoundError" in refusal(
        config, 2, another_apex
    )


# ---- the gated one -------------------------------------------------------------------------------------------

N, STEPS = 1003, 4


def gradients():
    """Entries of 1e-12 to 1, and some that never have any."""
    draw = torch.Generator().manual_seed(0)
    sizes = 10 ** (-12 * torch.rand(N, generator=draw, dtype=torch.float64))
    sizes[::100] = 0
    return [sizes * torch.randn(N, generator=draw, dtype=torch.float64) for _ in range(STEPS)]


def gated(gate, eps, monkeypatch, segments=None):
    monkeypatch.setattr(adam_room, "BLOCK", 100)  # the last one is smaller
    flat = torch.linspace(-1, 1, N).requires_grad_()
    config = OptimizerConfig.model_validate({"lr": 3e-3, "gate": gate, "eps": eps, "weight_decay": 0.1})
    adam = make_adam(config, [{"params": [flat], "weight_decay": config.weight_decay}], flat.device)
    if segments:
        adam.param_groups[0]["segments"] = segments
    for gradient in gradients():
        flat.grad = gradient.float()
        adam.step()
    return flat.detach().double(), adam.state[flat]


def by_the_paper(gate, eps, rate=1.0):
    """theta - lr (sigmoid(a log(d / eps)) m / d + lambda theta), d the root of the corrected second moment."""
    theta = torch.linspace(-1, 1, N).double()
    m, v = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step, gradient in enumerate(gradients(), 1):
        gradient = gradient.float().double()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        d = (v / (1 - 0.95**step)).sqrt() + 1e-30
        ratio = torch.sigmoid(gate * torch.log(d / eps)) * m / (1 - 0.9**step) / d
        theta = theta - 3e-3 * (rate * ratio + 0.1 * theta)
    return theta


@pytest.mark.parametrize(("gate", "eps"), [(0.5, 1e-8), (0.5, 1e-4), (1.0, 1e-6), (2.0, 1e-4)])
def test_the_gated_one_is_the_papers(gate, eps, monkeypatch):
    weights, state = gated(gate, eps, monkeypatch)
    torch.testing.assert_close(weights, by_the_paper(gate, eps), rtol=0, atol=3e-7)
    assert float(state["step"]) == STEPS
    other = by_the_paper(gate / 2, eps)
    assert (weights - other).abs().max() > 1e-4  # control: another gate is told from it


@pytest.mark.parametrize("eps", [1e-30, 1e-8, 1e4])
@pytest.mark.parametrize("gate", [1e-3, 1.0, 2.0])
def test_every_gate_leaves_numbers(gate, eps, monkeypatch):
    """At the bounds of what a configuration may say, for entries with no gradient too: those only decay."""
    weights, _ = gated(gate, eps, monkeypatch)
    assert weights.isfinite().all()
    decayed = torch.linspace(-1, 1, N)[::100] * (1 - 3e-4) ** STEPS
    torch.testing.assert_close(weights[::100].float(), decayed)


def test_the_gated_one_has_segments_of_its_own_rates(monkeypatch):
    weights, _ = gated(0.5, 1e-4, monkeypatch, [Segment(0, 333, 0.25), Segment(333, N, 2.0)])
    for part, rate in ((slice(0, 333), 0.25), (slice(333, N), 2.0)):
        torch.testing.assert_close(weights[part], by_the_paper(0.5, 1e-4, rate)[part], rtol=0, atol=5e-7)


def test_gate_one_is_adamw(monkeypatch):
    """To rounding: AdamW's eps is such a gate."""
    weights, _ = gated(1.0, 1e-4, monkeypatch)
    plain, _ = gated(None, 1e-4, monkeypatch)
    torch.testing.assert_close(weights, plain, rtol=0, atol=3e-7)
