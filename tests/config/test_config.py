"""What a YAML file may say: types, checks across keys, stages, and what follows from them alone."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import pytest
import yaml

from megabus.config import RunConfig, load_config, parse_config, resolve_stages
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from tests.support.tiny_config import BASE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


def refusal(base: Path, *overrides: str, world: int = 1) -> str:
    """The one line with which these overrides of BASE are refused."""
    with pytest.raises(UserError) as caught:
        resolve_stages(load_config(base, overrides), world)
    assert caught.value.remedy
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- the file and its overrides ----------------------------------------------------------------------------


def test_a_file_becomes_typed(base: Path) -> None:
    config = load_config(base)
    assert config.optimizer.lr == 0.01  # YAML alone reads 1e-2 as a string
    assert config.growth.max_tokens == 2000
    assert isinstance(config.growth.max_tokens, int)
    assert config.data.train_corpora == [(["a"], 1.0)]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_tokens=2e6", 2_000_000),
        ("train.max_tokens=1.5e3", 1500),
        ("train.max_tokens=null", None),
        ("growth.stages.0.d_model=96", 96),
        ("growth.stages.1.layout.tp=2", 2),
        ("growth.trigger.kappa=1", 1.0),
        ("growth.trigger.constant=[2.5, 2]", [2.5, 2.0]),
        ("data.train.1.weight=3", 3.0),
        ("log.tensorboard=yes", True),
        ("run_dir=runs/a=b", "runs/a=b"),
        ("data.tokenizer=m:odel", "m:odel"),
    ],
)
def test_overrides(base: Path, override: str, value: object) -> None:
    config = load_config(base, ["data.train=[{path: a}, {path: b, weight: 2}]", override])
    node: object = config
    for part in override.split("=")[0].split("."):
        node = node[int(part)] if isinstance(node, list) else getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_later_overrides_win_and_the_file_stays(base: Path) -> None:
    assert load_config(base, ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert base.read_text() == BASE
    with pytest.raises(ValueError, match="frozen"):
        load_config(base).train.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("modle.d_model=3", "modle", "model"),
        ("model.d_modle=3", "model.d_modle", "d_model"),
        ("model.vocab=3", "model.vocab", "vocab_size"),
        ("growth.triger.kappa=1", "growth.triger", "trigger"),
        ("growth.trigger.kapa=1", "growth.trigger.kapa", "kappa"),
        ("growth.trigger.scaling_law.gamma=1", "growth.trigger.scaling_law.gamma", None),
        ("growth.stages.0.d_modle=96", "growth.stages.0.d_modle", "d_model"),
        ("growth.stages.1.layout.dp_=2", "growth.stages.1.layout.dp_", "dp"),
        ("data.train=[{path: a}, {path: b, wieght: 2}]", "data.train.1.wieght", "weight"),
        ("eval.zzz=1", "eval.zzz", None),
    ],
)
def test_unknown_keys(base: Path, override: str, key: str, meant: str | None) -> None:
    text = refusal(base, override)
    assert text.startswith(f"{key} = ")
    assert "unknown key" in text
    assert (f"did you mean {meant}?" if meant else "known keys here: ") in text


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.seq_len=long", "train.seq_len", "long"),
        ("train.seq_len=2.5", "train.seq_len", "2.5"),
        ("train.seq_len=0", "train.seq_len", "0"),
        ("train.seq_len=-4", "train.seq_len", "-4"),
        ("train.seq_len=yes", "train.seq_len", "True"),
        ("train.seq_len=null", "train.seq_len", "None"),
        ("train.max_tokens=inf", "train.max_tokens", "inf"),
        ("train.seed=-1", "train.seed", "-1"),
        ("train.precision=fp8", "train.precision", "fp8"),
        ("train.recompute=maybe", "train.recompute", "maybe"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan"),
        ("optimizer.lr=on", "optimizer.lr", "True"),
        ("optimizer.lr=0", "optimizer.lr", "0"),
        ("optimizer.beta2=1.5", "optimizer.beta2", "1.5"),
        ("optimizer.gate=0", "optimizer.gate", "0"),
        ("optimizer.gate=2.1", "optimizer.gate", "2.1"),
        ("optimizer.max_angle=3.2", "optimizer.max_angle", "3.2"),
        ("optimizer.schedule=logarithmic", "optimizer.schedule", "logarithmic"),
        ("optimizer.decay_rho=0", "optimizer.decay_rho", "0"),
        ("optimizer.decay_rho=1e-320", "optimizer.decay_rho", "1e-320"),
        ("train.logit_power=-1", "train.logit_power", "-1"),
        ("growth.rewarm={share: 1.5, tokens: 9}", "growth.rewarm.share", "1.5"),
        ("growth.settle={max_angle: 0, tokens: 9}", "growth.settle.max_angle", "0"),
        ("model.kind=bert", "model.kind", "bert"),
        ("model=7", "model", "7"),
        ("growth.stages=7", "growth.stages", "7"),
        ("growth.stages.1.kappa=2", "growth.stages.1.kappa", "2"),
        ("growth.trigger.kappa=1.2", "growth.trigger.kappa", "1.2"),
        ("growth.trigger.constant=[1, x]", "growth.trigger.constant.1", "x"),
        ("growth.trigger.reference=[[1e6, 3], [-2, 3]]", "growth.trigger.reference.1.0", "-2"),
        ("data.train=7", "data.train", "7"),
        ("data.train=[{path: a, weight: -1}]", "data.train.0.weight", "-1"),
        ("run_dir=7", "run_dir", "7"),
    ],
)
def test_wrong_values(base: Path, override: str, key: str, value: str) -> None:
    assert refusal(base, override).startswith(f"{key} = {value}: ")


@pytest.mark.parametrize("key", ["run_dir", "model.d_ff", "train.seq_len", "optimizer.lr", "data.valid", "data"])
def test_missing_keys(key: str) -> None:
    tree = yaml.safe_load(BASE)
    parse_config(tree)
    *parents, last = key.split(".")
    del (tree[parents[0]] if parents else tree)[last]
    with pytest.raises(UserError, match="this key is needed") as caught:
        parse_config(tree)
    assert str(caught.value).startswith(f"{key} = (missing): ")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.seed", "train.seed: is not of the form key=value"),
        ("=3", "=3: is not of the form key=value"),
        ("data.train=[{path: a, path: b}]", "data.train.0.path = b: stands twice; delete one of the two"),
        ("growth.stages.2.d_model=96", "use 0 to 1"),
        ("growth.stages.first.d_model=96", "growth.stages.first.d_model = first: is no index"),
        ("model.d_model.x=3", "model.d_model = 36: is a value, not a section; leave out model.d_model.x"),
    ],
)
def test_overrides_that_lead_nowhere(base: Path, override: str, told: str) -> None:
    assert told in refusal(base, override)


def test_an_empty_list_has_no_index(base: Path) -> None:
    assert "give the whole list" in refusal(base, "growth.stages=[]", "growth.stages.0.d_model=96")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "holds no keys"), (b"- 1\n", "holds no keys"), (b"a: [1\n", "YAML"), (b"\xff\xfe\x00", "YAML")],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"--config = {path}: ")
    assert told in refusal(path)
    assert "no such file" in refusal(tmp_path / "none.yaml")
    assert "is no regular file" in refusal(tmp_path)


def test_a_user_error_survives_pickling() -> None:
    """As from a worker process or a rank."""
    error = UserError("data", Path("a"), "is no file", "name one")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.remedy) == (str(error), "name one")


# ---- checks across keys ------------------------------------------------------------------------------------

# One case for each check of stages.py: overrides @ ranks, the line that refuses them ("..." is any text), and
# overrides that follow its remedy, which must then be accepted: nothing else was wrong.
MISFITS = """
train.max_steps=null @ 1
    train.max_tokens = (missing): the run has no budget; set it, max_flops or max_steps
    train.max_tokens=1e4
optimizer.weight_decay=0.1 @ 1
    optimizer.weight_decay = 0.1: ngpt's weights live on the unit sphere...; set it to 0, or model.kind to gpt
    model.kind=gpt
optimizer.warmup_share=0.5 optimizer.decay_share=0.6 @ 1
    optimizer.decay_share = 0.6: and warmup_share 0.5 exceed the run; make them sum to 1 or less
    optimizer.decay_share=0.5
train.logit_power=1 model.kind=gpt @ 1
    train.logit_power = 1.0: preconditions by s_z, which gpt has none of; leave it out, or set model.kind to ngpt
    model.kind=ngpt
optimizer.gate=0.5 optimizer.implementation=deepspeed @ 1
    optimizer.implementation = deepspeed: has no gate, and optimizer.gate wants one; use torch
    optimizer.implementation=torch
optimizer.decay=log optimizer.schedule=cosine @ 1
    optimizer.decay = log: is the course of wsd's fall, and optimizer.schedule is cosine; leave it out, or ... to wsd
    optimizer.schedule=wsd
optimizer.decay_rho=0.2 @ 1
    optimizer.decay_rho = 0.2: is of a logarithmic fall, and there is none; ... set optimizer.schedule or decay to log
    optimizer.decay=log
optimizer.decay_rho=0.2 optimizer.schedule=constant @ 1
    optimizer.decay_rho = 0.2: is of a logarithmic fall, and there is none; ... set optimizer.schedule or decay to log
    optimizer.schedule=log
optimizer.decay=log optimizer.decay_share=0 @ 1
    optimizer.decay = log: is the course of wsd's fall, and optimizer.decay_share is 0; leave it out, or raise ...
    optimizer.decay_share=0.1
optimizer.schedule=log optimizer.warmup_share=1 @ 1
    optimizer.warmup_share = 1.0: leaves nothing of the budget for the fall of optimizer.schedule = log; lower it, ...
    optimizer.warmup_share=0.5
growth.trigger.kappa=0.8 growth.trigger.rule=marginal train.max_flops=1e12 @ 1
    growth.trigger.kappa = 0.8: is not asked for by growth.trigger.rule = marginal; remove it, or set rule to kappa
    growth.trigger.rule=kappa
train.global_batch_size=2e7 @ 1
    train.global_batch_size = 20000000: gives a rank 320000000 tokens a step, more than ...; lower it, or raise dp
    train.global_batch_size=1e7
growth.stages.1.seq_len=1e8 train.seq_len=1e8 train.global_batch_size=2 growth.stages.1.global_batch_size=4 @ 1
    growth.stages.1.global_batch_size = 4: gives a rank 400000000 tokens a step, more than ...; lower it, or raise dp
    growth.stages.1.global_batch_size=2
eval.tokens=3e8 @ 1
    eval.tokens = 300000000: gives a rank 300000000 tokens a validation, more than ...; lower it, or raise dp
    eval.tokens=2e8
growth.stages=[] growth.boost.factor=3 @ 1
    growth.boost = {factor: 3.0, tokens: 1000000}: is of what comes after a growth, ...; leave growth.boost out, or ...
    growth.stages=[{"n_layers":5}]
growth.stages=[] growth.rewarm.tokens=9 @ 1
    growth.rewarm = {share: 0.0, tokens: 9}: is of what comes after a growth, and growth.stages names none; ...
    growth.stages=[{"n_layers":5}]
growth.stages=[] growth.settle.max_angle=0.1 growth.settle.tokens=9 @ 1
    growth.settle = {max_angle: 0.1, tokens: 9}: is of what comes after a growth, ...
    growth.stages=[{"n_layers":5}]
model.kind=gpt optimizer.transfer.d_model=24 @ 1
    growth.stages.0.d_model = 48: grows a gpt from 36 channels, where optimizer.transfer's rates do not hold; ...
    growth.stages.0.d_model=36
optimizer.max_angle=0.1 model.kind=gpt @ 1
    optimizer.max_angle = 0.1: caps what unit rows turn by: gpt has none; leave it out, or set model.kind to ngpt
    model.kind=ngpt
growth.settle.max_angle=0.1 growth.settle.tokens=100 model.kind=gpt @ 1
    growth.settle.max_angle = 0.1: caps what unit rows turn by: gpt ...; leave growth.settle out, or ... to ngpt
    model.kind=ngpt
growth.settle.max_angle=0.1 growth.settle.tokens=100 optimizer.max_angle=0.1 @ 1
    growth.settle.max_angle = 0.1: is not below optimizer.max_angle = 0.1, to which it is loosened; lower it, or ...
    growth.settle.max_angle=0.09
growth.trigger.predictor=constant @ 1
    growth.trigger.constant = (missing): predictor constant needs it; add it
    growth.trigger.constant=3
growth.trigger.predictor=reference @ 1
    growth.trigger.reference = (missing): predictor reference needs it; add it
    growth.trigger.reference=[[1e6,3],[1e7,2]]
growth.trigger.rule=marginal @ 1
    growth.trigger.rule = marginal: weighs what a FLOP gives, and ...; set train.max_flops, or set rule to kappa
    train.max_flops=1e12
model.head_dim=5 @ 1
    model.head_dim = 5: is odd; RoPE turns pairs: choose an even number
    model.head_dim=4
layout.tp=2 @ 3
    layout = tp 2 x pp 1: cannot fill the world of 3 rank(s); launch a number of ranks that is tp*pp*dp...
    layout.tp=1 train.global_batch_size=6
layout.tp=2 layout.pp=2 @ 2
    layout = tp 2 x pp 2: cannot fill the world of 2 rank(s); ... or change the degrees
    layout.pp=1
layout.tp=2 layout.dp=1 @ 4
    layout = tp 2 x pp 1 x dp 1: cannot fill the world of 4 rank(s); ... or change the degrees
    layout.dp=2
growth.stages.1.layout.pp=4 @ 2
    growth.stages.1.layout = tp 1 x pp 4: cannot fill the world of 2 rank(s); ... or change the degrees
    growth.stages.1.layout.pp=2
model.n_kv_heads=3 @ 1
    model.n_heads = 4: is not divisible by n_kv_heads = 3; choose a multiple of 3
    model.n_kv_heads=2
layout.tp=3 @ 3
    model.n_heads = 4: is not divisible by layout.tp = 3; choose a multiple of 3
    model.n_heads=6 model.d_ff=63 growth.stages.0.d_ff=81
layout.tp=2 model.n_kv_heads=1 @ 2
    model.n_kv_heads = 1: is not divisible by layout.tp = 2; choose a multiple of 2
    model.n_kv_heads=2
layout.tp=2 model.d_ff=61 @ 2
    model.d_ff = 61: is not divisible by layout.tp = 2; choose a multiple of 2
    model.d_ff=60
layout.tp=2 growth.stages.0.d_ff=81 @ 2
    growth.stages.0.d_ff = 81: is not divisible by layout.tp = 2; choose a multiple of 2
    growth.stages.0.d_ff=82
layout.tp=2 model.vocab_size=1 @ 2
    model.vocab_size = 1: is below tp = 2; lower layout.tp
    layout.tp=1
layout.pp=4 @ 4
    model.n_layers = 3: leaves some of the layout.pp = 4 ...; lower layout.pp or add layers...
    model.n_layers=4
layout.pp=2 model.n_layers=0 growth.depth=fresh @ 2
    model.n_layers = 0: leaves some of the layout.pp = 2 ...; lower layout.pp or add layers...
    layout.pp=1
model.n_layers=0 @ 1
    growth.stages.1.n_layers = 5: cannot come from growth.depth = append: ...; set growth.depth to fresh
    growth.depth=fresh
layout.pp=2 train.zero_stage=2 @ 2
    train.zero_stage = 2: cannot be combined with layout.pp = 2: ...; set it to 1
    train.zero_stage=1
preflight.measure=never preflight.min_bandwidth=1.5 @ 1
    preflight.measure = never: leaves nothing to hold against min_bandwidth; set it to auto, or leave min_bandwidth out
    preflight.measure=auto
train.overlap_comm=true @ 2
    train.overlap_comm = True: needs train.zero_stage = 2: ...; set train.zero_stage to 2, or overlap_comm to false
    train.zero_stage=2
growth.stages.1.layout.pp=2 train.zero_stage=2 @ 2
    train.zero_stage = 2: cannot be combined with layout.pp = 2: ...; set it to 1
    growth.stages.1.layout.pp=1
layout.dp=3 @ 3
    train.global_batch_size = 8: is not divisible by micro_batch_size*dp = 6; lower micro_batch_size, ... of 6
    train.global_batch_size=12
growth.stages.1.global_batch_size=9 @ 1
    growth.stages.1.global_batch_size = 9: is not divisible by micro_batch_size*dp = 2; lower micro_batch_size, ... of 2
    growth.stages.1.micro_batch_size=3
model.n_kv_heads=2 growth.stages.0.n_kv_heads=6 @ 1
    growth.stages.0.n_kv_heads = 6: does not keep 2 or more ...; grow n_heads and n_kv_heads together
    growth.stages.0.n_heads=12
model.n_kv_heads=2 growth.stages.0.n_heads=7 growth.stages.0.n_kv_heads=3 @ 1
    growth.stages.0.n_heads = 7: is not divisible by n_kv_heads = 3; choose a multiple of 3
    growth.stages.0.n_heads=9
growth.stages.0.d_ff=3000 @ 1
    growth.stages.0.d_ff = 3000: makes 49 copies of a vector, ...; grow in smaller steps
    growth.stages.0.d_ff=2976
growth.stages.1.seq_len=24 @ 1
    train.seq_len = 16: does not divide the run's longest sequence, 24; choose lengths that divide it...
    growth.stages.1.seq_len=32
growth.stages.1.seq_len=12 @ 1
    growth.stages.1.seq_len = 12: does not divide the run's longest sequence, 16; choose lengths...
    growth.stages.1.seq_len=8
growth.stages.0.d_model=35 @ 1
    growth.stages.0.d_model = 35: shrinks from 36; stages only grow: give at least that
    growth.stages.0.d_model=36
growth.stages.1.n_layers=2 @ 1
    growth.stages.1.n_layers = 2: shrinks from 3; stages only grow: give at least that
    growth.stages.1.n_layers=4
growth.stages.1.n_layers=3 @ 1
    growth.stages.1 = {n_layers: 3}: changes nothing of the stage before, growth.stages.0; give it a larger size, ...
    growth.stages.1.n_layers=4
growth.stages.0={"max_flops":1.5e9,"d_ff":62} @ 1
    growth.stages.0 = {d_ff: 62, max_flops: 1500000000.0}: changes nothing of the stage before, the first; give it a ...
    growth.stages.0.d_ff=63
growth.stages.0.n_heads=3 @ 1
    growth.stages.0.n_heads = 3: shrinks from 4; stages only grow: give at least that
    growth.stages.0.n_heads=4
model.n_kv_heads=2 growth.stages.0.n_kv_heads=1 @ 1
    growth.stages.0.n_kv_heads = 1: shrinks from 2; stages only grow: give at least that
    growth.stages.0.n_kv_heads=2
growth.stages.0.d_ff=60 @ 1
    growth.stages.0.d_ff = 60: shrinks from 62; stages only grow: give at least that
    growth.stages.0.d_ff=62
growth.stages.1.max_flops=1e9 @ 1
    growth.stages.1.max_flops = 1000000000.0: the last stage ends with the run; remove it, or set train.max_*
    growth.stages.1.max_flops=null
growth.stages.1.kappa=0.5 @ 1
    growth.stages.1.kappa = 0.5: the last stage ends with the run; remove it, or set train.max_*
    growth.stages.1.kappa=null
growth.stages=[] growth.max_tokens=2000 @ 1
    growth.max_tokens = 2000: the last stage ends with the run; remove it, or set train.max_*
    growth.max_tokens=null
growth.trigger.predictor=constant growth.trigger.constant=[3,2] @ 1
    growth.trigger.constant = [3.0, 2.0]: has 2 losses for 3 stages; give one loss, or one a stage
    growth.trigger.constant=[3,2,1]
growth.trigger.min_evals=4 @ 1
    growth.trigger.min_evals = 4: evaluations are too few to fit a power law to; set it to 5 or more
    growth.trigger.predictor=scaling_law
""".strip().splitlines()


@pytest.mark.parametrize(("bad", "line", "cure"), list(zip(*[map(str.strip, MISFITS)] * 3, strict=True)))
def test_misfits_are_told_and_cured(base: Path, bad: str, line: str, cure: str) -> None:
    overrides, world = bad.split(" @ ")
    told = ".+".join(re.escape(part) for part in line.split("..."))
    assert re.fullmatch(told, refusal(base, *overrides.split(), world=int(world)))
    assert resolve_stages(load_config(base, [*overrides.split(), *cure.split()]), int(world))


def test_no_stages_mean_not_to_grow(base: Path) -> None:
    """Where the file's first size would have ended by its caps says nothing then."""
    for cap in ("max_tokens: 2e3", "max_flops: 2e9"):
        base.write_text(BASE.replace("max_tokens: 2e3", cap))
        (only,) = resolve_stages(load_config(base, ["growth.stages=[]"]), 1)
        assert (only.max_tokens, only.max_flops, only.model.d_model) == (None, None, 36)
    after = "  boost: {factor: 3}\n  rewarm: {tokens: 9}\n  settle: {max_angle: 0.1, tokens: 9}\n  write: clone\n"
    base.write_text(BASE.replace("  stages:", after + "  stages:"))
    growth = load_config(base, ["growth.stages=[]"]).growth
    assert (growth.boost, growth.rewarm, growth.settle, growth.write) == (None, None, None, "clone")
    assert load_config(base, ["growth.stages=[]", "growth.boost.factor=2"]).growth.boost is not None  # as it is asked
    base.write_text(BASE[: BASE.index("  stages:")])  # a file that contradicts itself
    assert "growth.max_tokens = 2000: the last stage ends with the run" in refusal(base)


def test_decay_share_matters_to_wsd_only(base: Path) -> None:
    overrides = ["optimizer.warmup_share=0.9", "optimizer.schedule=cosine"]
    assert resolve_stages(load_config(base, overrides), 1)
    assert "exceed the run" in refusal(base, overrides[0])


# ---- stages ------------------------------------------------------------------------------------------------


def test_stages_inherit_what_they_leave_out(base: Path) -> None:
    overrides = ["layout.tp=2", "growth.trigger.kappa=0.6", "train.seed=5"]
    first, second, third = resolve_stages(load_config(base, overrides), 4)
    assert [s.index for s in (first, second, third)] == [0, 1, 2]
    assert [s.model.d_model for s in (first, second, third)] == [36, 48, 48]
    assert [s.model.n_layers for s in (first, second, third)] == [3, 3, 5]
    assert (third.model.n_heads, third.model.d_ff, third.model.vocab_size) == (6, 80, 67)
    for stage in (second, third):
        kept = ("layout", "seq_len", "micro_batch_size", "global_batch_size", "lr", "kappa")
        assert all(getattr(stage, name) == getattr(first, name) for name in kept)
    assert str(first.layout) == "TP2/PP1/DP2"
    # A cap is a stage's own: none is handed on.
    assert [(s.max_tokens, s.max_flops) for s in (first, second, third)] == [
        (2000, None),
        (None, 1.5e9),
        (None, None),
    ]


def test_what_a_stage_sets_stays_set(base: Path) -> None:
    new = "layout.pp=2 seq_len=32 micro_batch_size=1 global_batch_size=4 lr=1e-3 kappa=0"
    overrides = [f"growth.stages.0.{pair}" for pair in new.split()]
    first, second, third = resolve_stages(load_config(base, overrides), 2)
    for stage in (second, third):
        assert (str(stage.layout), stage.seq_len, stage.micro_batch_size) == ("TP1/PP2/DP1", 32, 1)
        assert (stage.global_batch_size, stage.lr, stage.kappa) == (4, 0.001, 0.0)
    assert (str(first.layout), first.seq_len, first.lr, first.kappa) == ("TP1/PP1/DP2", 16, 0.01, 0.95)
    assert [s.tokens_per_step for s in (first, second)] == [128, 128]
    assert [s.grad_accum for s in (first, second)] == [2, 4]


def test_grouped_query_heads(base: Path) -> None:
    """Without n_kv_heads every query head has its own; with it, groups stay or widen."""
    assert [s.model.kv_heads for s in resolve_stages(load_config(base), 1)] == [4, 6, 6]
    overrides = [
        "model.n_kv_heads=2",
        "growth.stages.0={n_heads: 8}",
        "growth.stages.1={n_heads: 16, n_kv_heads: 4}",
    ]
    stages = resolve_stages(load_config(base, overrides), 1)
    assert [(s.model.n_heads, s.model.kv_heads) for s in stages] == [(4, 2), (8, 2), (16, 4)]


def smallest_world(config: RunConfig) -> int:
    """The fewest ranks that every layout of the file fills."""
    layouts = [config.layout, *(stage.layout for stage in config.growth.stages if stage.layout)]
    return math.lcm(*(layout.tp * layout.pp * (layout.dp or 1) for layout in layouts))


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_we_ship_resolve(path: Path) -> None:
    config = load_config(path)
    sizes = [count_parameters(stage.model) for stage in resolve_stages(config, smallest_world(config))]
    assert len(sizes) == len(config.growth.stages) + 1
    assert sizes == sorted(sizes)


def test_a_configuration_survives_its_own_dump(base: Path) -> None:
    """A run writes its configuration down: read again it is the same."""
    config = load_config(base, ["data.train=[{path: a, weight: 0.3}]", "growth.trigger.reference=[[1e6, 3]]"])
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    for shipped in map(load_config, CONFIGS):
        assert parse_config(yaml.safe_load(yaml.safe_dump(shipped.model_dump(mode="json")))) == shipped
