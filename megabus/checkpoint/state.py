"""What a checkpoint holds beside tensors: `state.json`.

There is no generator's state in it, because a run has no generator: the data order, initial values and growth's
directions are pure functions of (train.seed, what they are for, where), see `megabus.data.order`, `megabus.counter`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from megabus.checkpoint.manifest import FORMAT, reading
from megabus.config import Layout, ModelConfig
from megabus.errors import UserError
from megabus.parallel.fragments import Kind

STATE = "state.json"
LONGEST = 2048  # tokens, of a model whose run is not known


@dataclass
class Progress:
    """How far a run has come. `position` is the place in the data order, in tokens: it runs ahead of `tokens` where a
    longer sequence must start at a multiple of itself, and where batches were passed over."""

    step: int = 0
    tokens: int = 0
    position: int = 0
    flops: float = 0.0
    stage_tokens: int = 0  # tokens and FLOPs at which the present stage began
    stage_flops: float = 0.0
    growths: list[dict[str, Any]] = field(default_factory=list)  # one row a growth, in order
    nonfinite: int = 0  # steps that left the weights as they were, and how many of them the last ones were
    nonfinite_in_a_row: int = 0
    rollbacks: int = 0


@dataclass
class SavedState:
    """kinds: the tensors that each parameter has; optimizer_step: Adam's count; monitor: κ's state; config: the whole
    configuration as plain values; data: what the data order depends on."""

    progress: Progress
    stage: int
    model: ModelConfig
    layout: Layout
    optimizer_step: int
    kinds: tuple[Kind, ...]
    monitor: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence in any stage of the run: what the model can be asked to read."""
        if not self.config:
            return LONGEST
        stages = self.config["growth"]["stages"]
        return max(self.config["train"]["seq_len"], *(stage.get("seq_len") or 0 for stage in stages), 0)


def write_state(folder: Path, state: SavedState) -> Path:
    tree = {"format": FORMAT} | {name: getattr(state, name) for name in SavedState.__dataclass_fields__}
    tree |= {"progress": asdict(state.progress), "layout": asdict(state.layout), "model": state.model.model_dump()}
    path = folder / STATE
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path


def read_state(folder: Path) -> SavedState:
    """The state of a checkpoint whose files were verified. Raises `UserError` where it has another format."""
    path = folder / STATE
    with reading(path):
        raw = path.read_bytes()
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT:
            problem = f"has format {tree['format']}, this megabus reads {FORMAT}"
            raise UserError("checkpoint", path, problem, "use the megabus that wrote it")
        return SavedState(
            progress=Progress(**tree["progress"]),
            stage=tree["stage"],
            model=ModelConfig.model_validate(tree["model"]),
            layout=Layout(**tree["layout"]),
            optimizer_step=tree["optimizer_step"],
            kinds=cast(tuple[Kind, ...], tuple(tree["kinds"])),
            monitor=tree["monitor"],
            config=tree["config"],
            data=tree["data"],
        )
    except (KeyError, TypeError, ValueError) as error:  # its bytes are as they were written: another version's
        problem = f"is not a state of format {FORMAT} ({type(error).__name__}: {error})"
        raise UserError("checkpoint", path, problem, "use the megabus that wrote it") from error
