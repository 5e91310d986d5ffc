"""Runs that begin with no layer at all, the head on the embedding, and grow by fresh ones (arXiv 2511.04981)."""

from __future__ import annotations

import pytest
import torch

import megabus
from benchmarks.memory_of_ranks import measure, memory_training
from megabus.config import GrowthConfig, Layout, resolve_stages
from megabus.estimate.devices import device
from megabus.estimate.whole_run import estimate_run, tables
from megabus.model.cost import flops_per_token
from megabus.testing.ranks import run_ranks
from tests.support.command import run_command
from tests.support.small_models import config as model_config
from tests.support.small_runs import VOCAB, refusal, rows_of, run_config, start, write_corpus
from tests.support.trainings import run_of

LAYOUTS = {"one": [{}, {}, {}], "two": [{"tp": 2}, {"pp": 2}, {"dp": 2}]}
STAGES = [{"n_layers": 2, "max_tokens": 512}, {"d_model": 52, "n_layers": 3}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, layouts, **changes):
    stages = [sizes | {"layout": layout} for sizes, layout in zip(STAGES, layouts[1:], strict=True)]
    small = {"model__n_layers": 0, "growth__max_tokens": 512, "train__max_tokens": 1536, "train__micro_batch_size": 4}
    return run_config(
        corpus, run_dir, layouts, **small, **{"growth__depth": "fresh", "growth__stages": stages} | changes
    )


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    made = {}
    for name, layouts in LAYOUTS.items():
        made[name] = configured(
            corpus, tmp_path_factory.mktemp("runs") / name, layouts, checkpoint={"every": 3, "keep_last": 9}
        )
        start(made[name], 1 if name == "one" else 2)
    return made


def test_a_run_from_no_layers_does_not_depend_on_the_layout(runs):
    one, two = (rows_of(runs[name], "step") for name in LAYOUTS)
    assert [row["stage"] for row in one] == [0] * 4 + [1] * 4 + [2] * 4
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5
        assert max(a["unit_error"], b["unit_error"]) <= 1e-6
    for a, b in zip(*(rows_of(runs[name], "growth") for name in LAYOUTS), strict=True):
        assert abs(a["loss_after"] - b["loss_after"]) <= 1e-5
        assert 1e-6 < abs(a["loss_before"] - a["loss_after"]) < 0.5  # loud, and little
    final = megabus.load(str(runs["two"].run_dir))
    assert final.config.n_layers == 3


def test_what_a_model_of_no_layers_can_be_asked(runs, tmp_path):
    config = runs["one"]
    first = f"{config.run_dir}/checkpoints/step-00000003"
    model = megabus.load(first)
    assert model.config.n_layers == 0
    with torch.no_grad():  # a table of the next token's odds, whatever came before
        logits = model(torch.arange(VOCAB)[None])[0]
        table = model.embed.weight @ model.output.head.weight.T * model.output.s_z * 36**0.5
    assert torch.allclose(logits, table, atol=1e-6)
    told = run_command("layers", first)
    assert told.returncode != 0
    assert "has no layers" in told.stderr
    done = run_command("convert", first, tmp_path / "hf", "--to", "hf")
    assert done.returncode != 0
    assert "n_layers = 0" in done.stderr
    assert not (tmp_path / "hf").exists()


def test_rates_transfer_to_a_run_from_no_layers(corpus, tmp_path):
    """The first stage has no alpha that could follow the depth; those that layers bring later follow it."""
    tuned = {"d_model": 36, "n_layers": 6, "steps": 12}
    config = configured(corpus, tmp_path / "run", LAYOUTS["one"], optimizer__transfer=tuned)
    alphas = [stage.model.alpha_init for stage in resolve_stages(config, 1)]
    assert alphas == pytest.approx([0.05, 0.15, 0.1])
    (rank,) = start(config, 1)
    assert [step.stage for step in rank.steps] == [0] * 4 + [1] * 4 + [2] * 4


def test_layers_of_a_model_that_has_none_cannot_be_copied(corpus, tmp_path):
    told = refusal(configured(corpus, tmp_path / "run", LAYOUTS["one"], growth__depth="append"), 1)
    assert told == (
        "growth.stages.0.n_layers = 2: cannot come from growth.depth = append: there is no layer to copy; "
        "set growth.depth to fresh"
    )


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_memory_and_time_of_no_layers(kind):
    training = memory_training(kind, Layout(1, 1, 1), model={"n_layers": 0})
    config = run_of(training)
    (stage,) = resolve_stages(config, 1)
    (one,) = estimate_run(config, [stage], device("cpu"), 1, 0.0)
    (found,) = run_ranks(1, measure, training)
    assert one.memory[0].total == pytest.approx(found.total, rel=0.1)
    assert one.time.model_flops == flops_per_token(stage.model, 62) * stage.tokens_per_step
    assert "L0 " in tables([one], device("cpu"))


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_whole_states_grow_from_none(kind):
    old, new = model_config(kind, n_layers=0), model_config(kind, n_layers=2)
    state = megabus.build_model(old, 3).state_dict()
    grown = megabus.grow_state(state, old, new, 3, GrowthConfig(depth="fresh"))
    begun = megabus.build_model(new, 3).state_dict()
    assert all(torch.equal(grown[name], value) for name, value in begun.items())
