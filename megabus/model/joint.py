"""Several matrices that multiply the same h, as one product where that is faster.

DeepSpeed lays parameters into one buffer in the order of their declarations, so q, k and v lie there side by side, and
up and gate do: seen as one matrix they are multiplied in one call, which reads h once. So are their gradients: one
product gives h's, without sums of two or three, and one gives the weights'. Every parameter keeps its own declaration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabus.kernels.adjacent import joined
from megabus.model.where import on_gpu


def products(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
    """h W^T of each of the weights (rows, D), plus the biases where all of them have one, each (..., rows).

    One product where the weights lie side by side and h is not on a CPU, whose single products are as fast: results are
    then views of one tensor, whose rows they cut. Of a model that no engine has laid out each is computed apart.
    """
    biases = biases or [None] * len(weights)
    if not on_gpu(h) or joined(weights, 0) is None:
        return tuple(F.linear(h, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return joint_products(h, weights, [bias for bias in biases if bias is not None])


def joint_products(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """`products` of weights that lie side by side, on any device; biases: of all of them, or none."""
    assert len(biases) in (0, len(weights)), "one product has a bias for all of its rows or for none"
    return _Joint.apply(h, len(weights), *weights, *biases)


def _whole(parts: Sequence[Tensor], dim: int) -> Tensor:
    whole = joined(parts, dim)
    return torch.cat(list(parts), dim) if whole is None else whole


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(h, *weights)
        y = F.linear(h, _whole(weights, 0), _whole(biases, 0) if biases else None)
        return y.split([len(weight) for weight in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, *weights = ctx.saved_tensors
        # What follows may have left its gradients side by side, as the gate does; else they are copied together.
        g_NR = _whole(grads, -1).flatten(0, -2)
        sizes = [len(weight) for weight in weights]
        needs_h, _, *needs = ctx.needs_input_grad
        grad_h = (g_NR @ _whole(weights, 0)).view_as(h) if needs_h else None
        found: list[Tensor | None] = [None] * len(needs)
        if any(needs[: len(weights)]):
            found[: len(weights)] = (g_NR.T @ h.flatten(0, -2)).split(sizes)
        if any(needs[len(weights) :]):
            found[len(weights) :] = g_NR.sum(0).split(sizes)
        return grad_h, None, *found
