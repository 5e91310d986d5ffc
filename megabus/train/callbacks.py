"""Callbacks: told of all that a run does, on every rank. The log, the metrics and what users add are such."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from megabus.config import RunConfig
from megabus.config.schema import CallbackConfig
from megabus.errors import UserError, note, warn
from megabus.parallel.agree import on_any_rank, rank_0_says

if TYPE_CHECKING:
    from megabus.train.run import Run

Row = dict[str, Any]
HANDLERS = {"step": "on_step", "skip": "on_step", "eval": "on_eval", "growth": "on_growth", "save": "on_save"}
MOST_ANSWERS = 16  # rows that are each told because of the one before
TOTALS = ("step", "tokens", "flops", "stage")  # of the run, which every row has
OWN = {  # events of the trainer's rows
    *HANDLERS,
    *("start", "resume", "phase", "gains", "memory", "sample", "evaluation", "tasks", "profile"),
}


class Callback:
    """Told of what a run does. Derive from it, and write the methods that you need.

    Every rank has one, and calls it at the same places in the same order, so it may communicate. row: what
    `metrics.jsonl` gets, which is `row["event"]`, the run's totals and the event's own numbers; what rank 0 alone works
    out, such as κ's view of a validation, other ranks lack. run: the live `Run`, to be read; `run.tell(event, row)`,
    called on all ranks, writes a row of one's own into every sink once the method has returned on every rank. on_error:
    what an exception does, end the run with a checkpoint or go on without the callback.
    """

    on_error: Literal["stop", "drop"] = "stop"

    def on_row(self, run: Run, row: Row) -> None:
        """Every row, of whatever event. As it stands it calls the method of that event, if there is one."""
        if (name := HANDLERS.get(row["event"])) is not None:
            getattr(self, name)(run, row)

    def on_step(self, run: Run, row: Row) -> None:
        """After an optimizer step. Where it made no update, because loss or grad_norm are not finite or a spike, the
        event is "skip"."""

    def on_eval(self, run: Run, row: Row) -> None:
        """After a validation."""

    def before_growth(self, run: Run) -> None:
        """When it is decided to grow: the engine is still the one that has trained."""

    def on_growth(self, run: Run, row: Row) -> None:
        """After a growth: the engine is the grown one."""

    def on_save(self, run: Run, row: Row) -> None:
        """After a checkpoint was written, or could not be (`row["error"]`)."""

    def on_end(self, run: Run) -> None:
        """Before the engine is closed at the end of a run, or where it was asked to stop; not after an error. It is
        told nothing after that."""


class CallbackError(UserError):
    """What a user's callback has ended a run with. complete: the checkpoint of a run that had come to its end all the
    same."""

    complete: Path | None = None


class Guarded(Callback):
    """A user's callback: what it raises on a rank is known to all ranks at once, which then drop it together, or end
    the run. Costs one small all-reduce each time that it is told something."""

    def __init__(self, callback: Callback, key: str) -> None:
        self.callback, self.key = callback, key
        self.failure: CallbackError | None = None  # that the run ends with, the same on every rank
        self.is_over = False

    def on_row(self, run: Run, row: Row) -> None:
        name, kind = HANDLERS.get(row["event"], "on_row"), type(self.callback)
        if kind.on_row is not Callback.on_row or getattr(kind, name) is not getattr(Callback, name):
            self._call(run, name, lambda: self.callback.on_row(run, row))

    def before_growth(self, run: Run) -> None:
        if type(self.callback).before_growth is not Callback.before_growth:
            self._call(run, "before_growth", lambda: self.callback.before_growth(run))

    def on_end(self, run: Run) -> None:
        self._call(run, "on_end", lambda: self.callback.on_end(run))

    def _call(self, run: Run, name: str, call: Callable[[], None]) -> None:
        if self.is_over:
            return
        run.watchdog.heartbeat(f"{self.key}.{name}")
        error: Exception | SystemExit | None = None
        # Told at once, its rows would call other guarded callbacks: on some ranks alone, where it raises on others.
        held: list[tuple[str, Row]] = []
        run.held = held
        try:
            call()
        except (Exception, SystemExit) as caught:  # `sys.exit()` in it would leave the other ranks waiting
            error = caught
            note(f"rank {dist.get_rank()}: {self.key}.{name} raised\n{traceback.format_exc()}")
        finally:
            run.held = None
        if on_any_rank([error is not None], run.engine.device)[0]:
            self._fail(run, name, error)
            return
        self.is_over = name == "on_end"
        run.answers += 1
        for event, row in held:
            run.tell(event, row)
        run.answers -= 1

    def _fail(self, run: Run, name: str, error: Exception | SystemExit | None) -> None:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
        rank, text = next((rank, text) for rank, text in enumerate(messages) if text is not None)
        problem = f"raised {text} in {name} after step {run.progress.step}, on rank {rank}"
        value, self.is_over = type(self.callback).__name__, True
        if self.callback.on_error == "drop":
            rank_0_says(str(UserError(self.key, value, problem, "it is told nothing any more")), warn)
            return
        rank_0_says(f"{self.key}: {value} {problem}: the run ends", warn)
        remedy = "all that was trained is saved: mend it and start again, or set on_error: drop"
        self.failure, run.stopping = CallbackError(self.key, value, problem, remedy), True


def checked(event: str, row: Row, answers: int) -> Row:
    """A copy of a row that a user's callback tells. Raises on every rank what rank 0's sinks alone would, or who reads
    them: `TypeError` for what JSON has no form for, and `ValueError` for an event or a key that has its own meaning
    there. answers: how many rows each told because of another this one follows; `RecursionError` for
    too many."""
    if answers > MOST_ANSWERS:
        raise RecursionError(f"run.tell: {event!r} is told because it was told: look at row['event'] first")
    for key in TOTALS:
        if key in row:
            raise ValueError(f"run.tell: {key} = {row[key]!r}: every row has the run's own: choose another name")
    if event in OWN or "event" in row:
        raise ValueError(
            f"run.tell: {row.get('event', event)!r} cannot be told: choose a name that the trainer has not"
        )
    json.dumps(row)
    return copy.deepcopy(row)


def guarded(config: RunConfig, passed: Sequence[Callback]) -> list[Guarded]:
    """The callbacks that the configuration names, made, then those that were passed. Raises `UserError` for what cannot
    be imported or made."""
    made = {f"callbacks.{n}": _made(f"callbacks.{n}", entry) for n, entry in enumerate(config.callbacks)}
    for n, callback in enumerate(passed):
        _check_kind(f"callbacks[{n}]", callback, type(callback).__name__)
        if callback.on_error not in ("stop", "drop"):
            raise UserError(
                f"callbacks[{n}].on_error", callback.on_error, "is neither stop nor drop", "set one of them"
            )
        made[f"callbacks[{n}]"] = callback
    return [Guarded(callback, key) for key, callback in made.items()]


def check_alike(users: Sequence[Guarded]) -> None:
    """Raise `UserError` on all ranks unless all have the same: ranks wait for each other where one is told something.
    Collective."""
    callbacks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(callbacks, [type(user.callback).__name__ for user in users])
    for rank, names in enumerate(callbacks):
        if names != callbacks[0]:
            problem = f"are what rank {rank} has, and rank 0 has {', '.join(callbacks[0]) or 'none'}"
            raise UserError(
                "callbacks", ", ".join(names) or "none", problem, "give every rank as many of the same kind"
            )


def _made(key: str, entry: CallbackConfig) -> Callback:
    kind = _imported(key, entry.name)
    try:
        callback = kind(**entry.arguments)
    except (Exception, SystemExit) as error:
        if (where := _where(error)) is None:  # the class was not even entered
            problem = f"of {entry.name} are not taken ({_said(error)})"
            raise UserError(f"{key}.arguments", entry.arguments, problem, "mend them, or the class") from error
        problem = f"cannot be made ({_said(error)}{where})"
        raise UserError(key, entry.name, problem, f"mend the class, or {key}.arguments") from error
    _check_kind(key, callback, entry.name)
    callback.on_error = entry.on_error
    return callback


def _imported(key: str, name: str) -> Any:
    """The class of `module:Class` or `path/to/file.py:Class`."""
    place, _, attribute = name.rpartition(":")
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else import_module(place)
    except (Exception, SystemExit) as error:  # of a script that is meant to be run
        remedy = "mend the name (path/to/file.py:Class or module:Class), or the file"
        raise UserError(key, name, f"cannot be imported ({_said(error)}{_where(error) or ''})", remedy) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise UserError(key, name, f"{place} has no {attribute}", "name a class of it") from error


def _module_of(path: Path) -> ModuleType:
    name = str(path.resolve())  # no other module's
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # it ends in .py
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_kind(key: str, callback: object, name: str) -> None:
    if not isinstance(callback, Callback):
        raise UserError(key, name, "is no megabus.Callback", "derive its class from that")


def _said(error: Exception | SystemExit) -> str:
    return f"{type(error).__name__}: {error}"


def _where(error: Exception | SystemExit) -> str | None:
    """Where code that is not the trainer's raised it, `, file.py:3`: in the user's own file, where it has come from a
    library that this called. None where there was none."""
    passed = (__file__, importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    others = [frame for frame in frames if frame.filename not in passed]
    if not others:
        return None
    own = [frame for frame in others if frame.filename in sys.modules or frame.filename == others[0].filename]
    return f", {Path(own[-1].filename).name}:{own[-1].lineno}"
