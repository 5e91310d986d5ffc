"""Whether a checkpoint may go on under a configuration, and what has changed between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megabus.checkpoint.contents import Found, listed_tokenizer
from megabus.checkpoint.state import SavedState, tokenizers_of
from megabus.config import ModelConfig, RunConfig, Stage, parse_config, resolve_stages
from megabus.config.effects import without_effect
from megabus.config.free import FREE, FREE_KEYS
from megabus.config.model import INITIAL
from megabus.config.schema import StageConfig
from megabus.config.section import as_written, in_line
from megabus.config.stages import stage_section
from megabus.data.batches import TokenSource
from megabus.data.sources import Sources
from megabus.data.tokenizer import Tokenizer, check_carried, read_tokenizer_files
from megabus.errors import UserError
from megabus.train.horizon import horizon_factor, planned_steps

if TYPE_CHECKING:  # a start need not have it
    from megabus.convert.source import FolderSource

MASK = "document_mask"
GO_BACK = "set it back, or choose another run_dir"


class Origin(Protocol):
    """What says where it lies and which model it is."""

    @property
    def folder(self) -> Path: ...

    @property
    def state(self) -> SavedState: ...


def data_order(sources: Sources) -> dict[str, Any]:
    """What the place of every token in training and validation depends on, and what it sees, as JSON has it."""

    def facts(source: TokenSource) -> dict[str, Any]:
        files = [[file.n_tokens for file in corpus.files] for corpus in source.corpora]
        return {
            "tokens": [corpus.n_tokens for corpus in source.corpora],
            "blend": list(source.counts),
            "chunk_len": source.chunk_len,
            "tokenizers": sorted(source.tokenizers),
        } | ({"files": files} if any(len(each) > 1 for each in files) else {})

    apart = {MASK: True} if sources.document_mask else {}
    return {"train": facts(sources.train), "valid": facts(sources.valid), "valid_tokens": sources.valid_tokens} | apart


def check_stage(found: Found, config: RunConfig, stages: list[Stage]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of all that has changed in the configuration since the checkpoint was saved.

    Raises `UserError` if the run of `config` has no such stage; with `resume: strict` also for any change but those
    that leave the run's mathematics as they are (layout, micro batches, logging, saving, paths, keys without effect).
    """
    saved = found.state
    if not saved.monitor:  # made by a conversion or an evaluation
        problem = f"holds {found.folder.name}, weights without a run"
        raise UserError("run_dir", config.run_dir, problem, "give it as init_from, with another run_dir")
    if saved.stage >= len(stages):
        problem = f"has {len(stages) - 1} growths, {found.folder.name} comes after growth {saved.stage}"
        raise UserError("growth.stages", len(stages) - 1, problem, "keep the growths that were made")
    _check_follows(found, config, stages[saved.stage])
    _check_same(found, stages[saved.stage], config.growth.stages[: saved.stage], _shape, GO_BACK)
    was_set, idle = _as_read_now(saved.config)
    changes = list(_changes(was_set, config.model_dump(mode="json")))
    changes = [(key, was, is_now) for key, was, is_now in changes if key not in idle or idle[key] != is_now]
    _check_unchanged(found, config, changes)
    return changes


def check_layouts(config: RunConfig, found: Found | None, world: int) -> None:
    """Raise `UserError` for a layout that a stage from here on does not fit. What was newest before all was looked at
    may have been of a later stage, and damaged."""
    resolve_stages(config, world, saved=True, begun_at=lambda: 0 if found is None else found.state.stage)


def check_continues(found: Found, config: RunConfig, stages: list[Stage], data: dict[str, Any]) -> list[str]:
    """What has changed since the checkpoint was saved, a line for each change, the contents of data among them.

    Raises `UserError` as `check_stage` does, and so for other data.
    """
    changes = check_stage(found, config, stages)
    before, after = ({MASK: False} | each for each in (found.state.data, data))  # said there only where it is true
    for key, was, is_now in _changes(before, after):
        changes.append((f"data.{key}" if key == MASK else f"contents of data: {key}", was, is_now))
    _check_unchanged(found, config, changes)
    lines = [f"{key}: {as_written(was)} -> {as_written(is_now)}" for key, was, is_now in changes]
    was_averaged = _as_read_now(found.state.config)[0]["train"].get("ema", [])
    if set(was_averaged) != set(config.train.ema):  # free to change, though what is saved changes
        lines.append(f"train.ema: {was_averaged} -> {config.train.ema}; a new mean begins with the weights as they are")
    return lines + (_rates(found, config, stages) if changes else [])


def _check_unchanged(found: Found, config: RunConfig, changes: list[tuple[str, Any, Any]]) -> None:
    if changes and config.resume == "strict":
        key, was, is_now = changes[0]
        problem = f"was {as_written(was)} in {found.folder}"
        raise UserError(key, as_written(is_now), problem, "set it back, or resume=auto")


def _as_read_now(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A saved configuration with the keys that have come since, for those that are left out change nothing; and of each
    key that is refused now because it has no effect the value that does the same: that must be free to go."""
    try:
        parsed = parse_config(config)
    except UserError:  # of another version, which may have had keys that are gone: shown as they are
        return config, {}
    return parsed.model_dump(mode="json"), without_effect(parsed)


def _rates(found: Found, config: RunConfig, stages: list[Stage]) -> list[str]:
    """A line where other planned steps change all learning rates, which no key says, or may have changed them."""
    is_now = horizon_factor(config, stages)
    if is_now is None:
        return []
    try:
        before = parse_config(found.state.config)
        planned = resolve_stages(before, found.state.layout.world, saved=True)
    except UserError as error:
        line = f"{is_now:.3g} times optimizer.lr by optimizer.transfer, and what they were is unknown"
        return [f"all learning rates: {line} ({error.within(f'config of {found.folder}')})"]
    was = horizon_factor(before, planned)
    if was is None or was == is_now:
        return []
    steps = f"{planned_steps(before.train, planned)} -> {planned_steps(config.train, stages)}"
    return [
        f"all learning rates: {is_now / was:.3g} times what they were, by optimizer.transfer (planned steps {steps})"
    ]


def tokenizer_of(origin: Found | FolderSource) -> Path | None:
    """The tokenizer that lies with weights; None where none does, or none that can be read."""
    return listed_tokenizer(origin.folder, origin.entries) if isinstance(origin, Found) else origin.tokenizer


def check_tokenizer(origin: Found | FolderSource, sources: Sources) -> None:
    """Raise `UserError` where the weights know another tokenizer's ids, by the files saved with them and by what their
    data was made with."""
    path = tokenizer_of(origin)
    files = None if path is None else read_tokenizer_files(path)
    sources.check_tokenizer(tokenizers_of(origin.state), f"the weights of {origin.folder}", files)


def check_taken_over(origin: Found | FolderSource, config: RunConfig, stage: Stage) -> None:
    """Raise `UserError` where the tokenizer that lies with the weights would go into the run's checkpoints and could
    not be used there: without `data.tokenizer` nothing has looked at it yet."""
    path = tokenizer_of(origin)
    if config.data.tokenizer is not None or path is None:
        return
    tokenizer = Tokenizer(path)
    try:
        check_carried(tokenizer, stage.model.vocab_size, "init_from", path)
    except UserError as error:
        remedy = "begin from a copy of the weights without it, or name another as data.tokenizer"
        if (n := tokenizer.vocab_size) > stage.model.vocab_size:
            rows = f"give its pieces rows: model.vocab_size: {n}, extend_vocabulary: true, data.tokenizer: {path}"
            remedy = f"{rows}; or begin from a copy of the weights without it"
        raise UserError("init_from", path, f"holds a tokenizer that {error.problem}", remedy) from error


def check_begins(origin: Origin, stage: Stage, extend: bool = False) -> None:
    """Raise `UserError` unless the stage's model can begin with the checkpoint's weights. What gains are stored in
    multiples of may differ: `restore` re-expresses them. extend: the vocabulary may be larger."""
    said = origin.state.model.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    was, is_now = origin.state.model.vocab_size, stage.model.vocab_size
    if is_now > was and not extend:
        remedy = f"set it to {was}, or give a tokenizer that has more pieces and set extend_vocabulary to true"
        raise UserError("model.vocab_size", is_now, f"is {was} in {origin.folder}", remedy)
    if is_now < was:
        raise UserError("model.vocab_size", is_now, f"is {was} in {origin.folder}", f"set it to {was}: no row goes")
    _check_same(origin, stage, [], _function, f"give the model that was saved: {in_line(said)}")


def _check_same(
    found: Origin,
    stage: Stage,
    growths: Sequence[StageConfig],
    facts: Callable[[ModelConfig], dict[str, Any]],
    remedy: str,
) -> None:
    """growths: sections of the growths up to the stage, the last of which that says a size is where it comes from."""
    now = facts(stage.model)
    for key, value in facts(found.state.model).items():
        if now[key] != value:
            said = [n for n, growth in enumerate(growths, 1) if getattr(growth, key, None) is not None]
            where = stage_section(said[-1] if said else 0)
            raise UserError(f"{where}.{key}", now[key], f"is {value} in {found.folder}", remedy)


def _check_follows(found: Found, config: RunConfig, stage: Stage) -> None:
    """What follows from optimizer.transfer has the values of no key of the file: name those that it follows from."""
    saved, tuned = found.state, config.optimizer.model_dump(mode="json")["transfer"]
    for key in INITIAL["ngpt"]:
        if getattr(saved.model, key) != getattr(stage.model, key):
            before = saved.config["optimizer"].get("transfer")
            if before != tuned:
                problem = f"was {in_line(before)} in {found.folder}, and {key} follows from it"
                raise UserError("optimizer.transfer", in_line(tuned), problem, GO_BACK)
            own, was = getattr(config.model, key), saved.config["model"].get(key, getattr(saved.model, key))
            if own != was:
                raise UserError(f"model.{key}", own, f"is {was} in {found.folder}", GO_BACK)


def _shape(model: ModelConfig) -> dict[str, Any]:
    """All that a model's raw weights stand for."""
    free = {*INITIAL["gpt"], "export_as"}
    return model.model_dump(exclude=free) | {"n_kv_heads": model.kv_heads}


def _function(model: ModelConfig) -> dict[str, Any]:
    """All that its function depends on, given its vocabulary and what its gains act as."""
    return {key: value for key, value in _shape(model).items() if key not in (*INITIAL["ngpt"], "vocab_size")}


def _changes(was: Any, is_now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs and counts."""
    if isinstance(was, dict) and isinstance(is_now, dict):
        for name in was | is_now:
            if name not in (FREE_KEYS if key else FREE):
                yield from _changes(was.get(name), is_now.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(was, list) and isinstance(is_now, list) and len(was) == len(is_now):
        for number, pair in enumerate(zip(was, is_now, strict=True)):
            yield from _changes(*pair, f"{key}.{number}")
    elif was != is_now:
        yield key, was, is_now
