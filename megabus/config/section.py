"""What sections of a YAML file are made of: numbers of some range, and what holds for every section."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Factor = Annotated[float, Field(ge=1.0)]
Angle = Annotated[float, Field(gt=0.0, le=pi)]
Exponent = Annotated[float, Field(gt=0.0, le=2.0)]  # of tiny numbers: a larger one makes infinities of them in fp32


def _whole(value: Any) -> Any:
    """Let counts be written 2e6: YAML reads that as a string or a float, and a budget is rarely typed in full."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[PositiveInt, Field(lt=2**63), BeforeValidator(_whole)]

# Sizes end far beyond what was ever trained (the deepest model had 1,000 layers: arXiv 2203.00555), and where what a
# wrong file says is refused before anything is built by it. A token file's ids have 31 bits at most.
Vocabulary = Annotated[PositiveInt, Field(le=2**31), BeforeValidator(_whole)]
Width = Annotated[PositiveInt, Field(le=2**20), BeforeValidator(_whole)]
MOST_LAYERS = 4096
Layers = Annotated[PositiveInt, Field(le=MOST_LAYERS), BeforeValidator(_whole)]
LayersOrNone = Annotated[NonNegativeInt, Field(le=MOST_LAYERS), BeforeValidator(_whole)]
Heads = Annotated[PositiveInt, Field(le=2**16), BeforeValidator(_whole)]  # and entries of one
Hidden = Annotated[PositiveInt, Field(le=2**24), BeforeValidator(_whole)]
Length = Annotated[PositiveInt, Field(le=2**27), BeforeValidator(_whole)]  # tokens of a sequence
Batch = Annotated[PositiveInt, Field(le=2**30), BeforeValidator(_whole)]  # sequences
Degree = Annotated[PositiveInt, Field(le=2**20), BeforeValidator(_whole)]  # ranks
STAGES = 100  # growths of a run

LEAST_WAIT, MOST_WAIT = 1.0, 604_800.0  # seconds; no clock of the machine's goes much further than a week


def _long_enough(seconds: float) -> float:
    if seconds < LEAST_WAIT:
        raise ValueError("is over before ranks have met, whatever is wrong; give 1 second or more, 600 is usual")
    return seconds


Wait = Annotated[float, Field(le=MOST_WAIT, json_schema_extra={"minimum": LEAST_WAIT}), AfterValidator(_long_enough)]


def in_line(values: Mapping[str, Any] | None) -> str:
    """A section's plain values as a line of YAML."""
    if values is None:
        return "null"
    return "{" + ", ".join(f"{key}: {as_written(value)}" for key, value in values.items()) + "}"


def as_written(value: Any) -> Any:
    """A plain value in a message: none and switches as a file has them, not as Python does."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value


class Section(BaseModel):
    """Every section refuses unknown keys and cannot change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` is no 1: pydantic would take it for a number, but for no section."""
        if not isinstance(value, bool):
            return value
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        if annotation is not bool and not any(issubclass(kind, BaseModel) for kind in kinds):
            raise ValueError("is true or false where no switch is; quote a word that YAML reads as one")
        return value
