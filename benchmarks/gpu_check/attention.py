"""PyTorch's attention backends: which run at shapes of the shipped models, how exact and fast they are."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.part import Check

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# Of the largest entry of fp64's result, in roundings of 2^-8 or 2^-23: sums of many terms have several.
LIMITS = {torch.bfloat16: 4 * 2.0**-8, torch.float32: 64 * 2.0**-23}
CALLS = 10
# How PyTorch and cuDNN say that no kernel of a backend takes such tensors. Any other error is one.
REFUSALS = ("No available kernel", "No valid execution plans")


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype


SHAPES = [
    Shape(4, 16, 16, 4096, 64, torch.bfloat16),
    Shape(4, 10, 10, 4096, 128, torch.bfloat16),
    Shape(4, 16, 4, 4096, 64, torch.bfloat16),
    Shape(1, 16, 16, 2048, 64, torch.float32),
    Shape(1, 16, 4, 2048, 64, torch.float32),
]
SMALL = [Shape(1, 2, 2, 32, 8, torch.float32)]


def attention(check: Check) -> None:
    device = torch.device("cuda" if check.on_gpu else "cpu")
    for shape in SMALL if check.small else SHAPES:
        heads = (
            f"{shape.heads} heads on {shape.key_heads}" if shape.heads != shape.key_heads else f"{shape.heads} heads"
        )
        name = str(shape.dtype).removeprefix("torch.")
        what = f"{name}, {shape.batch} x {shape.length}, {heads} of {shape.head_dim}"
        for backend in BACKENDS:
            label = f"{backend.name.removesuffix('_ATTENTION').lower()}, {what}"
            if not check.on_gpu and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                check.tell(label, "needs a GPU")
                continue
            try:
                off = _error(shape, backend, device)
                seconds = _seconds(shape, backend, device)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in REFUSALS):
                    raise
                check.tell(label, f"does not run: {' '.join(str(error).split())[:80]}")
                continue
            # Forward and backward of a causal half: 2 and 5 products of length x length x head_dim a head.
            flops = 7 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
            text = (
                f"{off:.1e} of the largest entry off fp64, {seconds * 1e3:.3g} ms, {flops / seconds / 1e12:.3g} TFLOP/s"
            )
            check.tell(label, text, off <= LIMITS[shape.dtype])


def _inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.key_heads, shape.key_heads)
    sizes = [(shape.batch, count, shape.length, shape.head_dim) for count in heads]
    return [torch.randn(size, generator=random, device=device).to(shape.dtype).requires_grad_() for size in sizes]


def _both_passes(inputs: list[Tensor]) -> list[Tensor]:
    q, k, v = inputs
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    upstream = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype).expand_as(y).contiguous()
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def _error(shape: Shape, backend: SDPBackend, device: torch.device) -> float:
    """Of value and gradients, on the first 512 tokens of one sequence."""
    inputs = _inputs(shape._replace(batch=1, length=min(shape.length, 512)), device)
    with sdpa_kernel(backend):
        got = _both_passes(inputs)
    with sdpa_kernel(SDPBackend.MATH):
        want = _both_passes([x.detach().double().requires_grad_() for x in inputs])
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def _seconds(shape: Shape, backend: SDPBackend, device: torch.device) -> float:
    """Of both passes, the mean of some calls after three."""
    inputs = _inputs(shape, device)
    with sdpa_kernel(backend):
        for call in range(3 + CALLS):
            if call == 3:
                _wait(device)
                begun = time.perf_counter()
            _both_passes(inputs)
    _wait(device)
    return (time.perf_counter() - begun) / CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
