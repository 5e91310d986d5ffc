"""Growth against explicit dense matrices; kept functions; moments against gradients; bits of shards."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import torch

import megabus
from megabus import counter
from megabus.config import GrowthConfig, ModelConfig
from megabus.errors import UserError
from megabus.growth import maps, rules, writes
from megabus.growth.maps import axis_maps, channel_scale, grouped, layer_sources, spread
from megabus.growth.rules import Growth, grow_rows
from megabus.model.decoder import Decoder, param_specs
from megabus.model.loss import vocab_parallel_cross_entropy
from megabus.model.params import global_shape, spec_of
from megabus.model.tensor_parallel import Unsharded

torch.set_num_threads(1)

BASE = {"vocab_size": 66, "d_model": 36, "n_layers": 3, "n_heads": 2, "head_dim": 10, "d_ff": 62}
FRACTION = {"d_model": 52, "n_heads": 3, "d_ff": 90, "n_layers": 5}
MANY = {"d_model": 131, "n_heads": 11, "d_ff": 233}
WIDTH = {"d_model": 52, "n_heads": 3, "d_ff": 90}
GQA = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6}
KINDS = ["ngpt", "gpt"]
CHANNELS = ["even", "uneven"]


def config(kind="ngpt", *changes):
    merged = dict(BASE)
    for change in changes:
        merged |= change
    return ModelConfig(kind=kind, **merged)


def lively_state(model_config, seed=3):
    """Initial matrices with random gains; larger matrices for the baseline, so that it is far from linear."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, x in megabus.build_model(model_config, seed=seed).state_dict().items():
        spec = param_specs(model_config)[name]
        if not spec.is_matrix:
            low = -1.0 if spec.gate else 0.5
            x = spec.init * (low + (2 - low) * torch.rand(x.shape, generator=draw))
        state[name] = x if spec.unit or not spec.is_matrix else 5 * x
    return state


def model_of(model_config, state, dtype=torch.float64):
    model = Decoder(model_config).to(dtype)
    model.load_state_dict(state)
    return model


def batch(B=2, T=11, seed=5):
    tokens = torch.randint(66, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model):
    tokens, targets = batch()
    return vocab_parallel_cross_entropy(model(tokens), targets, 0, Unsharded())


@torch.no_grad()
def logits_of(model_config, state):
    return model_of(model_config, state)(batch()[0])


def how(**changes):
    return GrowthConfig(**changes)


def change_of(old, new, state, grown):
    """Largest change of a logit, in fp64 arithmetic."""
    return float((logits_of(new, grown) - logits_of(old, state)).abs().max())


def grow_and_compare(old, new, seed=1, **manner):
    state = lively_state(old)
    return change_of(old, new, state, megabus.grow_state(state, old, new, seed, how(**manner)))


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- maps


def test_spread_copies_evenly_and_side_by_side():
    rows = spread(5, 8)
    assert rows.parent.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert rows.copy.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert rows.copies.tolist() == [2, 2, 2, 2, 1, 2, 2, 1]
    for old, new in ((36, 52), (36, 131), (62, 233), (7, 7)):
        counts = np.bincount(spread(old, new).parent, minlength=old)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("old", "new"), [((4, 2), (6, 3)), ((4, 2), (6, 2)), ((4, 2), (9, 3)), ((2, 2), (11, 11))])
def test_grouped_heads_stay_with_their_key(old, new):
    """The key head of a new query head is a copy of its parent's key head."""
    heads = grouped(old[1], new[1], old[0] // old[1], new[0] // new[1])
    kv = spread(old[1], new[1])
    for head in range(new[0]):
        assert heads.parent[head] // (old[0] // old[1]) == kv.parent[head // (new[0] // new[1])]
        family = np.flatnonzero(heads.parent == heads.parent[head])
        assert heads.copies[head] == len(family)
        assert heads.copy[family].tolist() == list(range(len(family)))
    assert set(heads.parent) == set(range(old[0]))


@pytest.mark.parametrize(
    ("depth", "parents", "gates"),
    [
        ("identity", [0, 0, 1, 1, 2], [1, 0, 1, 0, 1]),
        ("split", [0, 0, 1, 1, 2], [0.5, 0.5, 0.5, 0.5, 1]),
        ("stack", [0, 1, 2, 0, 1], [1, 1, 1, 1, 1]),
    ],
)
def test_depth_maps(depth, parents, gates):
    sources = layer_sources(3, 5, depth)
    assert [source.parent for source in sources] == parents
    assert [source.gate(depth) for source in sources] == gates
    old, new = config(), config("ngpt", {"n_layers": 5})
    state = lively_state(old)
    grown = megabus.grow_state(state, old, new, 1, how(depth=depth))
    for layer, (parent, gate) in enumerate(zip(parents, gates, strict=True)):
        for short in ("attn.q", "mlp.down", "s_qk", "alpha_attn", "alpha_mlp"):
            factor = gate if short.startswith("alpha") else 1
            assert torch.equal(grown[f"layers.{layer}.{short}"], factor * state[f"layers.{parent}.{short}"])


def test_depth_silences_the_baseline_by_its_write_matrices():
    old, new = config("gpt"), config("gpt", {"n_layers": 5})
    grown = megabus.grow_state(lively_state(old), old, new, 1)
    for layer, silent in enumerate([False, True, False, True, False]):
        for short, zero in (("attn.out", silent), ("mlp.down", silent), ("mlp.up", False)):
            assert (grown[f"layers.{layer}.{short}"].abs().max() == 0) == zero


# ---- the oracle: explicit dense matrices


def copy_matrix(old, new):
    """(new, old): a one where new index i' copies old index floor(i' old / new)."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        matrix[i, i * old // new] = 1
    return matrix


def isometry(old, new, channels):
    """E of DESIGN section 3; uneven copies fall by 3/4 each."""
    E = copy_matrix(old, new)
    if channels == "uneven":
        for column in E.T:
            copies = column.nonzero()[:, 0]
            column[copies] = 0.75 ** torch.arange(len(copies), dtype=torch.float64)
    return E / E.square().sum(0).sqrt()


def head_matrix(old, new):
    """Rows of query heads: a new key head copies an old one, and its queries copy that one's."""
    C, matrix = old.head_dim, torch.zeros(new.n_heads * new.head_dim, old.n_heads * old.head_dim)
    old_group, new_group = old.n_heads // old.kv_heads, new.n_heads // new.kv_heads
    for head in range(new.n_heads):
        kv = (head // new_group) * old.kv_heads // new.kv_heads
        parent = kv * old_group + (head % new_group) * old_group // new_group
        matrix[head * C : (head + 1) * C, parent * C : (parent + 1) * C] = torch.eye(C)
    return matrix.double()


def row_matrices(old, new):
    eye = torch.eye(old.head_dim, dtype=torch.float64)
    return {
        "vocab": torch.eye(old.vocab_size, dtype=torch.float64),
        "ffn": copy_matrix(old.d_ff, new.d_ff),
        "kv_heads": torch.kron(copy_matrix(old.kv_heads, new.kv_heads), eye),
        "heads": head_matrix(old, new),
        "embed": copy_matrix(old.d_model, new.d_model),
    }


def violations(old, new, state, grown, channels):
    """By how much the grown width (no depth) departs from the design, in each of its statements."""
    E, rows = isometry(old.d_model, new.d_model, channels), row_matrices(old, new)
    found = dict.fromkeys(("read", "gain", "sum", "length", "angle", "tilt"), 0.0)

    def note(what, error):
        found[what] = max(found[what], float(error.abs().max()) if error.numel() else 0.0)

    for name, spec in param_specs(old).items():
        w, C = state[name].double(), rows[spec.rows]
        if spec.role == "gain":
            keeps = spec.init == 1 and not spec.name.endswith(("s_v", "gain"))  # s_u: no root of d in it
            note("gain", grown[name] - C @ w * (1 if keeps else sqrt(old.d_model / new.d_model)))
        elif spec.role == "read":
            note("read", grown[name] - C @ w @ E.T)
        else:
            wide = w @ E.T
            note("sum", C.T @ grown[name].double() - wide)
            for row, column in zip(wide, C.T, strict=True):
                family, size = grown[name].double()[column.nonzero()[:, 0]], row.norm()
                n = len(family)
                tilt = family - row / n
                note("length", family.norm(dim=-1) / size - 1)
                note("tilt", tilt @ row / size**2)
                if n > 1:
                    unit = tilt / tilt.norm(dim=-1, keepdim=True)
                    wanted = torch.full((n, n), -1 / (n - 1), dtype=torch.float64).fill_diagonal_(1)
                    note("angle", unit @ unit.T - wanted)
    return found


WIDTHS = [
    ({}, WIDTH),
    ({}, MANY),
    (GQA, {"n_heads": 6, "n_kv_heads": 3, "d_model": 52, "d_ff": 90}),
    (GQA, {"n_heads": 6, "d_model": 52}),
    (GQA, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52, "d_ff": 90}),
]
WIDTH_IDS = ["2-3", "2-11", "4:2-6:3", "4:2-6:2", "4:2-9:3"]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("old", "new"), [(36, 52), (36, 131), (36, 36), (1, 7)])
def test_the_embedding_is_an_isometry(old, new, channels):
    E = isometry(old, new, channels)
    assert (E.T @ E - torch.eye(old)).abs().max() < 1e-15
    scale = channel_scale(spread(old, new), channels)
    assert np.abs(E.sum(1).numpy() - scale).max() < 1e-15
    if channels == "uneven" and new == 52:
        assert set(scale.round(12)) == {1.0, 0.8, 0.6}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), WIDTHS, ids=WIDTH_IDS)
def test_growth_is_the_dense_oracle(kind, before, after, channels):
    old, new = config(kind, before), config(kind, before, after)
    state = lively_state(old)
    found = violations(old, new, state, megabus.grow_state(state, old, new, 1, how(channels=channels)), channels)
    assert max(found.values()) < 1e-6, found
    if kind == "ngpt":
        for name, x in megabus.grow_state(state, old, new, 1, how(channels=channels)).items():
            if param_specs(new)[name].unit:
                assert (x.double().norm(dim=-1) - 1).abs().max() < 2e-7, name


def two_sided_simplex(copies):
    """Sums to zero and has unit vectors for even numbers of copies only."""
    vertices = torch.zeros(copies, copies - 1, dtype=torch.float64)
    vertices[0::2, 0], vertices[1::2, 0] = 1, -1
    return vertices


def one_sided_simplex(copies):
    vertices = torch.zeros(copies, copies - 1, dtype=torch.float64)
    vertices[:, 0] = 1
    return vertices


def flat_scale(embed, channels):
    return np.ones(len(embed))


BREAKS = [
    (writes, "_simplex", two_sided_simplex, {"angle", "sum"}),
    (writes, "_simplex", one_sided_simplex, {"sum", "angle"}),
    (writes, "_directions", lambda key, rows, away, n: away.expand(-1, n, -1), {"tilt", "length"}),
    (rules, "channel_scale", flat_scale, {"read", "sum"}),
    (maps, "grouped", lambda kv, new_kv, g, new_g: spread(kv * g, new_kv * new_g), {"read", "gain"}),
]


@pytest.mark.parametrize(("home", "name", "wrong", "signs"), BREAKS, ids=["even", "sided", "along", "scale", "group"])
def test_the_oracle_notices(monkeypatch, home, name, wrong, signs):
    old = config("ngpt", GQA)
    new = config("ngpt", GQA, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52, "d_ff": 233})
    axis_maps.cache_clear()
    monkeypatch.setattr(home, name, wrong)
    state = lively_state(old)
    found = violations(old, new, state, megabus.grow_state(state, old, new, 1), "even")
    axis_maps.cache_clear()
    assert all(found[sign] > 1e-2 for sign in signs), found


# ---- the function stays


STEPS = [
    ({}, FRACTION),
    ({}, MANY),
    ({}, {"d_model": 36, "n_layers": 5}),
    ({}, {"d_model": 37}),
    (GQA, {"n_heads": 6, "n_kv_heads": 3, **{k: FRACTION[k] for k in ("d_model", "d_ff", "n_layers")}}),
    (GQA, {"n_heads": 6, "d_model": 52}),
    (GQA, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52}),
]
STEP_IDS = ["fraction", "many", "depth", "one", *WIDTH_IDS[2:]]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), STEPS, ids=STEP_IDS)
def test_tilt_and_identity_keep_the_function(kind, before, after, channels):
    old, new = config(kind, before), config(kind, before, after)
    state = lively_state(old)
    assert logits_of(old, state).std() > 0.1
    grown = megabus.grow_state(state, old, new, 1, how(channels=channels))
    assert change_of(old, new, state, grown) <= 1e-6
    losses = [loss_of(model_of(*at, torch.float32)).item() for at in ((old, state), (new, grown))]
    assert abs(losses[0] - losses[1]) <= 1e-6


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), STEPS, ids=STEP_IDS)
def test_growth_is_exact_but_for_the_rounding_of_storage(monkeypatch, kind, before, after, channels):
    """The same in fp64 all through."""
    old, new = config(kind, before), config(kind, before, after)
    state = {name: x.double() for name, x in lively_state(old).items()}
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    grown = megabus.grow_state(state, old, new, 1, how(channels=channels))
    assert all(x.dtype == torch.float64 for x in grown.values())
    assert change_of(old, new, state, grown) <= 2e-14


def test_three_growths_in_a_row_keep_the_function():
    first = config()
    sizes = [
        config("ngpt", {"d_model": 41, "n_heads": 3, "d_ff": 70}),
        config("ngpt", {"d_model": 52, "n_heads": 4, "d_ff": 99, "n_layers": 4}),
        config("ngpt", {"d_model": 75, "n_heads": 7, "d_ff": 150, "n_layers": 7}),
    ]
    start = state = lively_state(first)
    now = first
    for size in sizes:
        state, now = megabus.grow_state(state, now, size, 7), size
    assert change_of(first, now, start, state) <= 1e-6


@pytest.mark.parametrize("write", ["tilt", "clone", "noise"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["weight", "exp_avg", "exp_avg_sq"])
def test_growing_nothing_is_the_identity_bitwise(kind, write, weights):
    same_size = config(kind, GQA)
    state = lively_state(same_size)
    manner = how(write=write, moments="grow", channels="uneven")
    assert same(megabus.grow_state(state, same_size, same_size, 1, manner, weights), state)
    grown = megabus.grow_state(state, same_size, config(kind, GQA, {"d_ff": 63}), 1, manner, weights)
    assert not same(grown, state)


def test_clones_are_exact_only_where_a_gain_can_make_up_for_them():
    """ffn units and whole multiples of heads, but not 2 -> 3 heads: a head has no gain to halve."""
    assert grow_and_compare(config(), config("ngpt", {"d_ff": 90}), write="clone") < 1e-6
    assert grow_and_compare(config(), config("ngpt", {"n_heads": 4}), write="clone") < 1e-6
    assert grow_and_compare(config(), config("ngpt", {"n_heads": 3}), write="clone") > 1e-2
    assert grow_and_compare(config("gpt"), config("gpt", FRACTION), write="clone") < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_noise_moves_the_function_a_little_and_keeps_unit_rows(kind):
    old, new = config(kind), config(kind, FRACTION)
    state = lively_state(old)
    grown = megabus.grow_state(state, old, new, 1, how(write="noise"))
    assert change_of(old, new, state, grown) > 1e-2
    w = grown["layers.0.mlp.down"].double()
    E, rows = isometry(36, 52, "even"), copy_matrix(62, 90)
    copies = rows.sum(0) @ rows.T
    base = rows @ state["layers.0.mlp.down"].double() @ E.T
    if kind == "ngpt":
        assert (w.norm(dim=-1) - 1).abs().max() < 2e-7
    else:
        base = base / copies[:, None]
    single = copies == 1
    assert (w - base)[single].abs().max() < 1e-7
    assert (w - base)[~single].norm(dim=-1).min() > 0.2 * base.norm(dim=-1).min()


def test_zero_rows_grow_without_nan():
    for kind in KINDS:
        old, new = config(kind), config(kind, MANY)
        state = lively_state(old)
        for layer in range(3):
            state[f"layers.{layer}.attn.out"][3:7] = 0
        for write in ("tilt", "clone", "noise"):
            grown = megabus.grow_state(state, old, new, 1, how(write=write))
            assert all(x.isfinite().all() for x in grown.values())
            assert (grown["layers.0.attn.out"].norm(dim=-1) == 0).any()


def forget_root_d(grown):
    for name, x in grown.items():
        if name.endswith("s_v"):
            x *= sqrt(52 / 36)


def wake_copies(grown):
    for layer in (1, 3):
        grown[f"layers.{layer}.alpha_attn"] += grown[f"layers.{layer - 1}.alpha_attn"]


def keep_raw_scale(grown):
    grown["output.s_z"] *= sqrt(52 / 36)


def keep_raw_alpha(grown):
    grown["layers.0.alpha_mlp"] *= sqrt(52 / 36)


@pytest.mark.parametrize("spoil", [forget_root_d, wake_copies, keep_raw_scale, keep_raw_alpha])
def test_spoiled_growth_moves_the_function(spoil):
    old, new = config(), config("ngpt", FRACTION)
    state = lively_state(old)
    grown = megabus.grow_state(state, old, new, 1)
    assert change_of(old, new, state, grown) <= 1e-6
    spoil(grown)
    assert change_of(old, new, state, grown) > 1e-3


@pytest.mark.parametrize(
    ("home", "name", "wrong"),
    [(writes, "_simplex", one_sided_simplex), (rules, "channel_scale", flat_scale)],
    ids=["sum", "scale"],
)
def test_broken_rules_move_the_function(monkeypatch, home, name, wrong):
    monkeypatch.setattr(home, name, wrong)
    assert grow_and_compare(config(), config("ngpt", FRACTION)) > 1e-2


@pytest.mark.parametrize("depth", ["split", "stack"])
def test_split_and_stack_are_not_exact(depth):
    """They are arms to compare; split strays less, since its alphas still add up."""
    changes = {
        depth: grow_and_compare(config(), config("ngpt", {"n_layers": 5}), depth=depth)
        for depth in ("identity", "split", "stack")
    }
    assert changes["identity"] <= 1e-6
    assert changes[depth] > 1e-3
    assert changes["split"] < changes["stack"]


# ---- moments


def gradients(model_config, state):
    model = model_of(model_config, state)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def mapped_and_true(kind, before, after, power=1, **manner):
    """Moments mapped from the old model's gradient, and the gradient that the grown model really has."""
    old, new = config(kind, before), config(kind, before, after)
    state, manner = lively_state(old), how(moments="grow", **manner)
    moments = {name: (g**power).float() for name, g in gradients(old, state).items()}
    mapped = megabus.grow_state(moments, old, new, 1, manner, ("exp_avg", "exp_avg_sq")[power - 1])
    grown = megabus.grow_state(state, old, new, 1, manner)
    true = {name: g**power for name, g in gradients(new, grown).items()}
    return old, new, mapped, true


def gap(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_embed_growth_maps_moments_as_gradients(kind, channels, power):
    """Where only d_model grows, a mapped first moment is the gradient (g' = a g), a second one its square."""
    for width in (52, 131):
        _, _, mapped, true = mapped_and_true(kind, {}, {"d_model": width}, power, channels=channels)
        assert max(gap(mapped[name], true[name]) for name in true) < 1e-5


@pytest.mark.parametrize("power", [1, 2])
def test_unmapped_scales_would_show(power, monkeypatch):
    monkeypatch.setattr(rules, "channel_scale", flat_scale)
    _, _, mapped, true = mapped_and_true("ngpt", {}, {"d_model": 52}, power)
    assert min(gap(mapped[name], true[name]) for name in ("embed.weight", "layers.0.mlp.up")) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), WIDTHS, ids=WIDTH_IDS)
def test_copied_rows_share_their_familys_gradient(kind, before, after):
    """Write rows get their exact gradient; copied read rows and gains get the mean of their family's."""
    old, new, mapped, true = mapped_and_true(kind, before, after)
    rows = row_matrices(old, new)
    differ = 0.0
    for name, spec in param_specs(new).items():
        C = rows[spec.rows]
        if spec.role == "write" or not spec.sharded or spec.rows == "vocab":
            assert gap(mapped[name], true[name]) < 1e-5, name
            continue
        mean = C @ (C.T @ true[name]) / (C @ C.sum(0)).view(-1, *(1,) * (true[name].ndim - 1))
        assert gap(mapped[name], mean) < 1e-5, name
        differ = max(differ, gap(mapped[name], true[name]))
    assert differ > 1e-2  # a member's own gradient does differ: the mean is all that a map can know


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_carried_moments_stay_with_originals(kind):
    """Old entries, times a (squared for second moments) on embed; zero for copies and inserted layers."""
    old, new = config(), config("ngpt", FRACTION)
    moments = {name: g.float() for name, g in gradients(old, lively_state(old)).items()}
    if kind == "exp_avg_sq":
        moments = {name: g.square() for name, g in moments.items()}
    power = 1 if kind == "exp_avg" else 2
    carried = megabus.grow_state(moments, old, new, 1, how(moments="carry"), kind)
    E = isometry(36, 52, "even") ** power
    for name, spec in param_specs(new).items():
        parent = [0, 0, 1, 1, 2][spec.layer or 0]
        source = moments[spec.in_layer(parent)].double()
        if spec.layer in (1, 3):
            assert (carried[name] == 0).all()
        elif spec.is_matrix:
            C = row_matrices(old, new)[spec.rows]
            first = (C.cumsum(0) == 1) * C
            assert gap(carried[name], first @ source @ E.T) < 1e-6, name
        elif spec.rows == "embed":  # a for its channel of h, a for that of the branch, 1/(init/scale) for raw
            assert gap(carried[name], E.square() @ source * sqrt(52 / 36) ** power) < 1e-6, name


@pytest.mark.parametrize("moments", ["grow", "carry"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_are_the_first_ones_squared(kind, moments):
    """m of g and v of g^2 stay so on every entry: Adam's step does not feel a family's share."""
    old, new = config(kind, GQA), config(kind, GQA, FRACTION, {"n_heads": 9, "n_kv_heads": 3})
    first = {name: g.float() for name, g in gradients(old, lively_state(old)).items()}
    second = {name: m.square() for name, m in first.items()}
    manner = how(moments=moments, channels="uneven")
    m, v = (
        megabus.grow_state(state, old, new, 1, manner, what)
        for state, what in ((first, "exp_avg"), (second, "exp_avg_sq"))
    )
    assert all(torch.allclose(v[name], m[name].square(), rtol=1e-5, atol=0) for name in m)
    assert not torch.allclose(v["layers.0.mlp.up"], m["layers.0.mlp.up"].abs(), rtol=1e-5, atol=0)


def test_reset_moments_are_zero():
    old, new = config(), config("ngpt", WIDTH)
    state = lively_state(old)
    for kind in ("exp_avg", "exp_avg_sq"):
        for moments, zero in (("reset", True), ("carry", False), ("grow", False)):
            grown = megabus.grow_state(state, old, new, 1, how(moments=moments), kind)
            assert all((x == 0).all() == zero for x in grown.values())


# ---- bits


def growth_job(seed=1, kind="ngpt", after=FRACTION, **manner):
    new = config(kind, GQA, after, {"n_heads": 9, "n_kv_heads": 3})
    return Growth(config(kind, GQA), new, how(**manner), seed)


def grown_in_parts(job, name, kind, old, cuts):
    """A parameter grown span by span, each fetching no rows but those it asks for."""

    def fetch(parents):
        needed = np.unique(parents)
        return old[needed][np.searchsorted(needed, parents)]

    return torch.cat([grow_rows(job, name, kind, *span, fetch) for span in pairwise(cuts)])


def parts_agree(job, kind, draw, single_rows=()):
    state, whole_is_parts = lively_state(job.old), True
    grown = megabus.grow_state(state, job.old, job.new, job.seed, job.how, kind)
    for name, spec in param_specs(job.new).items():
        n = global_shape(spec, job.new)[0]
        cuts = sorted({0, n, *draw.integers(1, n, 3).tolist()})
        cuts = list(range(n + 1)) if name in single_rows else cuts
        parts = grown_in_parts(job, name, kind, state[job.old_spec(spec).name], cuts)
        whole_is_parts &= torch.equal(parts, grown[name])
    return whole_is_parts


SINGLE = ("layers.1.attn.out", "layers.2.mlp.down", "layers.0.alpha_attn", "layers.0.attn.q", "layers.0.s_u")


@pytest.mark.parametrize("moments", ["grow", "carry"])
@pytest.mark.parametrize("write", ["tilt", "clone", "noise"])
@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_growing_row_ranges_gives_the_bits_of_growing_all(kind, write, moments):
    draw = np.random.default_rng(0)
    for model in KINDS:
        for channels in CHANNELS:
            job = growth_job(kind=model, write=write, moments=moments, channels=channels)
            assert parts_agree(job, kind, draw, SINGLE if model == "ngpt" else ())


@pytest.mark.parametrize("write", ["tilt", "noise"])
def test_the_shard_check_notices_local_randomness(monkeypatch, write):
    normals = counter.normals
    monkeypatch.setattr(counter, "normals", lambda key, rows, n: normals(key, rows - rows[0], n))
    assert not parts_agree(growth_job(write=write), "weight", np.random.default_rng(0))


def test_the_shard_check_notices_values_that_depend_on_neighbours(monkeypatch):
    length = writes._length
    monkeypatch.setattr(writes, "_length", lambda w: (length(w)[0], length(w)[1] * (1 + 1e-6 * len(w))))
    assert not parts_agree(growth_job(), "weight", np.random.default_rng(0))


@pytest.mark.parametrize("write", ["tilt", "noise"])
def test_bits_do_not_depend_on_threads_or_blocks(monkeypatch, write):
    job, name = growth_job(after={"d_model": 400, "d_ff": 186}, write=write), "layers.0.mlp.down"
    old = lively_state(job.old)[name]

    def grow():
        return grow_rows(job, name, "weight", 0, 186, lambda parents: old[parents])

    grown = grow()
    assert grown.numel() > 2**16  # enough for PyTorch to share out among threads
    try:
        torch.set_num_threads(2)
        assert torch.equal(grow(), grown)
    finally:
        torch.set_num_threads(1)
    blocks = []
    monkeypatch.setattr(rules, "BLOCK_ELEMENTS", 400 * 7 + 5)
    monkeypatch.setattr(rules, "_weight", lambda *args, real=rules._weight: blocks.append(1) or real(*args))
    assert torch.equal(grow(), grown)
    assert len(blocks) == 27


@pytest.mark.parametrize("write", ["tilt", "noise"])
def test_seeds_layers_and_growths_draw_different_directions(write):
    old, new = config(), config("ngpt", WIDTH)
    state = lively_state(old)
    for layer in range(3):  # the same write matrices in every layer
        state[f"layers.{layer}.mlp.down"] = state["layers.0.mlp.down"]
    one, again, two = (megabus.grow_state(state, old, new, seed, how(write=write)) for seed in (1, 1, 2))
    assert same(one, again)
    downs = [grown[f"layers.{layer}.mlp.down"] for grown in (one, two) for layer in range(3)]
    assert len({x.numpy().tobytes() for x in downs}) == 6
    clones = megabus.grow_state(state, old, new, 1, how(write="clone"))
    assert len({clones[f"layers.{layer}.mlp.down"].numpy().tobytes() for layer in range(3)}) == 1


# ---- what tilt is for


def spread_within_families(kind, write, steps=1):
    """Train the grown model; returns how far copies of ffn and head rows are apart, by parameter."""
    old, new = config(kind), config(kind, {"n_heads": 4, "d_ff": 93})
    grown = megabus.grow_state(lively_state(old), old, new, 1, how(write=write))
    model = model_of(new, grown)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    apart = []
    for step in range(steps + 1):
        rows = row_matrices(old, new)
        apart.append({})
        for name, p in model.named_parameters():
            C, w = rows[spec_of(p).rows], p.detach().view(len(p), -1)
            if spec_of(p).rows in ("ffn", "heads") and C.sum(0).max() > 1:
                mean = C @ (C.T @ w) / (C @ C.sum(0))[:, None]
                short = name.split(".", 2)[-1]
                apart[step][short] = max(apart[step].get(short, 0), float((w - mean).abs().max()))
        adam.zero_grad()
        loss_of(model).backward()
        adam.step()
    return apart


@pytest.mark.parametrize("kind", KINDS)
def test_tilt_sets_copies_apart_where_clones_stay_together(kind):
    write = ("attn.out", "mlp.down")
    tilted, cloned = (spread_within_families(kind, write) for write in ("tilt", "clone"))
    for short, apart in tilted[0].items():
        assert (apart > 1e-2) == (short in write)  # read rows start out as exact copies
        assert tilted[1][short] > 1e-3
        assert cloned[0][short] == 0
        assert cloned[1][short] < 1e-6


# ---- errors


def broken(change):
    state = lively_state(config())
    change(state)
    return state


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"d_model": 35}, "new_config.d_model"),
        ({"n_layers": 2}, "new_config.n_layers"),
        ({"n_heads": 3, "n_kv_heads": 1}, "new_config.kv_heads"),
        ({"n_heads": 1}, "new_config.n_heads"),
        ({"d_ff": 61}, "new_config.d_ff"),
        ({"head_dim": 12}, "new_config.head_dim"),
        ({"vocab_size": 67}, "new_config.vocab_size"),
        ({"kind": "gpt"}, "new_config.kind"),
        ({"rope_theta": 5e5}, "new_config.rope_theta"),
        ({"n_heads": 5, "n_kv_heads": 2}, "new_config.n_kv_heads"),
    ],
)
def test_unfit_sizes_are_refused(changes, key):
    old = config()
    with pytest.raises(UserError) as caught:
        megabus.grow_state(lively_state(old), old, old.model_copy(update=changes), 1)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_groups_may_not_lose_query_heads():
    old = config("ngpt", GQA)
    new = config("ngpt", GQA, {"n_heads": 6, "n_kv_heads": 6})
    with pytest.raises(UserError, match="2 query heads"):
        megabus.grow_state(lively_state(old), old, new, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("output.s_z"),
        lambda state: state.update({"output.s_z": torch.ones(67)}),
        lambda state: state.update({"layers.1.attn.q": torch.ones(36, 20)}),
    ],
    ids=["missing", "length", "transposed"],
)
def test_unfit_tensors_are_refused(change):
    old = config()
    with pytest.raises(UserError, match=r"^state\['") as caught:
        megabus.grow_state(broken(change), old, config("ngpt", WIDTH), 1)
    assert "\n" not in str(caught.value)
