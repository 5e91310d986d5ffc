"""The normalized GPT (Loshchilov et al. 2024, arXiv 2410.01131) for transformers, as megabus trains it.

Goes with the weights; needs nothing but torch and transformers. Every matrix is a list of hidden_size-vectors of
length 1, so `out` and `down` are (rows, hidden_size) and multiply from the right.
"""

from dataclasses import fields
from math import sqrt

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_ngpt import NGPTConfig

# What transformers calls the cache: `past_key_values` up to 5.23, `cache` after it.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))


def unit(x):
    """x / |x| in fp32."""
    return F.normalize(x.float(), dim=-1)


def rotate(x, cos, sin):
    """x (B, heads, T, C) fp32; cos and sin (B, 1, T, C/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class NGPTAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q = nn.Parameter(torch.empty(queries, config.hidden_size))
        self.k = nn.Parameter(torch.empty(keys, config.hidden_size))
        self.v = nn.Parameter(torch.empty(keys, config.hidden_size))
        self.out = nn.Parameter(torch.empty(queries, config.hidden_size))

    def forward(self, h, gain, cos, sin, mask, cache):
        batch, length, _ = h.shape
        q, k, v = (
            F.linear(h, matrix).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for matrix in (self.q, self.k, self.v)
        )
        q = (F.normalize(rotate(q.float(), cos, sin), dim=-1) * gain).to(h.dtype)
        k = F.normalize(rotate(k.float(), cos, sin), dim=-1).to(h.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        causal = mask is None and length > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=sqrt(self.head_dim))
        return y.transpose(1, 2).reshape(batch, length, -1) @ self.out


class NGPTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.gate, self.down = (
            nn.Parameter(torch.empty(config.intermediate_size, config.hidden_size)) for _ in range(3)
        )

    def forward(self, h, gain_u, gain_v):
        u, v = F.linear(h, self.up).float() * gain_u, F.linear(h, self.gate).float() * gain_v
        return (u * F.silu(v)).to(h.dtype) @ self.down


class NGPTBlock(GradientCheckpointingLayer):
    """h <- Norm(h + alpha (Norm(attention or MLP) - h)); gains act as raw * init / scale."""

    def __init__(self, config, layer):
        super().__init__()
        self.root, self.head_dim = sqrt(config.hidden_size), config.head_dim
        self.alpha_scale = config.alpha_init * self.root
        self.attn, self.mlp = NGPTAttention(config, layer), NGPTMLP(config)
        self.s_qk = nn.Parameter(torch.empty(config.num_attention_heads * config.head_dim))
        self.s_u = nn.Parameter(torch.empty(config.intermediate_size))
        self.s_v = nn.Parameter(torch.empty(config.intermediate_size))
        self.alpha_attn = nn.Parameter(torch.empty(config.hidden_size))
        self.alpha_mlp = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, h, cos, sin, mask, past_key_values=None):
        gain = (self.s_qk.float() * self.root).square().view(1, -1, 1, self.head_dim)
        h = self.step(h, self.attn(h, gain, cos, sin, mask, past_key_values), self.alpha_attn)
        return self.step(h, self.mlp(h, self.s_u.float(), self.s_v.float() * self.root), self.alpha_mlp)

    def step(self, h, x, alpha):
        wide = h.float()
        return unit(wide + alpha.float() * self.alpha_scale * (unit(x) - wide)).to(h.dtype)


class NGPTOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scale = config.s_z_init * sqrt(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.s_z = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, h):
        return self.head(h) * (self.s_z * self.scale)


class NGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NGPTConfig
    _supports_sdpa = True
    _no_split_modules = ("NGPTBlock",)
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NGPTBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.output = NGPTOutput(config)
        self.post_init()

    def _init_weights(self, module):
        """Unit rows and nGPT's initial gains, for a model that is not loaded."""
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                if getattr(parameter, "_is_hf_initialized", False):
                    continue  # loaded
                if parameter.dim() == 2:
                    parameter.copy_(F.normalize(torch.randn_like(parameter), dim=-1))
                else:
                    small = name in ("s_qk", "s_z", "alpha_attn", "alpha_mlp")
                    parameter.fill_(self.config.hidden_size**-0.5 if small else 1.0)

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.output.head

    def set_output_embeddings(self, value):
        self.output.head = value

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """Added rows are unit rows like all others. What they lose in length their logits' gains take over: with
        `mean_resizing` the added logits are about the mean of the others', as transformers wants it."""
        embed = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        gains = self.output.s_z
        old, new = len(gains), embed.num_embeddings
        with torch.no_grad():
            added = self.output.head.weight[old:]
            lengths = added.float().norm(dim=-1)
            for rows in (embed.weight[old:], added):
                rows.copy_(unit(rows))
            grown = torch.cat((gains[:new], (gains.float().mean() * lengths).to(gains.dtype)))
        if new != old:
            self.output.s_z = nn.Parameter(grown, requires_grad=gains.requires_grad)
            self.output.head.out_features = new
            if getattr(self.config, "megabus", None):  # the sizes by which megabus reads an export
                self.config.megabus = {**self.config.megabus, "vocab_size": new}
        return embed

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and any(block.gradient_checkpointing for block in self.layers):
            use_cache, cache = False, None  # a block that is computed twice would fill it twice
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Padding has no position: unlike in Llama, a shift of all positions changes the result.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -h.shape[1] :]
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(h.shape[1], device=h.device) + seen)[None]
        mask = create_causal_mask(self.config, h, attention_mask, cache, position_ids)
        # fp64: what megabus trains with, whatever the precision of the rest.
        frequencies = torch.tensor(self.config.rope_frequencies, dtype=torch.float64, device=h.device)
        angle = position_ids[:, None, :, None].double() * frequencies
        cos, sin = angle.cos().float(), angle.sin().float()
        states = [h] if output_hidden_states else None
        for block in self.layers:
            h = block(h, cos, sin, mask, past_key_values=cache)
            if states is not None:
                states.append(h)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(h[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if states is None else tuple(states),
            **{CACHE: cache if use_cache else None},
        )
