"""The normalized GPT's block and head (Loshchilov et al. 2024, arXiv 2410.01131): all vectors are unit vectors.

Gains are stored raw and act as raw * init / scale (their section 2.5); the quotient is the declared multiplier.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn

from megabus.model.layers import Attention, Embedding, GatedMLP, Head, KVCache, unit, wide
from megabus.model.params import Declare


class Block(nn.Module):
    """h <- Norm(h + alpha_A (h_A - h)), then the same with the MLP (eqs. 10 and 11).

    alpha acts signed: |alpha| has no gradient at 0 and would keep layers inserted with alpha = 0 silent for ever.
    """

    def __init__(self, declare: Declare) -> None:
        super().__init__()
        model, std = declare.model, declare.model.d_model**-0.5
        root_d = sqrt(model.d_model)
        self.attn = Attention(declare, unit=True, std=std, out_std=std, scale=sqrt(model.head_dim))
        self.mlp = GatedMLP(declare, unit=True, std=std, out_std=std)
        self.s_qk = declare("heads", role="gain", init=1 / root_d, multiplier=root_d)
        self.s_u = declare("ffn", role="gain", divides=True)
        # v = (W h) s_v sqrt(d_model) (eq. 21): the root is part of the gain's effective value.
        self.s_v = declare("ffn", role="gain", multiplier=root_d)
        alpha = {"init": 1 / root_d, "multiplier": model.alpha_init * root_d, "gate": True}
        self.alpha_attn = declare("embed", role="gain", **alpha)
        self.alpha_mlp = declare("embed", role="gain", **alpha)
        self.root_d, self.alpha_scale = root_d, model.alpha_init * root_d

    def shape_qk(self, q_BTHC: Tensor, k_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Norm(q) s_qk . Norm(k) s_qk (eqs. 15, 16), with both gains on q: the same product, and it stays
        defined when several query heads share a key head."""
        gain_HC = (wide(self.s_qk) * self.root_d).square().view(-1, q_BTHC.shape[-1])
        return unit(q_BTHC) * gain_HC, unit(k_BTKC)

    def forward(self, h_BTD: Tensor, cache: KVCache | None = None) -> Tensor:
        h_BTD = self._step(h_BTD, unit(self.attn(h_BTD, self.shape_qk, cache)), self.alpha_attn)
        return self._step(h_BTD, unit(self.mlp(h_BTD, self.s_u, self.s_v * self.root_d)), self.alpha_mlp)

    def _step(self, h_BTD: Tensor, target_BTD: Tensor, alpha_D: Tensor) -> Tensor:
        return unit(h_BTD + alpha_D * self.alpha_scale * (target_BTD - h_BTD))


class Output(nn.Module):
    """logits = s_z (E_out h) (eq. 3), this rank's vocabulary rows."""

    def __init__(self, declare: Declare) -> None:
        super().__init__()
        self.root_d = sqrt(declare.model.d_model)
        self.head = Head(declare, unit=True, std=1 / self.root_d)
        self.s_z = declare("vocab", role="gain", init=1 / self.root_d, multiplier=self.root_d)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.head(h_BTD) * (self.s_z * self.root_d)


def embedding(declare: Declare) -> Embedding:
    return Embedding(declare, unit=True, std=declare.model.d_model**-0.5)
