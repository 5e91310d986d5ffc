"""The baseline: a pre-norm RMSNorm / SwiGLU / RoPE decoder (Llama's block), from the same parallel parts."""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn

from megabus.kernels.eager import wide
from megabus.model.documents import Documents
from megabus.model.layers import Attention, Embedding, GatedMLP, Head, KVCache
from megabus.model.loss import Reduce
from megabus.model.params import Declare


class RMSNorm(nn.Module):
    """gain * sqrt(D) * h / sqrt(|h|^2 + eps), in fp32 at least (Zhang & Sennrich 2019).

    eps is added to the squared length, not to the mean square: growth keeps |h| and so keeps this exactly.
    It equals the usual form with eps / D.
    """

    def __init__(self, declare: Declare, llama: str, branch: int = 0) -> None:
        super().__init__()
        self.root_d, self.eps = sqrt(declare.model.d_model), declare.model.norm_eps
        self.tp, self.rms_norm = declare.tp, declare.kernels.rms_norm
        self.gain = declare("embed", role="gain", branch=branch, multiplier=self.root_d, llama=llama)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.rms_norm(h_BTD, self.tp.shared(wide(self.gain)) * self.root_d, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of every head, its C entries being normalised, by one gain for all heads (Qwen3; Henry et al. 2020).

    eps is the usual form's norm_eps / d_model, as that of `RMSNorm` is, so stock classes have both. It falls as the
    model grows, and the rows that q and k come from fall with it (their multiplier): then nothing else changes.
    """

    def __init__(self, declare: Declare, llama: str) -> None:
        super().__init__()
        model = declare.model
        self.root_c, self.eps = sqrt(model.head_dim), model.norm_eps * model.head_dim / model.d_model
        self.tp, self.rms_norm = declare.tp, declare.kernels.rms_norm
        self.gain = declare("head_dim", role="gain", branch=1, llama=llama)

    def forward(self, x_BTHC: Tensor) -> Tensor:
        return self.rms_norm(x_BTHC, self.tp.within(wide(self.gain)) * self.root_c, self.eps)


class Block(nn.Module):
    """h <- h + attn(norm(h)); h <- h + mlp(norm(h)). Write matrices start smaller (GPT-2's 1/sqrt(2 layers))."""

    def __init__(self, declare: Declare, number: int) -> None:
        super().__init__()
        model = declare.model
        std, out_std = model.init_std, model.init_std / sqrt(2 * model.n_layers)
        self.norm_attn = RMSNorm(declare, llama="input_layernorm.weight", branch=1)
        rotates = model.nope_interval is None or (number + 1) % model.nope_interval != 0
        scale = model.head_dim**-0.5
        self.attn = Attention(declare, unit=False, std=std, out_std=out_std, scale=scale, rotates=rotates)
        self.norm_q = HeadNorm(declare, "self_attn.q_norm.weight") if model.qk_norm else None
        self.norm_k = HeadNorm(declare, "self_attn.k_norm.weight") if model.qk_norm else None
        self.norm_mlp = RMSNorm(declare, llama="post_attention_layernorm.weight", branch=2)
        self.mlp = GatedMLP(declare, unit=False, std=std, out_std=out_std)
        self.rotate = declare.kernels.rotate

    def shape_qk(self, q_BTHC: Tensor, k_BTKC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_q is not None and self.norm_k is not None:
            q_BTHC, k_BTKC = self.norm_q(q_BTHC), self.norm_k(k_BTKC)
        return self.rotate(q_BTHC, cos, sin), self.rotate(k_BTKC, cos, sin)

    def forward(self, h_BTD: Tensor, cache: KVCache | None = None, documents: Documents | None = None) -> Tensor:
        h_BTD = h_BTD + self.attn(self.norm_attn(h_BTD), self.shape_qk, cache, documents)
        return h_BTD + self.mlp(self.norm_mlp(h_BTD))


class Output(nn.Module):
    """Final norm and LM head, this rank's vocabulary rows. tied: the embedding whose rows they are."""

    def __init__(self, declare: Declare, tied: Embedding | None) -> None:
        super().__init__()
        self.norm = RMSNorm(declare, llama="model.norm.weight")
        self.head = Head(declare, unit=False, std=declare.model.head_std, tied=tied)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.head(self.norm(h_BTD))

    def loss(
        self, h_BTD: Tensor, targets_BT: Tensor, reduce: Reduce, power: float | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.head.loss(self.norm(h_BTD), None, targets_BT, reduce, power)


def embedding(declare: Declare) -> Embedding:
    model = declare.model
    return Embedding(declare, unit=False, std=model.embed_std, tied=model.tie_embeddings)
