"""The parallel parts that both model kinds are built from. Shapes are in the names: B batch, T time, D d_model,
H local query heads, K local key/value heads, C head_dim, F local ffn units, V local vocabulary rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import ceil, floor, log, pi, sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabus.config.model import ModelConfig, RopeScaling
from megabus.model.joint import products
from megabus.model.loss import Reduce, head_loss
from megabus.model.params import Declare, shard_rows, spec_of

if TYPE_CHECKING:
    from megabus.model.documents import Documents


def kernel_rows(model: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """Axes of the rows that `megabus.kernels` get on a tensor-parallel rank, by the key that makes them long."""
    return {"d_model": (model.d_model,), "n_heads": (model.n_heads // tp, model.head_dim)}


def rope_frequencies(model: ModelConfig) -> tuple[float, ...]:
    """Radians a position that each pair turns by, (C/2,): theta^(-2i/C), lowered as `rope_scaling` says."""
    plain = [model.rope_theta ** (-i / model.head_dim) for i in range(0, model.head_dim, 2)]
    scaling = model.rope_scaling
    if scaling is None:
        return tuple(plain)
    if scaling.kind == "linear":
        return tuple(f / scaling.factor for f in plain)
    if scaling.kind == "yarn":
        keep = _yarn_keeps(model, scaling)
    else:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = [f * scaling.original_max_position / (2 * pi) for f in plain]  # over the original length
        keep = [min(1.0, max(0.0, (n - low) / (high - low))) for n in turns]
    return tuple(share * f + (1 - share) * f / scaling.factor for f, share in zip(plain, keep, strict=True))


def _yarn_keeps(model: ModelConfig, scaling: RopeScaling) -> list[float]:
    """Of each pair, the share of its frequency that stays, (C/2,): YaRN's ramp, over pairs as transformers has it."""
    C, last = model.head_dim, model.head_dim - 1

    def pair_of(turns: float) -> float:
        """The pair, any real number, that turns so often over the original length."""
        return C * log(scaling.original_max_position / (turns * 2 * pi)) / (2 * log(model.rope_theta))

    first, stop = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, stop = floor(first), ceil(stop)
    first, stop = max(first, 0), min(stop, last)
    stop += 0.001 * (first == stop)
    return [1 - min(1.0, max(0.0, (i - first) / (stop - first))) for i in range(C // 2)]


@lru_cache(maxsize=8)
def rope_tables(
    seq_len: int, frequencies: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, 1, C/2): the angle of pair i at position t is t * frequencies[i]."""
    # Never made under inference mode: a cached inference tensor could not serve a training step.
    with torch.inference_mode(False):
        turns = torch.tensor(frequencies, dtype=torch.float64, device=device)
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), turns)
        return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]


def rope_at(start: int, stop: int, frequencies: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [start, stop), (stop - start, 1, C/2), in fp32 at least, on the device of `like`."""
    length = -(-stop // 256) * 256 if start else stop  # while text is generated, not a new table each token
    dtype = torch.promote_types(like.dtype, torch.float32)
    cos, sin = rope_tables(length, frequencies, like.device, dtype)
    return cos[start:stop], sin[start:stop]


class KVCache:
    """Keys and values of the `length` positions that a model has read, so that text grows by one position a call."""

    def __init__(self) -> None:
        self.length = 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, attention: nn.Module, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer with those of the new positions behind them."""
        if attention in self._kept:
            pairs = zip(self._kept[attention], (k_BTKC, v_BTKC), strict=True)
            k_BTKC, v_BTKC = (torch.cat(pair, dim=1) for pair in pairs)
        self._kept[attention] = k_BTKC, v_BTKC
        return k_BTKC, v_BTKC


class Embedding(nn.Module):
    """Token vectors, rows of the vocabulary sharded. tied: the head's too; growth then keeps to E's image, where rows
    that are picked must lie, and sees as much of h."""

    def __init__(self, declare: Declare, *, unit: bool, std: float, tied: bool = False) -> None:
        super().__init__()
        facts: dict[str, Any] = {"role": "read", "unit": unit, "init": std, "lookup": True, "tied": tied}
        self.weight = declare("vocab", "embed", llama="model.embed_tokens.weight", **facts)
        self.tp = declare.tp
        self.rows = shard_rows(spec_of(self.weight), declare.model, self.tp.size, self.tp.rank)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens_BT, self.weight)
        start, stop = self.rows
        here_BT = (tokens_BT >= start) & (tokens_BT < stop)
        h_BTD = F.embedding((tokens_BT - start).clamp(0, stop - start - 1), self.weight)
        return self.tp.leave(h_BTD * here_BT[..., None])


class Head(nn.Module):
    """Vectors of the next token, rows of the vocabulary sharded: returns this rank's logits only.

    tied: the embedding whose rows these are, or None for rows of the head's own.
    """

    def __init__(self, declare: Declare, *, unit: bool, std: float, tied: Embedding | None = None) -> None:
        super().__init__()
        if tied is None:
            self.weight = declare("vocab", "embed", role="read", unit=unit, init=std, llama="lm_head.weight")
        # In a tuple it is no part of this module: else its parameter would have two names.
        self.tp, self.kernels, self._tied = declare.tp, declare.kernels, (tied,)
        self.first_row, _ = shard_rows(spec_of(self.rows), declare.model, self.tp.size, self.tp.rank)

    @property
    def rows(self) -> nn.Parameter:
        (tied,) = self._tied
        return self.weight if tied is None else tied.weight

    def forward(self, h_BTD: Tensor) -> Tensor:
        return F.linear(self.tp.enter(h_BTD), self.rows)

    def loss(
        self, h_BTD: Tensor, gain_V: Tensor | None, targets_BT: Tensor, reduce: Reduce, power: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `head_loss`: it never holds the logits."""
        h_BTD = self.tp.enter(h_BTD)
        own = (self.first_row, self.tp, power, self.kernels)
        return head_loss(h_BTD, self.rows, gain_V, targets_BT, reduce, *own)


class Attention(nn.Module):
    """Causal grouped-query attention, heads sharded; `shape_qk` is what sets the model kinds apart.

    shape_qk: from q and k (B, T, heads, C), as the matrices give them, and RoPE's cos and sin to those that attend.
    scale: the softmax scale. rotates: whether q and k turn with their positions.
    """

    def __init__(
        self, declare: Declare, *, unit: bool, std: float, out_std: float, scale: float, rotates: bool = True
    ) -> None:
        super().__init__()
        model = declare.model
        read: dict[str, Any] = {"role": "read", "unit": unit, "init": std, "branch": 1}
        write: dict[str, Any] = {"role": "write", "unit": unit, "init": out_std, "gate": not unit, "branch": 1}
        # Where q and k are normalised next, that norm's eps falls as 1 / d_model (`HeadNorm`).
        qk: dict[str, Any] = {"multiplier": sqrt(model.d_model)} if model.qk_norm else {}
        self.q = declare("heads", "embed", llama="self_attn.q_proj.weight", **read, **qk)
        self.k = declare("kv_heads", "embed", llama="self_attn.k_proj.weight", **read, **qk)
        self.v = declare("kv_heads", "embed", llama="self_attn.v_proj.weight", **read)
        self.out = declare("heads", "embed", llama="self_attn.o_proj.weight", **write)
        bias: dict[str, Any] = {"role": "bias", "init": 0.0, "branch": 1}
        with_bias = model.qkv_bias
        self.q_bias = declare("heads", llama="self_attn.q_proj.bias", **bias) if with_bias else None
        self.k_bias = declare("kv_heads", llama="self_attn.k_proj.bias", **bias) if with_bias else None
        self.v_bias = declare("kv_heads", llama="self_attn.v_proj.bias", **bias) if with_bias else None
        self.tp, self.scale, self.attention = declare.tp, scale, declare.kernels.attention
        self.head_dim, self.frequencies = model.head_dim, rope_frequencies(model)
        if not rotates:  # by no angle: cos 1 and sin 0 leave every bit as it is
            self.frequencies = (0.0,) * len(self.frequencies)
        elif model.rope_scaling is not None:
            self.scale *= model.rope_scaling.length**2

    def forward(
        self,
        h_BTD: Tensor,
        shape_qk: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        h_BTD = self.tp.enter(h_BTD)
        B, T, _ = h_BTD.shape
        start = 0 if cache is None else cache.length
        rows = (B, T) if documents is None else (1, B * T)  # whose documents lie in one row
        matrices, biases = (self.q, self.k, self.v), (self.q_bias, self.k_bias, self.v_bias)
        q_BTHC, k_BTKC, v_BTKC = (x.view(*rows, -1, self.head_dim) for x in products(h_BTD, matrices, biases))
        if documents is not None:
            q_BTHC, k_BTKC = shape_qk(q_BTHC, k_BTKC, *documents.rope(self.frequencies, h_BTD))
            y_NHC = documents.attend(q_BTHC, k_BTKC, v_BTKC, self.scale)
            return self.tp.leave(y_NHC.reshape(B, T, -1) @ self.out)
        q_BTHC, k_BTKC = shape_qk(q_BTHC, k_BTKC, *rope_at(start, start + T, self.frequencies, h_BTD))
        mask_TS = None
        if cache is not None:
            k_BTKC, v_BTKC = cache.extend(self, k_BTKC, v_BTKC)
        if start and T > 1:
            mask_TS = torch.ones(T, start + T, dtype=torch.bool, device=h_BTD.device).tril(start)
        q_BHTC, k_BKSC, v_BKSC = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
        y_BHTC = self.attention(q_BHTC, k_BKSC, v_BKSC, mask_TS, start == 0, self.scale)
        return self.tp.leave(y_BHTC.transpose(1, 2).reshape(B, T, -1) @ self.out)


class GatedMLP(nn.Module):
    """u * SiLU(v) between two matrices, ffn units sharded; the gains, if any, multiply u and v."""

    def __init__(self, declare: Declare, *, unit: bool, std: float, out_std: float) -> None:
        super().__init__()
        read: dict[str, Any] = {"role": "read", "unit": unit, "init": std, "branch": 2}
        write: dict[str, Any] = {"role": "write", "unit": unit, "init": out_std, "gate": not unit, "branch": 2}
        self.up = declare("ffn", "embed", llama="mlp.up_proj.weight", **read)
        self.gate = declare("ffn", "embed", llama="mlp.gate_proj.weight", **read)
        self.down = declare("ffn", "embed", llama="mlp.down_proj.weight", **write)
        self.tp, self.kernels = declare.tp, declare.kernels

    def forward(self, h_BTD: Tensor, gain_u_F: Tensor | None = None, gain_v_F: Tensor | None = None) -> Tensor:
        h_BTD = self.tp.enter(h_BTD)
        x_BTF = self.kernels.gate(*products(h_BTD, (self.up, self.gate)), gain_u_F, gain_v_F)
        return self.tp.leave(x_BTF @ self.down)
