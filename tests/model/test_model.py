"""The models against an independent reference; their declarations; their initial state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megabus
from megabus import counter
from megabus.kernels import eager
from megabus.kernels.form import EAGER
from megabus.model import init, layers, ngpt
from megabus.model.decoder import Decoder, param_specs
from megabus.model.params import global_shape, shard_rows, spec_of
from megabus.model.tensor_parallel import Unsharded
from tests.support import reference
from tests.support.small_models import batch, config, lively_state, model_of

torch.set_num_threads(1)

VARIANTS = [(kind, kv) for kind in ("ngpt", "gpt") for kv in (None, 1)]


def lively(model_config):
    return model_of(model_config, lively_state(model_config, larger=10), torch.float32)


def run_model(model, tokens, targets):
    """Logits, loss, and every gradient, by canonical name."""
    model.zero_grad()
    h = model.hidden(tokens)
    out, (loss, _) = model.output(h), model.loss(h, targets)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": out.detach(), "loss": loss.detach(), **grads}


def run_reference(model, tokens, targets):
    p = {name: x.detach().double().requires_grad_() for name, x in model.named_parameters()}
    loss = reference.loss(p, model.config, tokens, targets)
    loss.backward()
    logits = reference.logits(p, model.config, tokens).detach()
    return {"logits": logits, "loss": loss.detach(), **{name: x.grad for name, x in p.items()}}


def worst(found, wanted):
    """The largest error of any tensor, relative to the largest entry that the reference has."""
    assert found.keys() == wanted.keys()
    return max(float((found[k].double() - wanted[k]).abs().max() / wanted[k].abs().max()) for k in wanted)


# ---- the forward and backward pass


@pytest.mark.parametrize(("kind", "kv"), VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_model_equals_the_reference(kind, kv, dtype, tolerance):
    """Logits, loss and the gradient of every parameter."""
    model_config = config(kind, n_kv_heads=kv, alpha_init=0.07, s_z_init=1.5)
    model, data = lively(model_config), batch()
    wanted = run_reference(model, *data)
    assert all(x.abs().max() > 0 for x in wanted.values())
    assert worst(run_model(model.to(dtype), *data), wanted) < tolerance


def no_key_gain(self, q, k, cos, sin):
    gain = (self.s_qk * self.root_d).view(-1, q.shape[-1])
    return eager.rotate_unit(q, cos, sin, gain), eager.rotate_unit(k, cos, sin, None)


def turn_backwards(x, cos, sin):
    """Relative positions with the wrong sign."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


MISTAKES = [
    (ngpt.Block, "shape_qk", no_key_gain),
    (eager, "_rotated", turn_backwards),
    (eager, "unit", lambda x: x),
    (eager.F, "silu", torch.nn.functional.gelu),
]


@pytest.mark.parametrize(("home", "name", "wrong"), MISTAKES, ids=[name for _, name, _ in MISTAKES])
def test_the_reference_notices_mistakes(monkeypatch, home, name, wrong):
    model_config = config()
    model, data = lively(model_config).double(), batch()
    monkeypatch.setattr(home, name, wrong)
    assert worst(run_model(model, *data), run_reference(model, *data)) > 1e-3


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_recompute_gives_the_same_bits(kind, monkeypatch):
    model_config = config(kind)
    plain, data = lively(model_config), batch()
    frugal = Decoder(model_config, recompute=True)
    frugal.load_state_dict(plain.state_dict())
    calls = []
    forward = layers.Attention.forward
    monkeypatch.setattr(layers.Attention, "forward", lambda *a: calls.append(1) or forward(*a))
    found, wanted = run_model(frugal, *data), run_model(plain, *data)
    assert len(calls) == 3 * model_config.n_layers  # twice with recomputation, once without
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_a_pipeline_of_slices_is_the_model():
    """Layers [0, 1), [1, 3) under canonical names, one after the other, give the whole model's bits."""
    model_config = config()
    whole, (tokens, _) = lively(model_config), batch()
    h, seen = tokens, []
    for part in ((0, 1), (1, 3)):
        slice_ = Decoder(model_config, layers=part)
        slice_.load_state_dict({k: whole.state_dict()[k] for k in slice_.state_dict()})
        seen += list(slice_.state_dict())
        h = slice_(h)
    assert sorted(seen) == sorted(whole.state_dict())
    assert torch.equal(h, whole(tokens))


def silence(model):
    """Zero some rows of each kind: a token, a query head, a key head, and every write row of a layer."""
    with torch.no_grad():
        model.embed.weight[7] = 0
        model.layers["0"].attn.q[:10] = 0
        model.layers["1"].attn.k[:10] = 0
        model.layers["1"].attn.out.zero_()
        model.layers["2"].mlp.down.zero_()
    return model


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_zero_rows_give_no_nan(kind):
    model_config = config(kind)
    tokens, targets = batch()
    tokens[0, 3] = 7
    found = run_model(silence(lively(model_config)), tokens, targets)
    assert all(x.isfinite().all() for x in found.values())


def test_an_unguarded_norm_gives_nan(monkeypatch):
    monkeypatch.setattr(eager, "unit", lambda x: x / x.norm(dim=-1, keepdim=True))
    model_config = config()
    assert run_model(silence(lively(model_config)), *batch())["loss"].isnan()


def alpha_gradients(model_config, kernels=EAGER):
    model = lively(model_config)
    for block in model.layers.values():
        block.kernels = kernels
    with torch.no_grad():
        for block in model.layers.values():
            block.alpha_attn.zero_()
            block.alpha_mlp.zero_()
    found = run_model(model, *batch())
    return [float(x.abs().min()) for name, x in found.items() if "alpha" in name]


def test_alpha_zero_still_learns():
    """Signed alpha: the layer is the identity, and can leave that state. |alpha| cannot."""
    assert min(alpha_gradients(config())) > 0
    unsigned = replace(EAGER, residual=lambda h, x, alpha: eager.residual(h, x, alpha.abs()))
    assert max(alpha_gradients(config(), unsigned)) == 0


# ---- declarations


TABLE = {  # every matrix: its axes and its role
    "embed.weight": (("vocab", "embed"), "read"),
    "attn.q": (("heads", "embed"), "read"),
    "attn.k": (("kv_heads", "embed"), "read"),
    "attn.v": (("kv_heads", "embed"), "read"),
    "attn.out": (("heads", "embed"), "write"),
    "mlp.up": (("ffn", "embed"), "read"),
    "mlp.gate": (("ffn", "embed"), "read"),
    "mlp.down": (("ffn", "embed"), "write"),
    "output.head.weight": (("vocab", "embed"), "read"),
}
GAINS = {
    "ngpt": {
        "s_qk": ("heads", 1 / 6, 6),
        "s_u": ("ffn", 1, 1),
        "s_v": ("ffn", 1, 6),  # with sqrt(d_model)
        "alpha_attn": ("embed", 1 / 6, 0.05 * 6),
        "alpha_mlp": ("embed", 1 / 6, 0.05 * 6),
        "output.s_z": ("vocab", 1 / 6, 6),
    },
    "gpt": {
        "norm_attn.gain": ("embed", 1, 6),
        "norm_mlp.gain": ("embed", 1, 6),
        "output.norm.gain": ("embed", 1, 6),
    },
}


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_declarations_are_the_table(kind):
    """Every parameter, its axes, role, unit rows, gate; and each matrix is stored as (rows, d_model)."""
    model_config = config(kind, n_kv_heads=1)
    sizes = {"vocab": 66, "heads": 20, "kv_heads": 10, "ffn": 62, "embed": 36}
    specs = dict(param_specs(model_config))
    shapes = {name: tuple(p.shape) for name, p in Decoder(model_config).named_parameters()}
    gates = set()
    for layer in (None, 0, 1, 2):
        prefix = "" if layer is None else f"layers.{layer}."
        for short, (axes, role) in TABLE.items():
            if short.startswith(("embed", "output")) != (layer is None):
                continue
            spec = specs.pop(prefix + short)
            assert (spec.axes, spec.role, spec.unit) == (axes, role, kind == "ngpt")
            assert (spec.name, spec.layer) == (prefix + short, layer)
            assert shapes.pop(prefix + short) == (sizes[axes[0]], 36)
            gates |= {short} if spec.gate else set()
        for short, (axis, initial, multiplier) in GAINS[kind].items():
            if short.startswith("output") != (layer is None):
                continue
            spec = specs.pop(prefix + short)
            assert (spec.axes, spec.role, spec.unit) == ((axis,), "gain", False)
            assert (spec.init, spec.multiplier) == pytest.approx((initial, multiplier))
            assert shapes.pop(prefix + short) == (sizes[axis],)
            gates |= {short} if spec.gate else set()
    assert not specs
    assert not shapes
    assert gates == ({"alpha_attn", "alpha_mlp"} if kind == "ngpt" else {"attn.out", "mlp.down"})


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_every_parameter_of_a_layer_knows_its_branch(kind):
    """What has a gradient when the gates of one branch alone are open is that branch's, and no other is."""
    model_config = config(kind)
    specs = param_specs(model_config)
    for open_branch in (1, 2):
        model, draw = Decoder(model_config).double(), torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            silent = specs[name].gate and specs[name].branch != open_branch
            p.data = torch.zeros_like(p) if silent else torch.randn(p.shape, generator=draw, dtype=p.dtype)
        tokens = torch.arange(22).view(2, 11)
        model.loss(model.hidden(tokens), tokens.roll(1, 1))[0].backward()
        for name, p in model.named_parameters():
            moved = bool(p.grad.any())
            spec = specs[name]
            assert moved == (spec.layer is None or spec.gate or spec.branch == open_branch), name


def test_in_layer_renames_only_the_layer():
    spec = param_specs(config())["layers.1.attn.out"]
    assert spec.in_layer(12) == "layers.12.attn.out"
    assert param_specs(config())["output.s_z"].in_layer(4) == "output.s_z"


class FakeRank(Unsharded):
    def __init__(self, size, rank):
        self.size, self.rank = size, rank


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
@pytest.mark.parametrize(("tp", "vocab"), [(2, 67), (3, 67), (3, 66), (3, 65), (6, 7)])
def test_shards_cover_every_row_once(kind, tp, vocab):
    """Uneven vocabularies need no padding; `embed` is never cut."""
    model_config = config(kind, vocab_size=vocab, n_heads=6, d_ff=66)
    ranks = [Decoder(model_config, tp=FakeRank(tp, rank)) for rank in range(tp)]
    for name, spec in param_specs(model_config).items():
        rows = [shard_rows(spec, model_config, tp, rank) for rank in range(tp)]
        whole = global_shape(spec, model_config)
        for decoder, (start, stop) in zip(ranks, rows, strict=True):
            assert tuple(decoder.get_parameter(name).shape) == (stop - start, *whole[1:])
        if spec.sharded:
            covered = [row for start, stop in rows for row in range(start, stop)]
            assert covered == list(range(whole[0]))
            lengths = {stop - start for start, stop in rows}
            assert max(lengths) - min(lengths) <= (spec.rows == "vocab")
        else:
            assert spec.rows == "embed"
            assert rows == [(0, whole[0])] * tp


# ---- the initial state


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_a_shard_of_the_initial_state_is_the_initial_state_of_the_shard(kind, monkeypatch):
    model_config = config(kind)
    model = megabus.build_model(model_config, seed=4)
    draw = torch.Generator().manual_seed(0)
    for name, whole in model.named_parameters():
        n = whole.shape[0]
        for _ in range(4):
            low, high = sorted(torch.randint(n + 1, (2,), generator=draw).tolist())
            assert torch.equal(init.initial_rows(model_config, name, 4, low, high), whole[low:high])
        single = torch.cat([init.initial_rows(model_config, name, 4, i, i + 1) for i in range(n)])
        assert torch.equal(single, whole)
        with monkeypatch.context() as patch:  # nor does it depend on how many rows are drawn at a time
            patch.setattr(init, "BLOCK_ELEMENTS", 3 * model_config.d_model)
            assert torch.equal(init.initial_rows(model_config, name, 4, 0, n), whole)


def test_the_shard_check_notices_local_row_numbers(monkeypatch):
    normals = counter.normals
    monkeypatch.setattr(counter, "normals", lambda key, rows, n: normals(key, rows - rows[0], n))
    rows = [init.initial_rows(config(), "embed.weight", 4, *span) for span in ((0, 9), (5, 9))]
    assert not torch.equal(rows[0][5:], rows[1])


def test_ngpt_starts_with_unit_rows():
    for parameter in megabus.build_model(config()).parameters():
        if spec_of(parameter).is_matrix:
            assert (parameter.double().norm(dim=-1) - 1).abs().max() < 1e-6


def test_seeds_and_names_differ():
    model_config = config(n_heads=3, head_dim=22)  # 66 rows everywhere
    one, two = (megabus.build_model(model_config, seed=seed).state_dict() for seed in (0, 1))
    matrices = [x for state in (one, two) for name, x in state.items() if x.ndim == 2]
    assert len({x.numpy().tobytes() for x in matrices}) == len(matrices)
    again = megabus.build_model(model_config, seed=0).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_initial_statistics():
    """Uncorrelated, mean 0, the declared deviation; write matrices of the baseline are smaller."""
    model_config = config("gpt", vocab_size=2000)
    for std, own in ((0.02, None), (0.05, 0.05)):
        drawn = megabus.build_model(config("gpt", vocab_size=2000, embed_init_std=own, head_init_std=own))
        for matrix in (drawn.embed.weight, drawn.output.head.weight):
            assert matrix.std().item() == pytest.approx(std, rel=4 / (2 * matrix.numel()) ** 0.5)
    model = megabus.build_model(model_config)
    x = model.embed.weight.detach().double()
    n = x.numel()
    assert abs(x.mean()) < 4 * 0.02 / n**0.5
    assert x.std() == pytest.approx(0.02, rel=4 / (2 * n) ** 0.5)
    assert (x.T @ x / 2000 / 0.02**2 - torch.eye(36)).abs().max() < 5 / 2000**0.5
    out = torch.cat([block.attn.out.detach() for block in model.layers.values()]).double()
    assert out.std() == pytest.approx(0.02 / 6**0.5, rel=0.06)
    assert (model.layers["0"].norm_attn.gain == 1).all()


def test_ngpt_rows_are_spread_over_the_sphere():
    x = megabus.build_model(config(vocab_size=2000)).embed.weight.detach().double()
    assert (x.T @ x / 2000 * 36 - torch.eye(36)).abs().max() < 5 / 2000**0.5
    assert (x.mean(0) * 6).abs().max() < 4 / 2000**0.5
