"""What may change between two starts of a run: freely, told, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megabus.checkpoint.contents import Found
from megabus.checkpoint.state import read_state
from megabus.config import load_config, parse_config, resolve_stages
from megabus.config import stages as config_stages
from megabus.config.section import in_line
from megabus.data.indexed import meta_path
from megabus.data.sources import open_sources
from megabus.errors import UserError
from megabus.train.resume import check_continues, check_tokenizer, data_order
from tests.support.launching import tree
from tests.support.small_runs import (
    VOCAB,
    read_tokens,
    refusal,
    rows_of,
    run_config,
    start,
    stop_after,
    write_corpus,
    write_tokens,
)

SAVED = (2, 5)  # steps of the checkpoints, in the first stage and in the second
NEXT = {"d_model": 52, "n_heads": 4, "d_ff": 90, "max_tokens": 512}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    for name in ("train", "valid"):
        meta = {"vocab_size": VOCAB, "tokenizer_sha256": "0" * 64, "n_tokens": len(read_tokens(folder / name))}
        meta_path(folder / name).write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """Runs stopped in their first and their second stage: step -> run_dir."""
    folders = {step: tmp_path_factory.mktemp("stopped") / "run" for step in SAVED}
    for step, folder in folders.items():
        config = run_config(
            corpus, folder, [{"tp": 1}] * 3, growth__max_tokens=512, growth__stages=[NEXT, {"n_layers": 5}]
        )
        start(config, 1, stop_after(step))
    return folders


def continued(run_dir, *overrides, world=1):
    """The lines that tell of changes, where the run in `run_dir` goes on with these overrides."""
    folder = max((run_dir / "checkpoints").glob("step-*"))
    config = load_config(run_dir / "config.yaml", overrides)
    stages = resolve_stages(config, world)
    found = Found(folder, read_state(folder), [])
    sources = open_sources(config, stages)
    check_tokenizer(found, sources)
    return check_continues(found, config, stages, data_order(sources))


def refused(run_dir, *overrides):
    with pytest.raises(UserError) as caught:
        continued(run_dir, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what makes it another model: refused -------------------------------------------------------------------

# An override, the value that is refused, and the one that was saved, in the first and the second stage.
SHAPES = [
    ("kind=gpt", "kind", "gpt", "ngpt"),
    ("d_model=40", "d_model", 40, 36),
    ("n_layers=2", "n_layers", 2, 3),
    ("n_heads=1", "n_heads", 1, 2),
    ("n_kv_heads=1", "n_kv_heads", 1, 2),
    ("head_dim=8", "head_dim", 8, 6),
    ("d_ff=60", "d_ff", 60, 62),
    ("rope_theta=500", "rope_theta", 500.0, 10000.0),
    ("alpha_init=0.1", "alpha_init", 0.1, 0.05),
    ("s_z_init=2", "s_z_init", 2.0, 1.0),
    ("norm_eps=1e-6", "norm_eps", 1e-06, 1e-05),
]


@pytest.mark.parametrize("resume", ["auto", "strict"])
@pytest.mark.parametrize(("override", "key", "value", "was"), SHAPES, ids=[shape[1] for shape in SHAPES])
def test_the_shape_of_the_present_stage_must_stay(stopped, override, key, value, was, resume):
    folder = stopped[2] / "checkpoints/step-00000002"
    line = refused(stopped[2], f"model.{override}", f"resume={resume}")
    assert line == f"model.{key} = {value}: is {was} in {folder}; set it back, or choose another run_dir"


def test_what_follows_from_transfer_must_stay(stopped):
    """The file says 0.05 before and after, so the line names what 0.1 comes from."""
    told = "; set it back, or choose another run_dir"
    for steps, stage in ((2, "00000002"), (5, "00000005")):
        line = refused(stopped[steps], "optimizer.transfer={d_model: 36, n_layers: 6, steps: 9}")
        where = f"{stopped[steps]}/checkpoints/step-{stage}"
        assert line == (
            f"optimizer.transfer = {{d_model: 36, n_layers: 6, steps: 9}}: was null in {where}, "
            f"and alpha_init follows from it{told}"
        )
    line = refused(stopped[5], "model.alpha_init=0.1")
    assert line == f"model.alpha_init = 0.1: is 0.05 in {where}{told}"


@pytest.mark.parametrize(("key", "value"), [("d_model", 50), ("n_heads", 2), ("d_ff", 91), ("n_layers", 4)])
def test_the_shape_of_a_grown_stage_must_stay(stopped, key, value):
    folder = stopped[5] / "checkpoints/step-00000005"
    was = NEXT.get(key, 3)
    line = refused(stopped[5], f"growth.stages.0.{key}={value}")
    told = f"growth.stages.0.{key} = {value}: is {was} in {folder}; set it back, or choose another run_dir"
    assert line == told
    assert continued(stopped[5], f"growth.stages.0.{key}={was}", "growth.stages.1.n_layers=5") is not None


def test_the_growths_that_were_made_must_stay(stopped):
    line = refused(stopped[5], "growth.stages=[]", "growth.max_tokens=null")
    assert line == (
        "growth.stages = 0: has 0 growths, step-00000005 comes after growth 1; keep the growths that were made"
    )


def test_keys_that_have_come_since_change_nothing(stopped, tmp_path):
    """Neither in the model's section nor elsewhere: a run of an older version goes on under `strict`."""
    run = shutil.copytree(stopped[2], tmp_path / "run")
    path = next(run.glob("checkpoints/step-*/state.json"))
    tree = json.loads(path.read_text())
    for section, key in (("model", "qkv_bias"), ("model", "tie_embeddings"), ("train", "sequence_parallel")):
        del tree["config"][section][key]
    del tree["model"]["qkv_bias"]
    path.write_text(json.dumps(tree))
    assert continued(run, "resume=strict") == []
    assert continued(run, "train.sequence_parallel=true", "layout.tp=2", world=2) == []


# ---- what changes the mathematics of what is to come: told, and refused by `strict` -------------------------

TOLD = [
    ("optimizer.lr=0.02", "optimizer.lr", "0.01", "0.02"),
    ("optimizer.beta2=0.9", "optimizer.beta2", "0.95", "0.9"),
    ("train.seed=1", "train.seed", "0", "1"),
    ("train.max_tokens=8000", "train.max_tokens", "4000", "8000"),
    ("train.max_steps=50", "train.max_steps", "null", "50"),
    ("train.global_batch_size=16", "train.global_batch_size", "8", "16"),
    ("train.seq_len=8", "train.seq_len", "16", "8"),
    ("train.precision=bf16", "train.precision", "fp32", "bf16"),
    ("train.zero_stage=2", "train.zero_stage", "1", "2"),
    ("train.gradient_clipping=0", "train.gradient_clipping", "1.0", "0.0"),
    ("eval.every=5", "eval.every", "4", "5"),
    ("growth.moments=reset", "growth.moments", "grow", "reset"),
    ("growth.read=clone", "growth.read", "tilt", "clone"),
    ("growth.max_tokens=640", "growth.max_tokens", "512", "640"),
    ("growth.trigger.predictor=scaling_law", "growth.trigger.predictor", "constant", "scaling_law"),
    ("growth.trigger.constant=[3,2,1]", "growth.trigger.constant", "1.5", "[3.0, 2.0, 1.0]"),
    ("growth.trigger.scaling_law.E=2", "growth.trigger.scaling_law.E", "1.69", "2.0"),
    ("growth.stages.0.kappa=0.5", "growth.stages.0.kappa", "null", "0.5"),
    ("growth.stages.1.n_layers=6", "growth.stages.1.n_layers", "5", "6"),
    ("model.init_std=0.1", "model.init_std", "0.02", "0.1"),
]


@pytest.mark.parametrize(("override", "key", "was", "value"), TOLD, ids=[case[1] for case in TOLD])
def test_what_changes_the_mathematics_is_told(stopped, override, key, was, value):
    first, *more = continued(stopped[2], override)
    assert first == f"{key}: {was} -> {value}"
    assert all(line.startswith("contents of data: ") for line in more)
    assert bool(more) == (key == "train.seq_len")  # without a longer stage, samples are cut elsewhere
    strict = refused(stopped[2], override, "resume=strict")
    folder = stopped[2] / "checkpoints/step-00000002"
    assert strict == f"{key} = {value}: was {was} in {folder}; set it back, or resume=auto"


def test_every_change_is_told(stopped):
    lines = continued(stopped[2], "optimizer.lr=0.02", "train.seed=1", "growth.stages.0.lr=1e-3")
    assert sorted(lines) == ["growth.stages.0.lr: null -> 0.001", "optimizer.lr: 0.01 -> 0.02", "train.seed: 0 -> 1"]


def test_growths_may_be_added_and_dropped(stopped):
    more = "[{d_model: 52, n_heads: 4, d_ff: 90, max_tokens: 512}, {n_layers: 5, max_tokens: 512}, {n_layers: 6}]"
    (line,) = continued(stopped[5], f"growth.stages={more}")
    assert line.startswith("growth.stages: [")
    (line,) = continued(stopped[5], "growth.stages=[{d_model: 52, n_heads: 4, d_ff: 90}]")
    assert line.startswith("growth.stages: [")
    assert refused(stopped[5], f"growth.stages={more}", "resume=strict").startswith("growth.stages = [{")


# ---- data: the contents count, not the paths ------------------------------------------------------------------


def test_moved_data_is_the_same_data(stopped, corpus, tmp_path):
    for name in ("train", "valid"):
        for file in corpus.glob(f"{name}.*"):
            shutil.copy(file, tmp_path)
    moved = [f"data.train={tmp_path / 'train'}", f"data.valid={tmp_path / 'valid'}", "resume=strict"]
    assert continued(stopped[2], *moved) == []


def test_other_data_is_told(stopped, corpus, tmp_path):
    """Longer, or blended anew; but not made with another tokenizer."""
    longer = write_tokens(tmp_path / "longer", [*read_tokens(corpus / "train"), 0, 1, 2])
    meta = {"vocab_size": VOCAB, "tokenizer_sha256": "0" * 64, "n_tokens": 20_004}
    meta_path(longer).write_text(json.dumps(meta))
    line = "contents of data: train.tokens.0: 20001 -> 20004"
    assert continued(stopped[2], f"data.train={longer}") == [line]
    assert refused(stopped[2], f"data.train={longer}", "resume=strict").startswith(
        "contents of data: train.tokens.0 = 20004: was 20001 in "
    )
    assert [line.split(":")[1] for line in continued(stopped[2], f"data.valid={longer}")] == [" valid.tokens.0"]
    blend = f"data.train=[{{path: {corpus / 'train'}}}, {{path: {corpus / 'valid'}, weight: 2}}]"
    lines = continued(stopped[2], blend)
    assert [line.split(":")[1] for line in lines] == [" train.tokens", " train.blend"]
    reweighted = blend.replace("weight: 2", "weight: 3")
    assert continued(stopped[2], reweighted)[1] != lines[1]
    for name in ("train", "valid"):
        shutil.copy(corpus / f"{name}.bin", tmp_path)
        shutil.copy(corpus / f"{name}.idx", tmp_path)
        meta = json.loads(meta_path(corpus / name).read_text())
        changed = meta | {"tokenizer_sha256": "1" * 64, "tokenizer": "other.json"}
        meta_path(tmp_path / name).write_text(json.dumps(changed))
    told = refused(stopped[2], f"data.train={tmp_path / 'train'}", f"data.valid={tmp_path / 'valid'}")
    name = f"{tmp_path / 'train'} (made with other.json)"
    assert told.startswith(f"data = {name}: belongs to another tokenizer than the weights of {stopped[2]}")


def test_other_validation_tokens_are_told(stopped):
    lines = continued(stopped[2], "eval.tokens=512")
    assert lines == ["eval.tokens: 256 -> 512", "contents of data: valid_tokens: 256 -> 512"]


# ---- what is free ---------------------------------------------------------------------------------------------

FREE = [
    (["layout.tp=2", "growth.stages.0.layout.pp=2"], 2),
    (["layout.dp=2", "train.micro_batch_size=4"], 2),
    (["train.micro_batch_size=8", "growth.stages.0.micro_batch_size=1"], 1),
    (["train.recompute=true", "growth.buffer_mb=1", "train.deterministic=true"], 1),
    (["train.sequence_parallel=true", "layout.tp=2"], 2),
    (["log.every=1", "log.unit_norm_every=7", "log.tensorboard=true", "log.peak_tflops=1"], 1),
    (["checkpoint.every=1", "checkpoint.keep_last=9", "checkpoint.asynchronous=false"], 1),
    (["faults.max_skips=0", "faults.hang_timeout=9", "faults.stop_exit_code=3"], 1),
    (["run_dir=elsewhere"], 1),
]


@pytest.mark.parametrize(("overrides", "world"), FREE, ids=[case[0][0] for case in FREE])
@pytest.mark.parametrize("step", SAVED)
def test_where_and_how_it_computes_is_free(stopped, step, overrides, world):
    assert continued(stopped[step], *overrides, "resume=strict", world=world) == []
    assert refused(stopped[step], *overrides, "optimizer.lr=1", "resume=strict")  # control


IDLE = [  # what is saved with no effect, and what the file says instead
    ({"optimizer": {"schedule": "cosine", "decay": "log", "decay_rho": 0.5}}, ["optimizer.schedule=cosine"]),
    ({"optimizer": {"decay_share": 0.0, "decay": "log"}}, ["optimizer.decay_share=0"]),
    (
        {"optimizer": {"schedule": "log", "warmup_share": 1.0}},
        ["optimizer.schedule=constant", "optimizer.warmup_share=1"],
    ),
    (
        {
            "growth": {"trigger": {"rule": "marginal", "predictor": "fit", "constant": None, "kappa": 0.5}},
            "train": {"max_flops": 1e12},
        },
        ["growth.trigger={rule: marginal}", "train.max_flops=1e12"],
    ),
]


@pytest.mark.parametrize(("saved", "overrides"), IDLE, ids=["decay", "no fall", "warm-up", "marginal"])
def test_what_had_no_effect_is_free_to_go(stopped, tmp_path, saved, overrides):
    """A start refuses such a key, so that a run that was saved with one cannot keep it."""
    run = shutil.copytree(stopped[2], tmp_path / "run")
    path = next(run.glob("checkpoints/step-*/state.json"))
    state = json.loads(path.read_text())
    for section, keys in saved.items():
        for key, value in keys.items():
            said = state["config"][section]
            said[key] = said[key] | value if isinstance(value, dict) else value
    if "growth" in saved:
        state["config"]["growth"]["stages"][0]["kappa"] = 0.5
    path.write_text(json.dumps(state))
    with pytest.raises(UserError):
        resolve_stages(parse_config(state["config"]), 1)
    assert continued(run, *overrides, "resume=strict") == []
    assert refused(run, *overrides, "optimizer.lr=0.02", "resume=strict").startswith("optimizer.lr = 0.02: was 0.01")


def test_rates_that_a_saved_configuration_does_not_tell(stopped, tmp_path):
    """Its values may lie out of today's ranges, and the file has been mended."""
    run = shutil.copytree(stopped[2], tmp_path / "run")
    path = next(run.glob("checkpoints/step-*/state.json"))
    state = json.loads(path.read_text())
    transfer = {"d_model": 36, "n_layers": 3, "steps": 50}
    state["config"]["optimizer"] |= {"transfer": transfer, "warmup_share": 2.0}
    path.write_text(json.dumps(state))
    *_, line = continued(run, f"optimizer.transfer={in_line(transfer)}")
    assert line.startswith("all learning rates: ")
    assert "what they were is unknown (config of" in line
    assert "optimizer.warmup_share = 2.0" in line


# ---- whole starts -----------------------------------------------------------------------------------------------


def goes_on(run_dir, tmp_path, *overrides):
    """A copy of a stopped run, and its configuration with the overrides."""
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    return copied, load_config(copied / "config.yaml", [f"run_dir={copied}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["resume=never"], "run_dir = {run}: holds a run; choose another, or resume=auto"),
        (
            ["model.d_ff=60"],
            "model.d_ff = 60: is 62 in {run}/checkpoints/step-00000002; set it back, or choose another",
        ),
        (
            ["resume=strict", "train.seed=5"],
            "train.seed = 5: was 0 in {run}/checkpoints/step-00000002; set it back, or",
        ),
    ],
    ids=["never", "shape", "strict"],
)
def test_a_refused_start_leaves_the_run_as_it_is(stopped, tmp_path, overrides, told):
    run, config = goes_on(stopped[2], tmp_path, *overrides)
    before = tree(tmp_path)
    assert refusal(config, 2).startswith(told.format(run=run))
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"run/.lock"}


def test_a_changed_configuration_is_told_and_written_down(stopped, tmp_path):
    """The old file is set aside; the new one is what the run goes on with. Unchanged, it stays."""
    run, config = goes_on(stopped[2], tmp_path, "optimizer.lr=0.02", "train.seed=1")
    old = (run / "config.yaml").read_text()
    (rank,) = start(config, 1, stop_after(3))
    assert rank.numbers == [3]
    changes = ["train.seed: 0 -> 1", "optimizer.lr: 0.01 -> 0.02"]
    assert [(row["reason"], row["changes"]) for row in rows_of(config, "resume")] == [("start", changes)]
    assert (run / "config-1.yaml").read_text() == old
    assert load_config(run / "config.yaml") == config
    assert rows_of(config, "step")[-1]["lr"] == 0.02
    start(config, 1, stop_after(4))
    assert rows_of(config, "resume")[-1]["changes"] == []
    assert sorted(path.name for path in run.glob("config*")) == ["config-1.yaml", "config.yaml"]


@pytest.mark.parametrize(
    ("overrides", "step", "reason"),
    [
        (["growth.max_tokens=384"], 3, "cap"),
        (
            [
                "growth.trigger={predictor: constant, constant: 1.5, kappa: 0.01, min_evals: 2}",
                "eval.every=1",
                "growth.max_tokens=768",
            ],
            5,
            "kappa",
        ),
        (["growth.max_tokens=768"], 6, "cap"),
        ([], 4, "cap"),
    ],
    ids=["cap lower", "kappa lower", "cap higher", "control"],
)
def test_another_trigger_takes_effect(stopped, tmp_path, overrides, step, reason):
    """Also on the stage that the run is in: its monitor goes on with what it saw and what it is told now."""
    _, config = goes_on(stopped[2], tmp_path, *overrides)
    start(config, 1, stop_after(7))
    first = rows_of(config, "growth")[0]
    assert (first["step"], first["reason"]) == (step, reason)


def test_another_size_to_grow_to(stopped, tmp_path):
    run, config = goes_on(stopped[2], tmp_path, "growth.stages.0.d_model=60")
    start(config, 1, stop_after(5))
    assert rows_of(config, "growth")[0]["new"]["d_model"] == 60
    assert json.loads((run / "checkpoints/step-00000005/state.json").read_text())["model"]["d_model"] == 60
    assert Path(run / "checkpoints/latest").read_text().startswith("step-00000005 ")


# ---- a growth that changes nothing, as an older version let it through ---------------------------------------


def allowing(*_):
    """As the version did that did not look."""
    config_stages._changes_nothing = lambda *_: False


def test_a_growth_that_changes_nothing_stays_where_a_run_has_it(corpus, tmp_path):
    """Still to come, or made: to take it out would be a change, or undo it. A new run is refused."""
    step, stages = 2, [{"max_tokens": 512}, {"n_layers": 5}]
    config = run_config(corpus, tmp_path / "run", [{}] * 3, growth__max_tokens=384, growth__stages=stages)
    told = "growth.stages.0 = {max_tokens: 512}: changes nothing of the stage before, the first; give it a larger size"
    assert refusal(config, 1).startswith(told)
    start(config, 1, allowing, stop_after(step))
    for changes in ({"train.seed": 5}, {"resume": "strict"}):
        again = load_config(tmp_path / "run/config.yaml", [f"{key}={value}" for key, value in changes.items()])
        (rank,) = start(again, 1, stop_after(step + 1))
        assert rank.numbers == [step + 1]
        step += 1
    for changes in (["growth.stages.0.max_tokens=640"], ["run_dir=" + str(tmp_path / "new")], ["resume=never"]):
        assert "changes nothing of" in refusal(load_config(tmp_path / "run/config.yaml", changes), 1)
    (tmp_path / f"run/checkpoints/step-{step:08d}/state.json").write_text("[" * 99)
    assert refusal(again, 1).startswith(told)
