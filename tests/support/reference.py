"""nGPT (arXiv 2410.01131) and the RMSNorm/SwiGLU/RoPE baseline once more: plain, slow, unparallel, fp64.

An oracle: written from the equations and sharing no code with megabus.model. A model is a dict of tensors
under canonical names. Gains are stored raw and act as raw * init / scale, in nGPT.
"""

from __future__ import annotations

from math import sqrt

import torch


def normalized(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def rope(x_BTHC, theta):
    """Turn the complex number x[i] + j x[i + C/2] at position t by t * theta^(-2i/C) radians."""
    _, T, _, C = x_BTHC.shape
    t = torch.arange(T, dtype=torch.float64)
    rate = torch.tensor([theta ** (-2 * i / C) for i in range(C // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(T, C // 2, dtype=torch.float64), t[:, None] * rate)
    z = torch.complex(x_BTHC[..., : C // 2].contiguous(), x_BTHC[..., C // 2 :].contiguous())
    z = z * turn[None, :, None]
    return torch.cat((z.real, z.imag), -1)


def attend(q_BTHC, k_BTHC, v_BTHC, scale):
    """Softmax over the explicit scores of every pair, with an explicit causal mask."""
    T = q_BTHC.shape[1]
    scores = torch.einsum("bthc,bshc->bhts", q_BTHC, k_BTHC) * scale
    scores = scores + torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bshc->bthc", weights, v_BTHC)


def heads(h_BTD, matrix, head_dim):
    y = torch.einsum("btd,nd->btn", h_BTD, matrix)
    return y.unflatten(-1, (-1, head_dim))


def ngpt_logits(p, config, tokens_BT):
    """Logits of nGPT; with fewer key heads, s_qk acts on each query head's copy of its key."""
    root_d, C = sqrt(config.d_model), config.head_dim
    group = config.n_heads // config.kv_heads
    h = p["embed.weight"][tokens_BT]
    for i in range(config.n_layers):
        at = f"layers.{i}."
        s_qk = (p[at + "s_qk"] * root_d).unflatten(0, (config.n_heads, C))
        q = heads(h, p[at + "attn.q"], C)
        k = heads(h, p[at + "attn.k"], C).repeat_interleave(group, dim=2)
        v = heads(h, p[at + "attn.v"], C).repeat_interleave(group, dim=2)
        q, k = (normalized(rope(x, config.rope_theta)) * s_qk for x in (q, k))
        y = attend(q, k, v, sqrt(C)).flatten(2)
        h_A = normalized(torch.einsum("btn,nd->btd", y, p[at + "attn.out"]))
        h = normalized(h + p[at + "alpha_attn"] * config.alpha_init * root_d * (h_A - h))
        u = torch.einsum("btd,fd->btf", h, p[at + "mlp.up"]) * p[at + "s_u"]
        v = torch.einsum("btd,fd->btf", h, p[at + "mlp.gate"]) * p[at + "s_v"] * root_d
        h_M = normalized(torch.einsum("btf,fd->btd", u * silu(v), p[at + "mlp.down"]))
        h = normalized(h + p[at + "alpha_mlp"] * config.alpha_init * root_d * (h_M - h))
    return torch.einsum("btd,vd->btv", h, p["output.head.weight"]) * p["output.s_z"] * config.s_z_init * root_d


def rms_norm(h, gain, eps):
    """sqrt(D) h / sqrt(|h|^2 + eps) * gain: eps on the squared length."""
    return h * sqrt(h.shape[-1]) / (h.pow(2).sum(-1, keepdim=True) + eps).sqrt() * gain


def gpt_logits(p, config, tokens_BT):
    C, group = config.head_dim, config.n_heads // config.kv_heads
    h = p["embed.weight"][tokens_BT]
    for i in range(config.n_layers):
        at = f"layers.{i}."
        x = rms_norm(h, p[at + "norm_attn.gain"], config.norm_eps)
        q = rope(heads(x, p[at + "attn.q"], C), config.rope_theta)
        k = rope(heads(x, p[at + "attn.k"], C), config.rope_theta).repeat_interleave(group, dim=2)
        v = heads(x, p[at + "attn.v"], C).repeat_interleave(group, dim=2)
        y = attend(q, k, v, 1 / sqrt(C)).flatten(2)
        h = h + torch.einsum("btn,nd->btd", y, p[at + "attn.out"])
        x = rms_norm(h, p[at + "norm_mlp.gain"], config.norm_eps)
        u = torch.einsum("btd,fd->btf", x, p[at + "mlp.up"])
        v = torch.einsum("btd,fd->btf", x, p[at + "mlp.gate"])
        h = h + torch.einsum("btf,fd->btd", u * silu(v), p[at + "mlp.down"])
    x = rms_norm(h, p["output.norm.gain"], config.norm_eps)
    return torch.einsum("btd,vd->btv", x, p["output.head.weight"])


def logits(p, config, tokens_BT):
    """Logits (B, T, V) of the model `p`, fp64."""
    return {"ngpt": ngpt_logits, "gpt": gpt_logits}[config.kind](p, config, tokens_BT)


def loss(p, config, tokens_BT, targets_BT):
    """Mean negative log-likelihood, nats."""
    log_p = torch.log_softmax(logits(p, config, tokens_BT), -1)
    return -log_p.gather(-1, targets_BT[..., None]).mean()
