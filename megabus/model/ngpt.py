"""The normalized GPT's block and head (Loshchilov et al. 2024, arXiv 2410.01131): all vectors are unit vectors.

Gains are stored raw and act as raw * init / scale (their section 2.5); the quotient is the declared multiplier.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn

from megabus.kernels.eager import wide
from megabus.model.documents import Documents
from megabus.model.layers import Attention, Embedding, GatedMLP, Head, KVCache
from megabus.model.loss import Reduce
from megabus.model.params import Declare


class Block(nn.Module):
    """h <- Norm(h + alpha_A (h_A - h)), then the same with the MLP (eqs. 10 and 11).

    alpha acts signed: |alpha| has no gradient at 0 and would keep layers inserted with alpha = 0 silent for ever.
    """

    def __init__(self, declare: Declare, number: int) -> None:
        super().__init__()
        model, std = declare.model, declare.model.d_model**-0.5
        root_d = sqrt(model.d_model)
        self.attn = Attention(declare, unit=True, std=std, out_std=std, scale=sqrt(model.head_dim))
        self.mlp = GatedMLP(declare, unit=True, std=std, out_std=std)
        self.s_qk = declare("heads", role="gain", branch=1, init=1 / root_d, multiplier=root_d)
        self.s_u = declare("ffn", role="gain", branch=2, compensates_clones=True)
        # v = (W h) s_v sqrt(d_model) (eq. 21): the root is part of the gain's effective value.
        self.s_v = declare("ffn", role="gain", branch=2, multiplier=root_d, compensates_read_tilt=True)
        alpha = {"init": 1 / root_d, "multiplier": model.alpha_init * root_d}
        self.alpha_attn = declare("embed", role="gain", branch=1, gate=True, **alpha)
        self.alpha_mlp = declare("embed", role="gain", branch=2, gate=True, **alpha)
        self.root_d, self.alpha_scale = root_d, model.alpha_init * root_d
        self.tp, self.kernels = declare.tp, declare.kernels

    def shape_qk(self, q_BTHC: Tensor, k_BTKC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Norm(q) s_qk . Norm(k) s_qk (eqs. 15, 16), with both gains on q: the same product, and it stays
        defined when several query heads share a key head."""
        gain_HC = (wide(self.s_qk) * self.root_d).square().view(-1, q_BTHC.shape[-1])
        rotate_unit = self.kernels.rotate_unit
        return rotate_unit(q_BTHC, cos, sin, gain_HC), rotate_unit(k_BTKC, cos, sin, None)

    def forward(self, h_BTD: Tensor, cache: KVCache | None = None, documents: Documents | None = None) -> Tensor:
        residual, shared = self.kernels.residual, self.tp.shared
        x_BTD = self.attn(h_BTD, self.shape_qk, cache, documents)
        h_BTD = residual(h_BTD, x_BTD, shared(wide(self.alpha_attn)) * self.alpha_scale)
        x_BTD = self.mlp(h_BTD, wide(self.s_u), wide(self.s_v) * self.root_d)
        return residual(h_BTD, x_BTD, shared(wide(self.alpha_mlp)) * self.alpha_scale)


class Output(nn.Module):
    """logits = s_z (E_out h) (eq. 3), this rank's vocabulary rows."""

    def __init__(self, declare: Declare, tied: Embedding | None) -> None:
        super().__init__()
        root_d = sqrt(declare.model.d_model)
        self.scale = declare.model.s_z_init * root_d
        self.head = Head(declare, unit=True, std=1 / root_d)
        gain = {"init": 1 / root_d, "multiplier": self.scale}
        self.s_z = declare("vocab", role="gain", compensates_read_tilt=True, **gain)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.head(h_BTD) * (self.s_z * self.scale)

    def loss(
        self, h_BTD: Tensor, targets_BT: Tensor, reduce: Reduce, power: float | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.head.loss(h_BTD, wide(self.s_z) * self.scale, targets_BT, reduce, power)


def embedding(declare: Declare) -> Embedding:
    return Embedding(declare, unit=True, std=declare.model.d_model**-0.5)
