"""What a YAML file may say of RoPE beyond its base."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megabus.config.section import Count, Factor, Positive, Section


class RopeScaling(Section):
    """How RoPE's frequencies are lowered for longer sequences, as imported Llama models have it.

    linear: all by `factor`. llama3: those whose wave is longer than original_max_position / low_freq_factor by
    `factor`, those shorter than original_max_position / high_freq_factor not, with a ramp between.
    """

    kind: Literal["linear", "llama3"] = Field(description="how, see above")
    factor: Factor = Field(description="what frequencies are divided by")
    low_freq_factor: Positive = Field(
        1.0, description="llama3: longer waves than its share are scaled by all of factor"
    )
    high_freq_factor: Positive = Field(4.0, description="llama3: shorter waves than its share stay as they are")
    original_max_position: Count = Field(8192, description="llama3: tokens, the longest sequence before scaling")

    @model_validator(mode="after")
    def _ramp(self) -> Self:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("has no ramp between its factors; set high_freq_factor above low_freq_factor")
        return self
