"""The loss without logits: against autograd over whole logits, in chunks of any size, for any linear reduction."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megabus.kernels import eager
from megabus.model import loss as loss_room
from megabus.model.loss import IGNORED, head_loss
from megabus.model.tensor_parallel import Unsharded

B, T, D, V = 3, 17, 12, 41
REDUCTIONS = {
    "mean": torch.mean,
    "sequences": lambda losses: losses.sum(1).mean(),
    "last": lambda losses: losses[0, -1],
}


def case(dtype=torch.float64, T=T):
    draw = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(shape, generator=draw, dtype=dtype) for shape in ((B, T, D), (V, D)))
    gain = torch.rand(V, generator=draw, dtype=torch.promote_types(dtype, torch.float32)) + 0.5
    targets = torch.randint(V, (B, T), generator=draw)
    targets[1, 3:9] = IGNORED
    return [x.requires_grad_() for x in (h, weight, gain)], targets


def in_chunks(monkeypatch, logits):
    monkeypatch.setattr(loss_room, "CHUNK", logits)
    monkeypatch.setattr(loss_room, "LEAST", 1)


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(loss_room, "on_gpu", lambda x: True)


def plain(h, weight, gain, targets, reduce):
    raw = h.double() @ weight.double().T
    raw = raw + (raw.to(h.dtype).double() - raw).detach()  # as the product of matrices gives them
    logits = raw * (1 if gain is None else gain.double())
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return reduce(losses), losses


def both(dtype, reduce, with_gain=True, T=T):
    found = []
    for function in (head_loss, plain):
        (h, weight, gain), targets = case(dtype, T)
        rest = (0, Unsharded()) if function is head_loss else ()
        total, losses = function(h, weight, gain if with_gain else None, targets, reduce, *rest)
        (3 * total).backward()  # as with gradient accumulation, what comes from above is not 1
        found.append([total, losses.detach(), h.grad, weight.grad, gain.grad])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("chunk", [1, 5 * V, 7 * V + 3, 1 << 25])
@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no gain"])
def test_it_is_the_loss_of_the_logits(monkeypatch, chunk, reduce, with_gain):
    in_chunks(monkeypatch, chunk)
    for ours, theirs in both(torch.float64, reduce, with_gain):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no gain"])
def test_rows_that_fill_up_an_odd_vocabulary_change_nothing(monkeypatch, dtype, with_gain):
    """What GPUs compute: 41 rows and zeros behind them, by 4 tokens."""
    in_chunks(monkeypatch, 4 * V)
    before = both(dtype, torch.mean, with_gain)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(loss_room, "TILE", 4)
    (_, weight, _), _ = case(dtype)
    assert len(loss_room._aligned(weight)) == {torch.float64: 42, torch.bfloat16: 48}[dtype]
    for (found, reference), (ours, _) in zip(both(dtype, torch.mean, with_gain), before, strict=True):
        assert (found is None) == (ours is None)
        if found is not None:
            assert found.shape == ours.shape
            limit = 1e-12 if dtype == torch.float64 else 2 * (ours - reference).abs().max() + 1e-6
            assert (found - reference).abs().max() <= limit


BF16_LIMITS = {"loss": 1e-6, "losses": 1e-6, "h": 2**-7, "weight": 2**-8, "gain": 2**-8}


def bf16_errors(monkeypatch, with_gain):
    """The length of each error over that of what fp64 gives for the same bf16 inputs."""
    in_chunks(monkeypatch, V)  # one token a chunk: what adds up in bf16 shows
    found = zip(BF16_LIMITS, both(torch.bfloat16, torch.mean, with_gain, T=200), strict=True)
    return {
        name: float((ours - theirs).detach().double().norm() / theirs.detach().double().norm())
        for name, (ours, theirs) in found
        if ours is not None
    }


@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no gain"])
def test_bf16_rounds_once(monkeypatch, with_gain):
    assert all(error <= BF16_LIMITS[name] for name, error in bf16_errors(monkeypatch, with_gain).items())


def test_negative_controls_bf16(monkeypatch):
    """The limits notice a gradient that adds up in bf16, and a softmax in bf16."""
    with monkeypatch.context() as patch:
        zeros_like = torch.zeros_like
        patch.setattr(torch, "zeros_like", lambda x, dtype=None: zeros_like(x))
        assert bf16_errors(patch, True)["weight"] > 2 * BF16_LIMITS["weight"]
    monkeypatch.setattr(eager, "wide", torch.clone)
    (h, weight, _), targets = case(torch.bfloat16)
    with torch.no_grad():
        ours, _ = head_loss(h, weight, None, targets, torch.mean, 0, Unsharded())
        theirs, _ = plain(h, weight, None, targets, torch.mean)
    assert abs(ours / theirs - 1) > 2 * BF16_LIMITS["loss"]


def preconditioned(h, weight, gain, targets, reduce, power):
    """By autograd: logits whose value is gain u, and whose derivative by u is (gain / mean |gain|)^power."""
    u = h @ weight.T
    slope = (gain / gain.abs().mean()).detach()
    slope = slope.sign() * slope.abs() ** power
    logits = gain * u.detach() + slope * (u - u.detach())
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return reduce(losses)


def gradients(function, power, spread=1.0):
    (h, weight, gain), targets = case()
    with torch.no_grad():
        gain.mul_(spread)
        gain[7] *= -1  # a step has to go down there too
    rest = () if function is preconditioned else (0, Unsharded())
    found = function(h, weight, gain, targets, REDUCTIONS["sequences"], *rest, power)
    loss = found if isinstance(found, torch.Tensor) else found[0]
    (3 * loss).backward()
    return [loss.detach(), h.grad, weight.grad, gain.grad]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_preconditioned_gradients(monkeypatch, power):
    """Those of h and of the rows are autograd's of such logits; loss and the gain's own gradient stay true."""
    in_chunks(monkeypatch, 7 * V + 3)
    ours, true = gradients(head_loss, power), gradients(head_loss, None)
    for mine, theirs in zip(ours, gradients(preconditioned, power), strict=True):
        assert (mine - theirs).abs().max() < 1e-12
    assert torch.equal(ours[0], true[0])
    assert torch.equal(ours[3], true[3])
    for mine, theirs in zip(ours[1:3], true[1:3], strict=True):
        assert (mine - theirs).abs().max() > 1e-3  # control: it does something
        assert (mine * theirs).sum() > 0


def test_power_one_takes_the_scale_of_the_gains_away(monkeypatch):
    """Ten times the gains is another softmax, but the gradients are not ten times as long for their scale's sake."""
    in_chunks(monkeypatch, V)
    true, ours = gradients(head_loss, None, 3.0), gradients(head_loss, 1.0, 3.0)
    mean = 3.0 * case()[0][2].abs().mean().item()
    for mine, theirs in zip(ours[1:3], true[1:3], strict=True):
        torch.testing.assert_close(mine * mean, theirs, rtol=1e-12, atol=1e-12)


def test_it_has_no_second_derivative(monkeypatch):
    """Its gradients are numbers by then: whoever differentiates them is told."""
    (h, weight, gain), targets = case()
    loss, _ = head_loss(h, weight, gain, targets, torch.mean, 0, Unsharded())
    (grad,) = torch.autograd.grad(loss.square(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_tokens_cost_nothing():
    (h, weight, gain), targets = case()
    loss, losses = head_loss(h[:, :0], weight, gain, targets[:, :0], torch.sum, 0, Unsharded())
    loss.backward()
    assert (loss.item(), losses.shape, weight.grad.abs().sum().item()) == (0.0, (B, 0), 0.0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, and how many products of matrices there were."""

    numel, products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.products += "mm" in str(function)
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return found


def test_it_never_holds_the_logits(monkeypatch):
    (h, weight, gain), targets = case()
    for chunk, holds in ((1 << 25, True), (5 * V, False)):
        in_chunks(monkeypatch, chunk)
        with Largest() as largest:
            head_loss(h, weight, gain, targets, torch.mean, 0, Unsharded())[0].backward()
        assert (largest.numel >= B * T * V) == holds
        assert largest.numel >= h.numel()  # control: it sees tensors


def test_evaluation_computes_no_gradients(monkeypatch):
    in_chunks(monkeypatch, 5 * V)
    (h, weight, gain), targets = case()
    chunks = -(-B * T // 5)
    for learns, products in ((True, 3 * chunks), (False, chunks)):
        with torch.set_grad_enabled(learns), Largest() as seen:
            loss, _ = head_loss(h, weight, gain, targets, torch.mean, 0, Unsharded())
        assert (loss.requires_grad, seen.products) == (learns, products)


def test_gpus_take_whole_tiles_of_tokens(monkeypatch):
    """2^26 logits of a vocabulary of 32,000 are 2,097 tokens. What CPUs take decides the order of sums, and stays."""
    h, wide = (torch.empty(16_384, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert loss_room._tokens_at_once(h, 32_000, False) == 2097
    as_on_a_gpu(monkeypatch)
    for tokens, rows, lean, step in (
        (h, 32_000, False, 2048),
        (h, 200_000, False, loss_room.LEAST),
        (h, 32_000, True, 8192),  # 8,320 would do, and leave 8,064
        (h[:9000], 32_000, True, 4608),
        (h[:130], 32_000, True, 256),
        (h[:0], 32_000, True, 128),
        (wide, 32_000, True, 2048),  # whose logits take 4 bytes in any form
    ):
        assert loss_room._tokens_at_once(tokens, rows, lean) == step
