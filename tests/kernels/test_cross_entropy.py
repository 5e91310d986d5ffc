"""The head's losses and gradients in every form, against autograd over whole logits in fp64, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megabus.kernels import eager
from megabus.kernels.eager import Targets
from megabus.model import loss as loss_room
from megabus.model.loss import head_loss
from megabus.model.tensor_parallel import Unsharded
from tests.support.forms import SMALL, TRITON_ONLY, form_of, interpreter_rounds_to_nearest  # noqa: F401

N, V = 7, 45


def inputs(dtype, with_gain, lead=V):
    draw = torch.Generator().manual_seed(0)
    raw = (3 * torch.randn(N, lead, generator=draw)).to(dtype)[:, :V]
    gain = 0.5 + torch.rand(V, generator=draw) if with_gain else None
    if gain is not None:
        gain[3] *= -1
    targets = torch.randint(V, (N,), generator=draw)
    targets[:2] = torch.tensor([0, V - 1])
    return raw, gain, targets, torch.rand(N, generator=draw)


def wanted(raw, gain, targets, share):
    logits = (raw.double() * (1 if gain is None else gain.double())).requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    (grad,) = torch.autograd.grad((share.double() * losses).sum(), logits)
    return losses.detach(), grad


def told(targets, share, start, stop):
    here = (targets >= start) & (targets < stop)
    return Targets((targets - start).clamp(0, stop - start - 1), here, share, -(share * here))


def check(losses, grad, reference, dtype):
    assert losses.dtype == torch.float32
    assert (losses - reference[0]).abs().max() <= 2e-6 * reference[0].abs().max()
    ulp = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert ((grad.double() - reference[1]).abs() <= ulp * reference[1].abs() + 1e-7).all()


def same(x):
    return x


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("with_gain", "lead"), [(True, V), (False, V), (True, V + 3)], ids=["gain", "", "rows apart"])
def test_losses_and_gradients(monkeypatch, form, dtype, with_gain, lead):
    if form == "triton":
        from megabus.kernels import triton_head

        monkeypatch.setattr(triton_head, "BLOCK", 16)  # several blocks a row, the last one not full
    raw, gain, targets, share = inputs(dtype, with_gain, lead)
    reference = wanted(raw, gain, targets, share)
    losses = form_of(form).cross_entropy_(raw, gain, told(targets, share, 0, V), same, same, True)
    check(losses, raw, reference, dtype)


@pytest.mark.parametrize("form", SMALL)
def test_a_vocabulary_in_two_parts(form):
    """Each rank has its rows; what they tell each other are largest logits, sums and the target's logit."""
    raw, gain, targets, share = inputs(torch.float32, True)
    reference, cut = wanted(raw, gain, targets, share), 19
    logits = raw * gain
    top = logits.amax(-1)
    sums = torch.stack(((logits - top[:, None]).exp().sum(-1), logits.gather(1, targets[:, None])[:, 0] - top))
    losses, seen = [], []
    for start, stop in ((0, cut), (cut, V)):
        part = raw[:, start:stop].clone()

        def over_max(own_top):
            assert (own_top <= top).all()
            return own_top.copy_(top)

        def over_sum(own_sums):
            seen.append(own_sums.clone())
            return own_sums.copy_(sums)

        known = told(targets, share, start, stop)
        losses.append(form_of(form).cross_entropy_(part, gain[start:stop], known, over_max, over_sum, True))
        raw[:, start:stop] = part
    torch.testing.assert_close(seen[0] + seen[1], sums, rtol=2e-6, atol=1e-6)
    assert torch.equal(losses[0], losses[1])
    check(losses[0], raw, reference, torch.float32)


@pytest.mark.parametrize("form", SMALL)
def test_a_nan_is_noticed(form):
    raw, gain, targets, share = inputs(torch.float32, True)
    raw[2, 5] = torch.nan
    losses = form_of(form).cross_entropy_(raw, gain, told(targets, share, 0, V), same, same, True)
    assert losses.isnan().tolist() == raw.isnan().all(-1).tolist() == [row == 2 for row in range(N)]


@TRITON_ONLY
def test_without_gradients_the_logits_stay():
    raw, gain, targets, share = inputs(torch.bfloat16, True)
    before = raw.clone()
    losses = form_of("triton").cross_entropy_(raw, gain, told(targets, share, 0, V), same, same, False)
    assert torch.equal(raw, before)
    torch.testing.assert_close(losses, wanted(raw, gain, targets, share)[0].float(), rtol=2e-6, atol=1e-6)


@TRITON_ONLY
@pytest.mark.parametrize("power", [None, 0.5])
def test_the_head_with_triton_is_the_head(monkeypatch, power):
    """Its chunks, an odd vocabulary's rows of zeros and preconditioned gradients included."""
    draw = torch.Generator().manual_seed(0)
    tokens, targets = torch.randn(2, 11, 12, generator=draw), torch.randint(V, (2, 11), generator=draw)
    targets[0, :3] = loss_room.IGNORED
    found = []
    for form in ("eager", "triton"):
        for name, value in ({} if form == "eager" else {"CHUNK": 9 * V, "LEAST": 4, "TILE": 4}).items():
            monkeypatch.setattr(loss_room, name, value)
            monkeypatch.setattr(loss_room, "on_gpu", lambda x: True)
        draw.manual_seed(1)
        h, weight = tokens.clone().requires_grad_(), torch.randn(V, 12, generator=draw).requires_grad_()
        gain = (0.5 + torch.rand(V, generator=draw)).requires_grad_()
        loss, _ = head_loss(h, weight, gain, targets, torch.mean, 0, Unsharded(), power, form_of(form))
        loss.backward()
        found.append([loss.detach(), h.grad, weight.grad, gain.grad])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("form", SMALL)
def test_negative_control(monkeypatch, form):
    """The comparison sees a target that is one row off."""
    raw, gain, targets, share = inputs(torch.float32, True)
    reference = wanted(raw, gain, targets, share)
    wrong = told((targets + 1) % V, share, 0, V)
    losses = form_of(form).cross_entropy_(raw, gain, wrong, same, same, True)
    with pytest.raises(AssertionError):
        check(losses, raw, reference, torch.float32)
    assert eager.cross_entropy_ is form_of("eager").cross_entropy_
