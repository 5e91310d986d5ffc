"""The whole trainer, growing, in forked ranks: what it logs, when it grows, and that layouts do not matter."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import megabus
from megabus.config import resolve_stages
from megabus.data.batches import TokenSource
from megabus.errors import UserError
from megabus.preflight.software import check_kernels
from megabus.testing.ranks import run_ranks
from tests.support.small_runs import VOCAB, quick_config, refusal, rows_of, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _train(config):
    from megabus.train.loop import train

    return str(train(config).checkpoint)


WIDE = [
    ([{"d_model": 8200}], "growth.stages.0.d_model = 8200: makes rows of 8200, padded to 16384, exceed 8192, the most"),
    ([{"n_layers": 4}, {"n_heads": 33}], "growth.stages.1.n_heads = 33: makes rows of 33 x 130, padded to 16384, "),
]


@pytest.mark.parametrize(("growths", "line"), WIDE)
def test_kernels_that_cannot_hold_a_later_stage_are_refused_before_the_first(corpus, tmp_path, growths, line):
    stages = [growth | {"max_tokens": 1024} for growth in growths[:-1]] + growths[-1:]
    growth = {"max_tokens": 64, "trigger": {"predictor": "constant", "constant": 1.5}, "stages": stages}
    train = {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "max_tokens": 4000, "kernels": "triton"}
    config = quick_config(corpus, tmp_path / "run", LAYOUTS["one"], growth=growth, train=train, model__head_dim=130)
    told = refusal(config, 1)
    assert told.startswith(line)
    assert told.endswith("that train.kernels = triton holds; set train.kernels to compiled or eager")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("n_heads", "refused"), [(64, False), (66, True)])
def test_kernels_see_a_rank_s_heads(corpus, tmp_path, n_heads, refused):
    model = {"n_heads": n_heads, "head_dim": 130, "d_model": 64, "n_layers": 2, "d_ff": 64, "vocab_size": VOCAB}
    layout = {"tp": 2, "pp": 1}
    config = quick_config(corpus, tmp_path, [layout] * 3, model=model, growth={}, train__kernels="triton")
    expected = pytest.raises(UserError, match="33 x 130") if refused else nullcontext()
    with expected:
        check_kernels(config, resolve_stages(config, 2))


LAYOUTS = {
    "one": [{"tp": 1, "pp": 1}] * 3,
    "four": [{"tp": 2, "pp": 2}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 4}],
}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """The same growing run on one rank, and on four that are laid out anew at each growth."""
    configs = {}
    for name, layouts in LAYOUTS.items():
        configs[name] = quick_config(corpus, tmp_path_factory.mktemp("runs") / name, layouts)
        run_ranks(1 if name == "one" else 4, _train, configs[name])
    return configs


def test_growth_by_cap_keeps_the_loss(runs):
    for config in runs.values():
        growths = rows_of(config, "growth")
        assert [(g["from_stage"], g["to_stage"], g["reason"]) for g in growths] == [(0, 1, "cap"), (1, 2, "cap")]
        assert all(abs(g["loss_before"] - g["loss_after"]) <= 1e-6 for g in growths)
        assert all(g["unit_error"] <= 1e-6 for g in growths)
        assert [g["tokens"] for g in growths] == [1024, 2048]


def test_masters_stay_unit_at_every_step(runs):
    for config in runs.values():
        steps = rows_of(config, "step")
        assert len(steps) == 8 + 8 + math.ceil((4000 - 2048) / 256)
        assert max(row["unit_error"] for row in steps) <= 1e-6


def test_a_growing_run_does_not_depend_on_the_layout(runs):
    """Losses, tokens and learning rates agree step by step through both growths, and so does the final model."""
    one, four = (rows_of(runs[name], "step") for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert (a["step"], a["tokens"], a["stage"], a["lr"]) == (b["step"], b["tokens"], b["stage"], b["lr"])
        assert abs(a["loss"] - b["loss"]) <= 1e-5
    models = [megabus.load(f"{runs[name].run_dir}") for name in ("one", "four")]
    tokens = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    assert (models[0](tokens) - models[1](tokens)).abs().max() <= 1e-3
    assert one[-1]["loss"] < one[0]["loss"] - 0.2  # it learned


def test_the_checkpoint_is_the_model_that_was_validated(runs, corpus):
    """`megabus.load` gives, in one plain process, the last validation loss that the run logged."""
    config = runs["four"]
    model = megabus.load(f"{config.run_dir}")
    assert (model.config.d_model, model.config.n_layers, model.config.n_heads) == (52, 5, 3)
    source = TokenSource([(str(corpus / "valid"), 1.0)], 32, 0, VOCAB)
    logged = rows_of(config, "eval")[-1]["loss"]
    inputs, targets = source.batch(0, 32, range(4))  # 128 tokens
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert abs(float(loss) - logged) <= 1e-5


def test_kappa_triggers_where_its_formula_says(corpus, tmp_path):
    """With a known mp, the first median of three at or below mp + (1 - kappa)(start - mp) grows, and no earlier one."""
    trigger = {"predictor": "constant", "constant": 3.0, "kappa": 0.6, "min_evals": 1}
    changes = {"growth__trigger": trigger, "growth__max_tokens": None, "train__max_tokens": 6000}
    config = quick_config(corpus, tmp_path / "kappa", LAYOUTS["four"], **changes)
    run_ranks(4, _train, config)
    evals = [row for row in rows_of(config, "eval") if row["stage"] == 0]
    losses = [row["loss"] for row in evals]
    target = 3.0 + 0.4 * (sorted(losses[:3])[1] - 3.0)
    first = next(i for i in range(2, len(losses)) if sorted(losses[i - 2 : i + 1])[1] <= target)
    assert first == len(evals) - 1 > 1
    growth = rows_of(config, "growth")[0]
    assert (growth["reason"], growth["step"]) == ("kappa", evals[-1]["step"])
    assert evals[-1]["kappa_progress"] >= 0.6 > evals[-2]["kappa_progress"]


@pytest.mark.parametrize(("decay", "reasons"), [(0.2, ["kappa", "kappa"]), (0.9, ["cap", "cap"])])
def test_caps_alone_grow_where_the_rate_falls(corpus, tmp_path, decay, reasons):
    """Though κ has been met long before: a cap that is reached then must not be passed over."""
    trigger = {"predictor": "constant", "constant": 1.0, "kappa": 0.1, "min_evals": 6}
    changes = {"growth__trigger": trigger, "optimizer__decay_share": decay, "train__max_tokens": 6000, "eval__every": 1}
    config = quick_config(corpus, tmp_path / "run", LAYOUTS["one"], **changes)
    run_ranks(1, _train, config)
    growths = rows_of(config, "growth")
    assert [growth["reason"] for growth in growths] == reasons
    met = [row["step"] for row in rows_of(config, "eval") if row["stage"] == 0 and row["kappa_met"] > 0]
    if decay > 0.5:
        assert len(met) > 3
        assert [growth["tokens"] for growth in growths] == [1024, 2048]
    else:
        assert growths[0]["tokens"] < 1024


def _nan_job(config):
    """A weight that turns to NaN on one rank for good: all ranks must stop at the same step, with the same error."""
    from megabus.engine.engine import Engine
    from megabus.errors import UserError
    from megabus.train.loop import train

    step = Engine.train_step

    def poisoned(self, batches, lr):
        if self.mesh.rank == 1:
            with torch.no_grad():
                next(self.module.parameters()).fill_(float("nan"))
        return step(self, batches, lr)

    Engine.train_step = poisoned
    with pytest.raises(UserError) as caught:
        train(config)
    dist.barrier()
    return str(caught.value)


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 1}], ids=str)
def test_a_nan_on_one_rank_stops_all(corpus, tmp_path, layout):
    config = quick_config(corpus, tmp_path / "nan", [layout, {"tp": 1}, {"tp": 1}])
    messages = run_ranks(2, _nan_job, config)
    assert messages[0] == messages[1]
    told = "train.loss = nan: is not finite at step 4, the last of 4 such steps in a row, and there is no checkpoint to"
    assert messages[0].startswith(told)
    assert [row["step"] for row in rows_of(config, "skip")] == [1, 2, 3, 4]
    assert not rows_of(config, "step")
    assert not (tmp_path / "nan/checkpoints").exists()


def _meets_bad_token(config, bad_rank):
    """One rank's corpus holds a token that the vocabulary does not; there is no sidecar to warn of it."""
    from megabus.data.batches import TokenSource
    from megabus.errors import UserError
    from megabus.train.loop import train

    if dist.get_rank() == bad_rank:
        true_batch = TokenSource.batch

        def batch(self, consumed_tokens, seq_len, rows):
            if consumed_tokens >= 256:
                raise UserError("data", "corpus", "token 7 has id 99, outside [0, 67)", "retokenize")
            return true_batch(self, consumed_tokens, seq_len, rows)

        TokenSource.batch = batch
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 1}], ids=str)
def test_a_bad_token_on_one_rank_is_told_by_all(corpus, tmp_path, layout, bad_rank):
    """Not a hang, not a wrong loss, whichever pipeline rank or replica reads it: every rank names the token."""
    config = quick_config(corpus, tmp_path / "bad", [layout, {"tp": 1}, {"tp": 1}])
    messages = run_ranks(2, _meets_bad_token, config, bad_rank)
    assert messages[0] == messages[1] == "data = corpus: token 7 has id 99, outside [0, 67); retokenize"
    assert len(rows_of(config, "step")) == 2


def test_a_missing_tokenizer_is_told_at_the_start(corpus, tmp_path):
    changes = {"data__tokenizer": str(tmp_path / "no.model")}
    config = quick_config(corpus, tmp_path / "run", [{"tp": 1}] * 3, **changes)
    with pytest.raises(RuntimeError, match=r"data\.tokenizer = .*no\.model: the file does not exist"):
        run_ranks(1, _train, config)
    assert not (tmp_path / "run").exists()


def test_ranks_agree_on_bad_data(corpus, tmp_path):
    """A corpus that only one rank cannot read stops both, with its message."""
    config = quick_config(corpus, tmp_path / "bad", [{"tp": 1}] * 3)
    messages = run_ranks(2, _hides_corpus, config)
    assert messages[0] == messages[1]
    assert "missing" in messages[0]


def _hides_corpus(config):
    from megabus.errors import UserError
    from megabus.train.loop import train

    if dist.get_rank() == 1:
        corpora = [corpus.model_copy(update={"path": corpus.path + "-missing"}) for corpus in config.data.train]
        data = config.data.model_copy(update={"train": corpora})
        config = config.model_copy(update={"data": data})
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)
