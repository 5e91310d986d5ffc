"""Several matrices as one product: the same values and gradients, where the matrices lie side by side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megabus.kernels.adjacent import joined
from megabus.model import joint, layers
from megabus.model.joint import joint_products, products
from megabus.model.params import spec_of
from tests.support.small_models import GQA, KINDS, PARTS, config, lively_state, loss_of, model_of

SIZES, D = (5, 3, 4), 7


def laid_out(sizes=SIZES, shape=(2, 6)):
    """h, and matrices that are rows of one buffer, with biases that are not."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(*shape, D, generator=draw, dtype=torch.float64).requires_grad_()
    rows = torch.randn(sum(sizes) + 2, D, generator=draw, dtype=torch.float64)[1:-1]
    weights = [part.detach().requires_grad_() for part in rows.split(list(sizes))]
    biases = [torch.randn(n, generator=draw, dtype=torch.float64).requires_grad_() for n in sizes]
    return h, weights, biases


def results(function, with_bias, upstream=None):
    h, weights, biases = laid_out()
    given = [h, *weights, *(biases if with_bias else [])]
    found = function(h, weights, biases if with_bias else None)
    if upstream is None:
        upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype) for y in found]
    return [*found, *torch.autograd.grad(found, given, upstream)]


def apart(h, weights, biases):
    biases = biases or [None] * len(weights)
    return tuple(F.linear(h, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def as_one(h, weights, biases):
    return joint_products(h, weights, biases or [])


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("side_by_side", [False, True], ids=["", "gradients side by side"])
def test_one_product_is_all_of_them(with_bias, side_by_side):
    upstream = None
    if side_by_side:
        upstream = torch.randn(2, 6, sum(SIZES), dtype=torch.float64).split(list(SIZES), -1)
        assert joined(upstream, -1) is not None
    pairs = zip(results(as_one, with_bias, upstream), results(apart, with_bias, upstream), strict=True)
    for number, (found, wanted) in enumerate(pairs):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=str(number))


def test_what_needs_no_gradient_gets_none():
    h, weights, _ = laid_out()
    frozen = [weight.detach() for weight in weights]
    sum(y.sum() for y in joint_products(h, frozen)).backward()
    assert h.grad is not None
    sum(y.sum() for y in joint_products(h.detach(), weights)).backward()
    torch.testing.assert_close(weights[1].grad, h.detach().sum((0, 1)).expand(SIZES[1], D))


def test_all_have_a_bias_or_none():
    h, weights, biases = laid_out()
    with pytest.raises(AssertionError, match="a bias for all of its rows or for none"):
        joint_products(h, weights, biases[:1])


def test_a_cpu_computes_them_apart():
    """Whose bits are those of single products; and so does anything that no engine has laid out."""
    h, weights, _ = laid_out()
    assert all(y.is_contiguous() for y in products(h, weights))
    assert not any(y.is_contiguous() for y in joint_products(h, weights))


def test_joined():
    whole = torch.arange(60.0).view(3, 20)
    columns, rows = whole.split([5, 8, 7], dim=1), whole.split([1, 2])
    assert joined(columns, -1).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(columns, -1), whole)
    assert torch.equal(joined(columns[1:], 1), whole[:, 5:])
    assert torch.equal(joined(rows, 0), whole)
    assert torch.equal(joined([whole], 0), whole)
    for others in (
        (columns[1], columns[0]),  # the other way round
        (columns[0], columns[2]),  # with something between them
        (columns[0], columns[1].clone()),
        (columns[0], columns[1][:2]),
        (whole[:, :5], whole.view(-1)[5:13].view(1, 8)),
        (columns[0], columns[1].view(torch.int32)),
        (torch.ones(()).expand(3, 5), torch.ones(()).expand(3, 5)),
    ):
        assert joined(others, -1) is None


def flattened(model):
    """As an engine lays a model out: matrices in one buffer, vectors in another."""
    for matrix in (True, False):
        own = [p for p in model.parameters() if spec_of(p).is_matrix == matrix]
        flat = torch.cat([p.detach().reshape(-1) for p in own])
        for p, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
            p.data = part.view_as(p)
    return model


@pytest.mark.parametrize("changes", [{}, GQA, *PARTS[:2]], ids=["", "grouped", "bias", "norm"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_joint_products_is_the_model(monkeypatch, kind, recompute, changes):
    if kind == "ngpt" and changes in PARTS:
        pytest.skip("a part of gpt")
    model_config = config(kind, changes)
    plain, ours = (model_of(model_config, lively_state(model_config)) for _ in range(2))
    joint_calls = []

    def forced(h, weights, biases=None):
        joint_calls.append(joint.joined(weights, 0) is not None)
        return joint_products(h, weights, [b for b in biases or [] if b is not None])

    flattened(ours).recompute = recompute
    loss = loss_of(plain)
    loss.backward()
    monkeypatch.setattr(layers, "products", forced)
    found = loss_of(ours)
    found.backward()
    assert all(joint_calls)
    assert len(joint_calls) == 2 * model_config.n_layers * (2 if recompute else 1)
    assert abs(found - loss) < 1e-12
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-12 * max(1, a.grad.abs().max()), name
