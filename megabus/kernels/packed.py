"""Attention of packed documents, each to itself alone. Shapes are those of `megabus.kernels.eager`; N counts the tokens
of all documents, which lie one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from megabus.kernels.eager import attention
from megabus.kernels.generation import AMPERE


def packed_attention(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], bounds: Tensor, scale: float
) -> Tensor:
    """softmax(scale q k^T) v over the keys of the query's own document, up to its own position, (N, H, C).

    lengths: tokens of each document, none of them 0. bounds: 0 and the sums of the lengths so far, int32, where q is.
    Where PyTorch's flash kernels for documents of several lengths run, they take all of them at once (Dao 2023,
    arXiv 2307.08691); elsewhere there is a call for each.
    """
    if runs_varlen(q_NHC):
        longest = max(lengths)
        varlen_attn, options = _varlen()
        return varlen_attn(
            q_NHC, k_NKC, v_NKC, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **options
        )
    # On a CPU this takes half the time of one call with a mask, but for sequences of 64 tokens and fewer.
    parts = (x.transpose(0, 1)[None].split(list(lengths), dim=2) for x in (q_NHC, k_NKC, v_NKC))
    documents = [attention(q, k, v, None, True, scale).transpose(1, 2) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(documents, dim=1)[0]


def runs_varlen(q_NHC: Tensor) -> bool:
    """Whether PyTorch's flash kernels take such heads: 16 bits, on GPUs from Ampere on."""
    head_dim, halves = q_NHC.shape[-1], (torch.bfloat16, torch.float16)
    if not q_NHC.is_cuda or q_NHC.dtype not in halves or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(q_NHC.device) >= AMPERE


@lru_cache(maxsize=1)
def _varlen() -> tuple[Any, dict[str, bool]]:
    """PyTorch's function, and what tells it that several query heads may share a key head: 2.11 needs not be told."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
