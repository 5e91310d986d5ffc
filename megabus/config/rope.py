"""What a YAML file may say of RoPE beyond its base."""

from __future__ import annotations

from math import log
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megabus.config.section import Count, Factor, Positive, Section

Turns = Annotated[float, Field(ge=1e-3, le=1e6)]  # numbers of a size that logarithms, pairs and squares can be made of


class RopeScaling(Section):
    """How RoPE's frequencies are lowered for longer sequences, as imported models have it.

    linear: all by `factor`. llama3: those whose wave is longer than original_max_position / low_freq_factor by
    `factor`, those shorter than original_max_position / high_freq_factor not, with a ramp between. yarn (Peng et al.
    2023, arXiv 2309.00071): those that turn less than beta_slow times in original_max_position by `factor`, those that
    turn more than beta_fast times not, with a ramp over the pairs between; and rotated q and k become longer.
    """

    kind: Literal["linear", "llama3", "yarn"] = Field(description="how, see above")
    factor: Factor = Field(description="what frequencies are divided by")
    low_freq_factor: Positive = Field(
        1.0, description="llama3: longer waves than its share are scaled by all of factor"
    )
    high_freq_factor: Positive = Field(4.0, description="llama3: shorter waves than its share stay as they are")
    original_max_position: Count = Field(
        8192, description="llama3 and yarn: tokens, the longest sequence before scaling"
    )
    beta_fast: Turns = Field(32.0, description="yarn: frequencies that turn more often stay as they are")
    beta_slow: Turns = Field(1.0, description="yarn: frequencies that turn less often are scaled by all of factor")
    truncate: bool = Field(True, description="yarn: the ramp begins and ends at whole pairs")
    attention_factor: Turns | None = Field(
        None, description="yarn: what rotated q and k are multiplied by; 0.1 ln(factor) + 1 when left out"
    )

    @property
    def length(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * log(self.factor) + 1.0 if self.factor > 1 else 1.0)

    @model_validator(mode="after")
    def _ramp(self) -> Self:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("has no ramp between its factors; set high_freq_factor above low_freq_factor")
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError("has no ramp between its turns; set beta_fast above beta_slow")
        return self
