"""The functions in plain PyTorch: the definition that the other forms are tested against, and what runs anywhere.

All but attention compute in fp32 at least (fp64 stays fp64) and round once, to the dtype of their first argument.
Gains are effective ones (raw * multiplier), in fp32 at least. Shapes: N tokens, D d_model, B batch, T positions, H
query heads, K key/value heads, S positions of keys, C head_dim, F ffn units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megabus.kernels.generation import AMPERE


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least (fp64 stays fp64, for checks against a reference)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis in fp32 at least; a zero vector stays zero instead of NaN."""
    return F.normalize(wide(x), dim=-1)


def residual(h_ND: Tensor, x_ND: Tensor, alpha_D: Tensor) -> Tensor:
    """Norm(h + alpha (Norm(x) - h)): nGPT's update of the hidden state (Loshchilov et al. 2024, eqs. 10 and 11)."""
    h = wide(h_ND)
    return unit(h + alpha_D * (unit(x_ND) - h)).to(h_ND.dtype)


def rms_norm(h_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """gain * h / sqrt(|h|^2 + eps); the gain carries sqrt(D) (Zhang & Sennrich 2019)."""
    h = wide(h_ND)
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps) * gain_D).to(h_ND.dtype)


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """RoPE (Su et al. 2021) on the pairs (i, i + C/2); cos and sin are (T, 1, C/2)."""
    return _rotated(x_BTHC, cos_TC, sin_TC).to(x_BTHC.dtype)


def rotate_unit(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor, gain_HC: Tensor | None) -> Tensor:
    """gain * Norm(RoPE(x)) over each head's C entries (nGPT, eqs. 15 and 16); without a gain where it is None."""
    y = unit(_rotated(x_BTHC, cos_TC, sin_TC))
    return (y if gain_HC is None else y * gain_HC).to(x_BTHC.dtype)


def _rotated(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    a, b = wide(x_BTHC).chunk(2, dim=-1)
    return torch.cat((a * cos_TC - b * sin_TC, a * sin_TC + b * cos_TC), dim=-1)


def attention(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask_TS: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale q k^T) v for each query head, in the dtype of its arguments, (B, H, T, C). K divides H.

    mask: which of the S keys each query sees; causal, without a mask: those up to its own position.
    """
    groups = q_BHTC.shape[1] // k_BKSC.shape[1]
    grouped = groups > 1
    if grouped and not _flash_runs(q_BHTC, mask_TS):
        # PyTorch's other kernel that never holds the scores has a key head for each query head, or does not run.
        k_BKSC, v_BKSC = (x.repeat_interleave(groups, dim=1) for x in (k_BKSC, v_BKSC))
        grouped = False
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, attn_mask=mask_TS, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _flash_runs(q_BHTC: Tensor, mask_TS: Tensor | None) -> bool:
    """Whether PyTorch may take its flash kernels, which share key heads: as it says of itself, on a CPU always."""
    device = q_BHTC.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        return False
    halves = q_BHTC.dtype in (torch.bfloat16, torch.float16)
    return device.type == "cpu" or (halves and mask_TS is None and q_BHTC.shape[-1] <= 256)


def gate(u_NF: Tensor, v_NF: Tensor, gain_u_F: Tensor | None, gain_v_F: Tensor | None) -> Tensor:
    """u gain_u SiLU(v gain_v) (nGPT, eqs. 20 to 22); both gains are None for plain SwiGLU."""
    u, v = wide(u_NF), wide(v_NF)
    if gain_u_F is not None and gain_v_F is not None:
        u, v = u * gain_u_F, v * gain_v_F
    return (u * F.silu(v)).to(u_NF.dtype)


class Targets(NamedTuple):
    """What a rank's vocabulary rows are told of N tokens, each (N,).

    row: the target's row here, any where it is another rank's; here: whether it is this rank's; share: what the token's
    loss counts for in the whole; own: -share where it is this rank's target, else 0.
    """

    row: Tensor
    here: Tensor
    share: Tensor
    own: Tensor

    def part(self, tokens: slice) -> Targets:
        return Targets(*(x[tokens] for x in self))


def cross_entropy_(
    raw_NV: Tensor,
    gain_V: Tensor | None,
    targets: Targets,
    over_max: Callable[[Tensor], Tensor],
    over_sum: Callable[[Tensor], Tensor],
    learns: bool,
) -> Tensor:
    """Negative log-likelihoods of the targets under softmax(gain raw), (N,), in fp32 at least. raw: some tokens' logits
    before their gains, of this rank's vocabulary rows; where the model `learns` they become the gradient of the sum of
    share * loss by gain raw (else nothing of use). over_max, over_sum: in-place reductions over the ranks that hold the
    vocabulary's other rows.
    """
    if gain_V is None:
        logits = wide(raw_NV)
    else:
        logits = raw_NV.mul_(gain_V) if raw_NV.dtype == gain_V.dtype else raw_NV * gain_V
    top_N = over_max(logits.amax(-1))
    row_N1 = targets.row[:, None]
    own_N = (logits.gather(1, row_N1)[:, 0] - top_N) * targets.here
    exp = logits.sub_(top_N[:, None]).exp_()
    total_N, own_N = over_sum(torch.stack((exp.sum(-1), own_N)))
    if learns:  # share (softmax - one_hot)
        grad = exp.mul_((targets.share / total_N)[:, None]).scatter_add_(1, row_N1, targets.own[:, None])
        if grad is not raw_NV:
            raw_NV.copy_(grad)
    return total_N.log() - own_N


def unit_rows_(rows: Tensor) -> None:
    """Divide every row of (rows, D) by its length, in place; rows are fp32 masters and never zero."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
