"""RoPE as transformers' config.json says it, in and out: which of its keys count, and in which order."""

from __future__ import annotations

from math import log
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from megabus.config.model import ModelConfig, RopeScaling
from megabus.config.section import Positive
from megabus.errors import UserError
from megabus.plain_file import shown

Size = Annotated[int, Field(ge=1, lt=2**31)]


class StrictRead(BaseModel):
    """Keys that it does not have say nothing about the mathematics."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Rope(StrictRead):
    """transformers 4 has another name for `rope_type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: float | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    truncate: bool = True
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None


class RopeKeys(StrictRead):
    """What config.json says of RoPE. Of the two sections transformers 5 reads rope_scaling where it is not empty, and
    then nothing of rope_parameters; the keys beside them count where the section has none of its own."""

    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None
    max_position_embeddings: Size | None = None
    original_max_position_embeddings: Size | None = None


def read_rope(keys: RopeKeys, default_theta: float) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json. Raises `UserError` for what megabus does not compute, and pydantic's
    ValidationError for what is no RoPE."""
    section = keys.rope_scaling or keys.rope_parameters or {}
    for name, value in section.items():
        if isinstance(value, dict):
            raise UserError(
                f"config.json {shown(name)}",
                shown(value),
                "is a RoPE of some layers",
                "only one for all layers is read",
            )
    rope = _Rope.model_validate(section)
    partial = rope.partial_rotary_factor or keys.partial_rotary_factor
    if partial not in (None, 1.0):
        raise UserError("config.json partial_rotary_factor", partial, "is not supported", "only 1.0 is")
    return rope.rope_theta or keys.rope_theta or default_theta, _scaling(rope, keys)


def _scaling(rope: _Rope, keys: RopeKeys) -> RopeScaling | None:
    kind = rope.rope_type or rope.type or "default"
    # A key beside the section goes before the section's own, as transformers has it.
    original = keys.original_max_position_embeddings or rope.original_max_position_embeddings
    original = original or keys.max_position_embeddings
    if kind == "default":
        return None
    if kind == "linear":
        return _needing(kind, factor=rope.factor)
    if kind == "llama3":
        return _needing(
            kind,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position=original,
        )
    if kind == "yarn":
        factor = rope.factor
        if factor is None and original and keys.max_position_embeddings:
            factor = keys.max_position_embeddings / original
        scaling = _needing(kind, factor=factor, original_max_position=original)
        given = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": _length(rope, scaling)}
        given = {key: value for key, value in given.items() if value is not None}
        return RopeScaling.model_validate(scaling.model_dump() | given | {"truncate": rope.truncate})
    raise UserError("config.json rope_type", shown(kind), "is not supported", "default, linear, llama3 and yarn are")


def _length(rope: _Rope, scaling: RopeScaling) -> float | None:
    """What rotated q and k are multiplied by, where it is not what the factor alone gives."""
    if rope.attention_factor is None and rope.mscale and rope.mscale_all_dim and scaling.factor > 1:
        return (0.1 * rope.mscale * log(scaling.factor) + 1) / (0.1 * rope.mscale_all_dim * log(scaling.factor) + 1)
    return rope.attention_factor


def _needing(kind: str, **given: float | None) -> RopeScaling:
    for key, value in given.items():
        if value is None:
            raise UserError(f"config.json {key}", "(missing)", f"{kind} RoPE needs it", "restore it from another copy")
    return RopeScaling.model_validate({"kind": kind, **given})


def written_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say a model's RoPE, to any version of transformers."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    scaling = model.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope["original_max_position_embeddings"] = scaling.original_max_position
    if scaling is not None and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling is not None and scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        rope["attention_factor"] = scaling.length
    return {
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,  # the two by which transformers 4 and other readers know it
        "rope_scaling": None if scaling is None else rope,
    }
