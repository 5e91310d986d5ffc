"""The loss without logits: against autograd over whole logits, in chunks of any size, for any linear reduction."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megabus.model import loss as loss_room
from megabus.model.loss import IGNORED, head_loss
from megabus.model.tensor_parallel import Unsharded

B, T, D, V = 3, 17, 12, 41
REDUCTIONS = {
    "mean": torch.mean,
    "sequences": lambda losses: losses.sum(1).mean(),
    "last": lambda losses: losses[0, -1],
}


def case(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(shape, generator=draw, dtype=dtype) for shape in ((B, T, D), (V, D)))
    gain = torch.rand(V, generator=draw, dtype=torch.promote_types(dtype, torch.float32)) + 0.5
    targets = torch.randint(V, (B, T), generator=draw)
    targets[1, 3:9] = IGNORED
    return [x.requires_grad_() for x in (h, weight, gain)], targets


def plain(h, weight, gain, targets, reduce):
    logits = (h.double() @ weight.double().T) * (1 if gain is None else gain.double())
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return reduce(losses), losses


def both(dtype, reduce, with_gain=True):
    found = []
    for function in (head_loss, plain):
        (h, weight, gain), targets = case(dtype)
        rest = (0, Unsharded()) if function is head_loss else ()
        total, losses = function(h, weight, gain if with_gain else None, targets, reduce, *rest)
        (3 * total).backward()  # as with gradient accumulation, what comes from above is not 1
        found.append([total, losses.detach(), h.grad, weight.grad, gain.grad])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("chunk", [1, 5 * V, 7 * V + 3, 1 << 25])
@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no gain"])
def test_it_is_the_loss_of_the_logits(monkeypatch, chunk, reduce, with_gain):
    monkeypatch.setattr(loss_room, "CHUNK", chunk)
    for ours, theirs in both(torch.float64, reduce, with_gain):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 1e-12


def test_bf16_is_no_worse_than_its_inputs(monkeypatch):
    monkeypatch.setattr(loss_room, "CHUNK", 5 * V)
    for ours, theirs in both(torch.bfloat16, torch.mean):
        assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()


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
        monkeypatch.setattr(loss_room, "CHUNK", chunk)
        with Largest() as largest:
            head_loss(h, weight, gain, targets, torch.mean, 0, Unsharded())[0].backward()
        assert (largest.numel >= B * T * V) == holds
        assert largest.numel >= h.numel()  # control: it sees tensors


def test_evaluation_computes_no_gradients(monkeypatch):
    monkeypatch.setattr(loss_room, "CHUNK", 5 * V)
    (h, weight, gain), targets = case()
    chunks = -(-B * T // 5)
    for learns, products in ((True, 3 * chunks), (False, chunks)):
        with torch.set_grad_enabled(learns), Largest() as seen:
            loss, _ = head_loss(h, weight, gain, targets, torch.mean, 0, Unsharded())
        assert (loss.requires_grad, seen.products) == (learns, products)
