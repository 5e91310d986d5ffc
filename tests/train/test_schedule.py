"""What follows from a configuration: the learning rate, the budget, what a model costs, DeepSpeed's JSON."""

from __future__ import annotations

import itertools
from math import inf
from pathlib import Path

import pytest

from megabus.config import ModelConfig, Stage, load_config, resolve_stages
from megabus.config.after_growth import RewarmConfig, SettleConfig
from megabus.config.schema import OptimizerConfig, TrainConfig
from megabus.engine.ds_config import deepspeed_config
from megabus.model.budget import spent_share
from megabus.model.cost import count_parameters, flops_per_token
from megabus.model.init import build_model
from megabus.model.peak import peak_flops
from megabus.train.schedule import angle_bound, decays, learning_rate, rewarm_factor
from tests.support.tiny_config import BASE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


# ---- learning rate and budget ------------------------------------------------------------------------------


def optim(**options: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 1.0} | options)


GRID = [i / 4000 for i in range(4001)]


def largest_jump(values: list[float]) -> float:
    return max(abs(b - a) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "log", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("low", [0.0, 0.25])
def test_schedules_are_continuous(schedule: str, warmup: float, low: float) -> None:
    """Warm-up rises, the rest never does, no jump between; the peak is lr and the end min_lr_ratio of it."""
    options = optim(schedule=schedule, warmup_share=warmup, decay_share=0.2, decay_rho=0.2, min_lr_ratio=low)
    values = [learning_rate(options, 3.0, share) for share in GRID]
    assert max(values) == 3.0
    assert values[-1] == pytest.approx(3.0 if schedule == "constant" else 3.0 * low, abs=1e-12)
    peak = round(warmup * 4000)
    assert values[peak] == pytest.approx(3.0)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    steepest = 3.0 / 0.1 / 4000  # the warm-up; the decays are gentler
    assert largest_jump(values) <= steepest * (1 + 1e-9)
    assert largest_jump([3.0 if share < 0.5 else 2.9 for share in GRID]) > steepest  # control: a jump would show


@pytest.mark.parametrize(
    ("options", "share", "factor"),
    [
        ({"schedule": "constant"}, 0.0, 1.0),
        ({"schedule": "constant"}, 0.99, 1.0),
        ({"schedule": "cosine"}, 0.0, 1.0),
        ({"schedule": "cosine"}, 0.5, 0.5),
        ({"schedule": "cosine"}, 1 / 3, 0.75),
        ({"schedule": "cosine", "min_lr_ratio": 0.2}, 0.5, 0.6),
        ({"schedule": "cosine", "warmup_share": 0.2}, 0.6, 0.5),
        ({"schedule": "wsd"}, 0.8, 1.0),
        ({"schedule": "wsd"}, 0.9, 0.5),
        ({"schedule": "wsd", "min_lr_ratio": 0.1}, 0.9, 0.55),
        ({"schedule": "wsd", "decay_share": 1.0}, 0.25, 0.75),
        ({"schedule": "wsd", "decay_share": 0.0}, 1.0, 1.0),
        ({"schedule": "wsd", "warmup_share": 0.4}, 0.1, 0.25),
        ({"schedule": "cosine", "warmup_share": 1.0}, 1.0, 1.0),
        ({"schedule": "log", "decay_rho": 0.5}, 0.0, 1.0),
        ({"schedule": "log", "decay_rho": 0.125}, 0.25, 0.5),  # 1 - log 3 / log 9
        ({"schedule": "log", "decay_rho": 0.125, "min_lr_ratio": 0.2}, 0.25, 0.6),
        ({"schedule": "log", "decay_rho": 0.125, "warmup_share": 0.2}, 0.4, 0.5),
        ({"schedule": "log", "decay_rho": 0.125, "warmup_share": 0.2}, 0.1, 0.5),
        ({"schedule": "log", "decay_rho": 1.0}, 0.5, 0.4150375),  # 1 - log 1.5 / log 2
        ({"schedule": "log", "decay_rho": 1e-6}, 0.0, 1.0),
        ({"schedule": "log", "decay_rho": 1e-6}, 999.0005e-6, 0.5),  # 1 - log 1000.0005 / log (1e6 + 1)
        ({"schedule": "log"}, 1.0, 0.0),
        ({"schedule": "wsd", "decay": "log", "decay_rho": 0.125}, 0.8, 1.0),
        ({"schedule": "wsd", "decay": "log", "decay_rho": 0.125}, 0.85, 0.5),
        ({"schedule": "wsd", "decay": "log", "decay_rho": 0.125, "min_lr_ratio": 0.1}, 0.85, 0.55),
        ({"schedule": "wsd", "decay": "log"}, 1.0, 0.0),
    ],
)
def test_learning_rate_in_closed_form(options: dict, share: float, factor: float) -> None:
    for lr in (1.0, 0.02):
        assert learning_rate(optim(**options), lr, share) == pytest.approx(lr * factor, rel=2e-6, abs=1e-12)


def test_only_wsds_decay_silences_kappa() -> None:
    told = {name: [decays(optim(schedule=name), share) for share in (0.5, 0.9)] for name in ("cosine", "log", "wsd")}
    assert told == {"cosine": [False, False], "log": [False, False], "wsd": [False, True]}


def test_a_rewarmed_rate_rises_linearly() -> None:
    rewarm = RewarmConfig(share=0.2, tokens=200)
    assert [rewarm_factor(rewarm, tokens) for tokens in (0, 50, 100, 200, 1000)] == pytest.approx([0.2, 0.4, 0.6, 1, 1])
    assert rewarm_factor(RewarmConfig(tokens=200), 50) == 0.25
    assert rewarm_factor(None, 0) == 1.0


def test_the_cap_on_angles_loosens_after_a_growth() -> None:
    """Its inverse falls linearly, to that of the cap that holds all along or to 0."""
    settle = SettleConfig(max_angle=0.1, tokens=200)
    assert [angle_bound(0.4, settle, tokens) for tokens in (0, 100, 200, 999)] == pytest.approx([0.1, 0.16, 0.4, 0.4])
    assert [angle_bound(None, settle, tokens) for tokens in (0, 100, 150, 200)] == pytest.approx([0.1, 0.2, 0.4, inf])
    assert (angle_bound(None, settle, None), angle_bound(0.4, settle, None)) == (inf, 0.4)  # nothing has grown
    assert (angle_bound(None, None, 0), angle_bound(0.4, None, 0)) == (inf, 0.4)


@pytest.mark.parametrize(
    ("budgets", "share"),
    [
        ({"max_steps": 10}, 0.3),
        ({"max_tokens": 1000}, 0.5),
        ({"max_flops": 8e9}, 0.25),
        ({"max_steps": 10, "max_tokens": 1000, "max_flops": 8e9}, 0.5),
        ({"max_steps": 3, "max_tokens": 1000}, 1.0),
        ({"max_tokens": 400}, 1.0),  # overshot
    ],
)
def test_spent_share_is_the_largest(budgets: dict, share: float) -> None:
    train = TrainConfig.model_validate({"seq_len": 1, "micro_batch_size": 1, "global_batch_size": 1} | budgets)
    assert spent_share(train, step=3, tokens=500, flops=2e9) == pytest.approx(share)
    assert spent_share(train, step=0, tokens=0, flops=0.0) == 0.0


# ---- what a model costs ------------------------------------------------------------------------------------

V, D, L, H, K, C, F, T = 67, 36, 3, 6, 2, 4, 62, 16
MODEL = {
    "vocab_size": V,
    "d_model": D,
    "n_layers": L,
    "n_heads": H,
    "n_kv_heads": K,
    "head_dim": C,
    "d_ff": F,
}
DENSE = L * (2 * H * C * D + 2 * K * C * D + 3 * F * D) + V * D  # q and out, k and v, three of the MLP; head
GAINS = {
    "ngpt": L * (H * C + 2 * F + 2 * D) + V,
    "gpt": L * 2 * D + D,
}  # s_qk, s_u and s_v, alphas, s_z; norms


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_parameters_and_flops_counted_by_hand(kind: str) -> None:
    model = ModelConfig.model_validate(MODEL | {"kind": kind})
    assert count_parameters(model) == DENSE + V * D + GAINS[kind]
    assert count_parameters(model) == sum(p.numel() for p in build_model(model).parameters())
    assert flops_per_token(model, T) == 6 * DENSE + 6 * L * H * C * T
    more = flops_per_token(model.model_copy(update={"vocab_size": V + 1}), T) - flops_per_token(model, T)
    assert more == 6 * D  # the head's row; the embedding's costs nothing


def test_peak_is_what_the_file_says() -> None:
    assert peak_flops(312, "fp32") == 312e12
    assert peak_flops(None, "fp32") is None


# ---- DeepSpeed's JSON --------------------------------------------------------------------------------------


def stages_of(base: Path, *overrides: str, world: int) -> list[tuple[TrainConfig, Stage]]:
    config = load_config(base, overrides)
    return [(config.train, stage) for stage in resolve_stages(config, world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2])
def test_deepspeed_batches_add_up(base: Path, world: int, tp: int) -> None:
    if world % tp:
        tp = world
    new = "growth.stages.1={n_layers: 5, micro_batch_size: 1, global_batch_size: 16, layout: {pp: 1}}"
    for train, stage in stages_of(base, f"layout.tp={tp}", new, world=world):
        tree = deepspeed_config(train, stage)
        micro, accumulated = tree["train_micro_batch_size_per_gpu"], tree["gradient_accumulation_steps"]
        assert tree["train_batch_size"] == micro * accumulated * stage.layout.dp == stage.global_batch_size
        assert stage.layout.world == world


def test_deepspeed_numerics(base: Path) -> None:
    """Clipping is always said (DeepSpeed's own default is 1.0), and bf16 sums its gradients in fp32."""
    overrides = ["train.gradient_clipping=0", "train.zero_stage=2"]
    plain = deepspeed_config(*stages_of(base, *overrides, world=1)[0])
    assert plain["gradient_clipping"] == 0
    assert plain["zero_optimization"]["stage"] == 2
    assert not {"bf16", "fp16", "data_types"} & set(plain)
    half = deepspeed_config(*stages_of(base, "train.precision=bf16", world=1)[0])
    assert half["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert half["communication_data_type"] == "fp32"
    assert half["data_types"] == {"grad_accum_dtype": "fp32"}
    assert half["gradient_clipping"] == 1.0
