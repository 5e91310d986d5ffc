"""nGPT as one would write it in an afternoon, in plain PyTorch: what megabus's own has to be measured against."""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int, head_dim: int, d_ff: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.root_d = n_heads, head_dim, sqrt(d_model)
        self.q, self.k, self.v = (nn.Linear(d_model, n_heads * head_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(n_heads * head_dim, d_model, bias=False)
        self.up, self.gate = (nn.Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.s_qk = nn.Parameter(torch.full((n_heads, head_dim), 1 / self.root_d))
        self.s_u, self.s_v = nn.Parameter(torch.ones(d_ff)), nn.Parameter(torch.ones(d_ff))
        self.alpha_attn, self.alpha_mlp = (nn.Parameter(torch.full((d_model,), 1 / self.root_d)) for _ in range(2))

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = h.shape
        q, k, v = (linear(h).view(B, T, self.heads, self.head_dim) for linear in (self.q, self.k, self.v))
        s_qk = self.s_qk * self.root_d
        q, k = (unit(self.rotated(x, cos, sin)) * s_qk for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sqrt(self.head_dim))
        h_attn = unit(self.out(y.transpose(1, 2).reshape(B, T, -1)))
        h = unit(h + self.alpha_attn * (0.05 * self.root_d) * (h_attn - h))
        x = self.up(h) * self.s_u * F.silu(self.gate(h) * (self.s_v * self.root_d))
        return unit(h + self.alpha_mlp * (0.05 * self.root_d) * (unit(self.down(x)) - h))


class PlainNGPT(nn.Module):
    """forward(tokens (B, T + 1)) -> mean loss in nats."""

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, head_dim: int, d_ff: int) -> None:
        super().__init__()
        self.head_dim, self.root_d = head_dim, sqrt(d_model)
        self.embed = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model, n_heads, head_dim, d_ff) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.s_z = nn.Parameter(torch.full((vocab_size,), 1 / self.root_d))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "s_qk" not in name:
                # Along d_model: the input of most matrices, the output of those that write into h.
                axis = 0 if name.endswith(("out.weight", "down.weight")) else 1
                parameter.copy_(F.normalize(parameter, dim=axis))

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        rate = 10_000 ** (-torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim)
        angle = torch.outer(torch.arange(inputs.shape[1], device=tokens.device), rate)[:, None]
        cos, sin = angle.cos(), angle.sin()
        h = self.embed(inputs)
        for block in self.blocks:
            h = block(h, cos, sin)
        logits = self.head(h) * (self.s_z * self.root_d)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
