"""What two runs of growth's experiments have in common, told from their configurations."""

from __future__ import annotations

import math

import pytest

from benchmarks.growth.prefix import Common, common
from megabus.checkpoint.state import Progress, SavedState
from megabus.config import parse_config
from tests.support import growth_experiments as small

INF = math.inf
A, B, C = {"d_model": 52, "n_heads": 3, "max_tokens": 9}, {"n_layers": 3, "max_tokens": 9}, {"n_layers": 4}
D = {"d_model": 52, "n_heads": 3}
MORE = {"train__max_flops": 300.0}
NONE = Common(-1, 0.0)


def grow(*stages, **keys):
    return {"growth": {"max_tokens": 5, "trigger": {"kappa": 0.5}, "stages": list(stages)} | keys}


UNMET = {"kappa": 1.0, "predictor": "constant", "constant": 0.0}
HORIZON = {"optimizer__transfer": {"d_model": 18, "n_layers": 1, "steps": 10}, "train__max_flops": 1e9}


def by_caps(*stages, **keys):
    return grow(*stages, trigger=UNMET, **keys)


def marginal(*stages, **keys):
    return grow(*stages, trigger={"rule": "marginal"}, **keys)


@pytest.mark.parametrize(
    ("done", "new", "expected"),
    [
        ({}, {}, Common(0, INF)),
        ({}, MORE, Common(0, 70.0)),
        (MORE, {}, Common(0, 70.0)),
        ({"optimizer__schedule": "constant"}, MORE, Common(0, 100.0)),
        ({"optimizer__schedule": "constant", "optimizer__warmup_share": 0.1}, MORE, Common(0, 0.0)),
        ({"optimizer__warmup_share": 0.1}, MORE, Common(0, 0.0)),
        ({"optimizer__schedule": "cosine"}, MORE, Common(0, 0.0)),
        ({"optimizer__schedule": "cosine"}, {}, Common(0, INF)),
        ({"train__max_steps": 50}, MORE, Common(0, 0.0)),
        ({}, {"train__seed": 1}, NONE),
        ({}, {"optimizer__lr": 0.02}, NONE),
        ({}, {"eval__every": 5}, NONE),
        ({}, {"model__d_ff": 64}, NONE),
        ({}, {"log__every": 5, "checkpoint__every": 9}, Common(0, INF)),
        (grow(A, C), grow(A, C), Common(2, INF)),
        (grow(A, C), grow(A, C) | MORE, Common(2, 70.0)),
        (grow(A, C), grow(A, C, write="clone"), Common(0, INF)),
        (grow(A, C), grow(A, C, moments="reset", depth="stack") | MORE, Common(0, 70.0)),
        (grow(A, B, C), grow(A, C), Common(1, INF)),
        (grow(A, C), grow(B, C), Common(0, INF)),
        (grow(A, C), grow(A, C, trigger={"kappa": 0.6}), NONE),
        (grow(A, C), grow(A, C, max_tokens=6), NONE),  # a fit looks at the cap
        (by_caps(A, C), by_caps(A, C, max_tokens=6), Common(0, INF, (6, None))),
        (by_caps(A, C), by_caps(B, C, max_tokens=6), Common(0, INF, (6, None))),
        (by_caps(C), by_caps(A, C) | MORE, Common(0, 70.0)),
        (by_caps(D), by_caps(A, C) | MORE, Common(1, 70.0, (9, None))),  # one growth less
        (by_caps(A, C), by_caps(D), Common(1, INF)),
        ({}, by_caps(A, C), Common(0, INF, (5, None))),
        (grow(A, C), by_caps(A, C), Common(0, INF, (5, None))),
        (by_caps(A, C), grow(A, C), NONE),
        (grow(A, C), {}, Common(0, INF)),  # until it grows
        ({}, grow(A, C), NONE),  # it went on where the new one grows
        ({}, grow(), Common(0, INF)),
        (grow({"n_layers": 3}), grow({"n_layers": 3}, C), Common(0, INF)),
        (grow(A, C | {"seq_len": 32}), grow(A, C), NONE),  # chunks are cut by the longest sequence
        (grow(A, C | {"micro_batch_size": 3}), grow(A, C), Common(1, INF)),  # they are validated on the same tokens
        (grow(A, C | {"micro_batch_size": 4}), grow(A, C), Common(1, INF)),
        (HORIZON, HORIZON, Common(0, INF)),
        (HORIZON, MORE, NONE),  # more steps, and a lower rate from the first on
        (HORIZON | grow(A, C), HORIZON | grow(A, {"n_layers": 5}), NONE),
        (HORIZON | grow(A, C), HORIZON | grow(A, C, write="clone"), Common(0, INF)),
        (marginal(A, C), marginal(A, C), Common(2, INF)),
        (marginal(A, C), marginal(A, C) | MORE, NONE),  # what is left of the run decides
        (marginal(A, C), marginal(B, C), NONE),  # and the next size
        (marginal(A, C), marginal(A, B), Common(0, INF)),
        (marginal(A, C), marginal(A, C, write="clone"), Common(0, INF)),
        ({}, grow(A, C, trigger=UNMET | {"rule": "marginal", "predictor": "fit"}), NONE),
    ],
)
def test_what_runs_have_in_common(done, new, expected):
    extra = {key: value for key, value in done.items() if key.startswith(("optimizer", "train__max_steps"))}
    one, other = (parse_config(small.tree_of(small.spec(), **extra, **x)) for x in (
        {k: v for k, v in done.items() if k not in extra}, {k: v for k, v in new.items() if k not in extra}
    ))  # fmt: skip
    if "optimizer__lr" in new:
        assert extra == {}
    found = common(one, other)
    assert (found.growths, found.cap) == (expected.growths, expected.cap)
    assert found.flops == pytest.approx(expected.flops)


@pytest.mark.parametrize(("stage", "spent", "holds"), [(0, 8, True), (1, 4, True), (1, 5, False), (2, 0, False)])
def test_a_state_is_another_runs_until_that_one_grows(stage, spent, holds):
    progress = Progress(tokens=20, stage_tokens=20 - spent, flops=60.0)
    state = SavedState(progress, stage, None, None, 0, (), {}, {}, {})
    assert Common(1, 70.0, (5, None)).holds(state) == holds
    assert not Common(1, 60.0, (5, None)).holds(state)
