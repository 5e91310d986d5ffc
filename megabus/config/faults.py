"""What a YAML file may say of accidents, `faults`, and of a look inside a run, `log.profile`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megabus.config.section import Count, Positive, Section, Wait


class SpikesConfig(Section):
    """A loss or gradient norm far above those of the last steps: such a step is skipped, as one that is not finite."""

    deviations: Positive = Field(
        12.0,
        description="times the spread (1.4826 MAD, which of normally distributed steps is a standard deviation) above "
        "the median of the window",
    )
    window: Annotated[Count, Field(ge=8, le=2**16)] = Field(
        128, description="updates of this stage that median and spread are of; half of them must be there"
    )
    lasting: Literal["roll_back", "accept"] = Field(
        "roll_back",
        description="more in a row than faults.max_skips: return to the last checkpoint, past their data, or take them "
        "for a new level, and begin the window anew",
    )


class FaultsConfig(Section):
    """What a run does about its accidents."""

    max_skips: Annotated[int, Field(ge=0)] = Field(
        3, description="steps in a row with a non-finite loss or gradient that are skipped; more roll back"
    )
    spikes: SpikesConfig | None = None
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        2, description="returns to the last checkpoint, past the data that failed, before the run gives up"
    )
    hang_timeout: Wait = Field(
        600.0,
        description="seconds without progress in which a rank ends, its stacks shown some seconds before; also how "
        "long they wait for each other at the start",
    )
    stop_exit_code: Annotated[int, Field(ge=0, le=255)] = Field(
        0, description="of a run that saved because of a signal or the stop file; a scheduler's requeue code"
    )


class ProfileConfig(Section):
    """Some steps under torch's profiler: a trace a rank, and a table of the operations that take most time."""

    start: Count = Field(description="the first of these steps; the first steps of a run are slower than others")
    steps: Annotated[Count, Field(le=1000)] = Field(3, description="how many")
    memory: bool = Field(False, description="on GPUs: a snapshot of what is allocated, for pytorch.org/memory_viz, too")
