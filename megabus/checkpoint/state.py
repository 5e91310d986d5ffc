"""What a checkpoint holds beside tensors: `state.json`.

There is no generator's state in it, because a run has no generator: the data order, initial values and growth's
directions are pure functions of (train.seed, what they are for, where), see `megabus.data.order`, `megabus.counter`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator

from megabus.checkpoint.manifest import FORMAT, STATE, STRICT, DamagedError, check_format, reading, validated
from megabus.checkpoint.relations import Whole, check_relations
from megabus.checkpoint.written import less
from megabus.config import Layout, ModelConfig
from megabus.data.order import Deal
from megabus.errors import UserError
from megabus.parallel.fragments import Kind
from megabus.plain_file import parse_json, read_regular

LONGEST = 2048  # tokens, of a model whose run is not known

# Keys that every state of this format has. Those that come later have defaults, by which nothing changes.
WRITTEN = {
    "progress": "step tokens position flops stage_tokens stage_flops growths nonfinite nonfinite_in_a_row rollbacks",
    "model": "kind vocab_size d_model n_layers n_heads n_kv_heads head_dim d_ff rope_theta rope_scaling alpha_init "
    "init_std norm_eps",
    "model.rope_scaling": "kind factor low_freq_factor high_freq_factor original_max_position",
    "monitor": "span curve met nonfinite",
    "monitor.span": "index n_params kappa tokens flops max_tokens max_flops",
}

Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Mark:
    """A run's totals where steps of one kind began: at its start, a growth, a return to a checkpoint, or a resume with
    other batches. Since then every step has added the same `step_tokens` and `step_flops`. optimizer_step: Adam's
    count there."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step: Whole
    tokens: Whole
    position: Whole
    flops: Amount
    nonfinite: Whole
    optimizer_step: Whole
    step_tokens: Whole
    step_flops: Amount


@dataclass
class Progress:
    """How far a run has come. `position` is the place in the data order, in tokens: it runs ahead of `tokens` where a
    longer sequence must start at a multiple of itself, and where batches were passed over."""

    step: Whole = 0
    tokens: Whole = 0
    position: Whole = 0
    flops: Amount = 0.0
    stage_tokens: Whole = 0  # tokens and FLOPs at which the present stage began
    stage_flops: Amount = 0.0
    growths: list[dict[str, Any]] = field(default_factory=list)  # one row a growth, in order
    nonfinite: Whole = 0  # steps that left the weights as they were, and how many of them the last ones were
    nonfinite_in_a_row: Whole = 0
    rollbacks: Whole = 0
    since: Mark | None = None  # None: no run
    deals: tuple[Deal, ...] = ()  # how the corpora were dealt out so far; none: by the weights in config, from 0 on
    spikes: Whole = 0  # of `nonfinite` those whose loss and gradients were numbers

    def mark(self, optimizer_step: int, step_tokens: int, step_flops: float) -> None:
        """From now on each step adds so much."""
        now = (self.step, self.tokens, self.position, self.flops, self.nonfinite)
        self.since = Mark(*now, optimizer_step, step_tokens, step_flops)


def _as_written(value: Any, read: ValidatorFunctionWrapHandler) -> ModelConfig:
    """A model of a file that a program wrote: what a person may write otherwise, "1e3" for 1000, is damage there."""
    model: ModelConfig = read(value)
    now = model.model_dump(mode="json")
    for key, said in value.items():
        if json.dumps(said, sort_keys=True) != json.dumps(less(now[key], said), sort_keys=True):
            raise ValueError(f"{key} is no {type(now[key]).__name__} as it is saved")
    return model


@dataclass
class SavedState:
    """kinds: the tensors that each parameter has; optimizer_step: Adam's count; monitor: κ's state; config: the whole
    configuration as plain values; data: what the data order depends on. The last three are empty where no run was.
    recent: losses and gradient norms of the stage's last updates, by which a spike is told; empty where none is looked
    for. averaged: of how many updates each running mean of the weights is, by its kind."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    progress: Progress
    stage: Whole
    model: Annotated[ModelConfig, WrapValidator(_as_written)]
    layout: Layout
    optimizer_step: Whole
    kinds: tuple[Kind, ...]
    monitor: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    recent: list[tuple[Amount, Amount]] = field(default_factory=list)
    averaged: dict[str, Whole] = field(default_factory=dict)

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence in any stage of the run: what the model can be asked to read."""
        if not self.config:
            return LONGEST
        train = self.config["train"]
        changes = [*self.config["growth"]["stages"], *train.get("phases", [])]
        return max(train["seq_len"], *(change.get("seq_len") or 0 for change in changes), 0)


def tokenizers_of(state: SavedState) -> set[str]:
    """Hashes of the tokenizers that a run's data was made with; none where no run was, or none is known."""
    corpora = [data for name in ("train", "valid") if isinstance(data := state.data.get(name), dict)]
    lists = [known for data in corpora if isinstance(known := data.get("tokenizers"), list)]
    return {sha256 for known in lists for sha256 in known if isinstance(sha256, str)}


def weights_alone(state: SavedState) -> SavedState:
    """The same with weights, no moments and no running means: Adam counts anew from here on."""
    progress, since = replace(state.progress), state.progress.since
    if since is not None:
        progress.mark(0, since.step_tokens, since.step_flops)
    return replace(state, kinds=("weight",), optimizer_step=0, progress=progress, averaged={})


def without_run(state: SavedState, model: ModelConfig) -> SavedState:
    """Weights of a model that the run never had: of what was said of the run, only its longest sequence holds still."""
    config = {"train": {"seq_len": state.longest_sequence()}, "growth": {"stages": []}} if state.config else {}
    return SavedState(Progress(), 0, model, state.layout, 0, ("weight",), {}, config, {})


_STATE: TypeAdapter[SavedState] = TypeAdapter(SavedState)


def write_state(folder: Path, state: SavedState) -> Path:
    tree = {"format": FORMAT} | {item.name: getattr(state, item.name) for item in fields(SavedState)}
    tree |= {"progress": asdict(state.progress), "layout": asdict(state.layout), "model": state.model.model_dump()}
    path = folder / STATE
    path.write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")  # read_state refuses a NaN
    return path


def read_state(folder: Path) -> SavedState:
    """The state of a checkpoint, each of its values of its type and in its range. Raises `DamagedError` naming the
    first key that is not, and `UserError` where it has another format."""
    path = folder / STATE
    with reading(path):
        raw = read_regular(path)
    try:
        tree = parse_json(raw)
    except ValueError as error:
        raise DamagedError(path, f"is damaged (it is not JSON as it is saved: {error})") from error
    if not isinstance(tree, dict):
        raise DamagedError(path, "is damaged (it holds no keys)")
    check_format(path, tree)
    for section, keys in WRITTEN.items():
        found = _section(tree, section)
        absent = [key for key in keys.split() if found is not None and key not in found]
        if absent and (found or section != "monitor"):  # which is empty where no run was
            raise DamagedError(path, f"is damaged ({section}.{absent[0]}: is missing)")
    state = validated(_STATE, {key: value for key, value in tree.items() if key != "format"}, path)
    try:
        check_relations(path, state)
    except UserError as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(path, f"is damaged ({error.key} = {error.value}: {error.problem})") from error
    except ValueError as error:
        raise DamagedError(path, f"is damaged ({error})") from error
    return state


def _section(tree: Any, key: str) -> dict[str, Any] | None:
    """The section of a dotted key; None where something else or nothing stands, which types tell."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None
