"""What transformers' Llama says of itself in config.json, by strict types, as our model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from megabus.config import ModelConfig
from megabus.config.schema import RopeScaling
from megabus.config.section import NonNegative, Positive
from megabus.errors import UserError

Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Read(BaseModel):
    """Other keys say nothing about the mathematics."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Rope(_Read):
    """transformers 4 has another name for `rope_type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: float | None = None


class _Llama(_Read):
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    rope_theta: Positive | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    rms_norm_eps: Positive = 1e-6
    initializer_range: NonNegative | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool | None = None


def llama_model(tree: dict[str, Any]) -> ModelConfig:
    """Raises pydantic's ValidationError, and `UserError` for what megabus does not compute."""
    config = _Llama.model_validate(tree)
    rope = config.rope_parameters or _Rope()
    rotated = [x for x in (config.partial_rotary_factor, rope.partial_rotary_factor) if x not in (None, 1.0)]
    for key, found, wanted in (
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("hidden_act", config.hidden_act, "silu"),
        ("partial_rotary_factor", rotated[0] if rotated else 1.0, 1.0),
    ):
        if found != wanted:
            raise UserError(f"config.json {key}", found, "is not supported", f"only {wanted} is")
    return ModelConfig(
        kind="gpt",
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        d_ff=config.intermediate_size,
        rope_theta=rope.rope_theta or config.rope_theta or 10000.0,
        rope_scaling=_scaling(config.rope_parameters or config.rope_scaling or _Rope(), config),
        norm_eps=config.rms_norm_eps * config.hidden_size,  # theirs is added to the mean of |h|^2, ours to |h|^2
        init_std=config.initializer_range or 0.02,
    )


def _scaling(scaling: _Rope, config: _Llama) -> RopeScaling | None:
    kind = scaling.rope_type or scaling.type or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return _rope_scaling(kind, factor=scaling.factor)
    if kind == "llama3":
        return _rope_scaling(
            kind,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position=scaling.original_max_position_embeddings or config.max_position_embeddings,
        )
    raise UserError("config.json rope_type", kind, "is not supported", "default, linear and llama3 are")


def _rope_scaling(kind: str, **given: float | None) -> RopeScaling:
    for key, value in given.items():
        if value is None:
            raise UserError(f"config.json {key}", "(missing)", f"{kind} RoPE needs it", "restore it from another copy")
    return RopeScaling.model_validate({"kind": kind, **given})
