"""Where a run's rows go: `metrics.jsonl`, and wandb and TensorBoard if asked for."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabus.config import RunConfig
from megabus.errors import UserError
from megabus.report.history import RETURNS
from megabus.train.callbacks import Callback, Row

if TYPE_CHECKING:
    from megabus.train.run import Run

STEP = "trainer/step"  # wandb's x axis
FILE, TENSORBOARD, WANDB, WANDB_ID = SINKS = ("metrics.jsonl", "tensorboard", "wandb", "wandb-id")  # in a run_dir


class Metrics(Callback):
    """Rank 0's sinks. Every row is a flat-ish JSON object with `event` and the run's totals.

    `resumed_at`: the step that a resumed run goes on from; its rows follow those that are there. None begins anew.
    """

    def __init__(self, config: RunConfig, resumed_at: int | None = None) -> None:
        self.run_dir = Path(config.run_dir)
        self._other_error: Exception | None = None  # of wandb or TensorBoard, until `forget_lost`
        self._is_closed = False
        self.file = RowFile(self.run_dir / FILE, keep=resumed_at is not None)
        self.wandb = self._wandb(config) if config.log.wandb else None
        self.tensorboard = self._tensorboard(resumed_at) if config.log.tensorboard else None

    def _wandb(self, config: RunConfig) -> Any:
        import wandb

        try:
            run = wandb.init(
                project="megabus",
                name=self.run_dir.name,
                dir=str(self.run_dir),
                mode=config.log.wandb_mode,
                config=config.model_dump(),
                id=self._wandb_id(),
                resume="allow" if config.log.wandb_mode == "online" else None,  # offline, each start is a run
            )
        except wandb.errors.Error as error:
            raise UserError(
                "log.wandb_mode", config.log.wandb_mode, f"does not start ({error})", "log in, or set offline"
            ) from error
        # A step of our own: wandb's may not go back, as ours does after a return to a checkpoint.
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run

    def _wandb_id(self) -> str:
        """The same for every start of a run, so that a resumed one goes on in its own curves."""
        path = self.run_dir / WANDB_ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        return path.read_text()

    def _tensorboard(self, resumed_at: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1  # what came after is told anew
        return SummaryWriter(self.run_dir / TENSORBOARD, purge_step=purge)

    def on_row(self, run: Run, row: Row) -> None:
        self.write(row["event"], row)

    def on_end(self, run: Run) -> None:
        self.close()

    def write(self, event: str, row: Row) -> None:
        clean = _clean(row)
        self.file.write(json.dumps({"event": event, **clean}))
        numbers = dict(_numbers(event, clean))
        texts = [sample["prompt"] + sample["text"] for sample in row["samples"]] if event == "sample" else []
        if self.wandb is not None:
            with self._losing():
                self.wandb.log(numbers | self._table(event, texts) | {STEP: row["step"]})
        if self.tensorboard is not None:
            with self._losing():
                if event == "resume" and row.get("reason") in RETURNS:
                    self.tensorboard.close()
                    self.tensorboard = self._tensorboard(row["step"])
                for key, value in numbers.items():
                    self.tensorboard.add_scalar(key, value, row["step"])
                for number, text in enumerate(texts):
                    self.tensorboard.add_text(f"{event}/{number}", text, row["step"])

    def _table(self, event: str, texts: list[str]) -> dict[str, Any]:
        if not texts:
            return {}
        import wandb

        return {f"{event}/texts": wandb.Table(columns=["text"], data=[[text] for text in texts])}

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """wandb and TensorBoard keep no row that they cannot write: it is lost, and told. Whatever they raise, such as
        wandb's HandleAbandonedError when its service has crashed, is no reason to end a run."""
        try:
            yield
        except Exception as error:
            self._other_error = error

    @property
    def error(self) -> Exception | None:
        """Why something could not be written."""
        return self.file.error or self._other_error

    def forget_lost(self) -> None:
        """Whoever asks has been told of the rows that wandb or TensorBoard lost; those of the file still wait."""
        self._other_error = None

    def release(self) -> None:
        """However the run ends: what is still open then is of a run that has failed, and wandb is told so."""
        self.close(exit_code=1)

    def close(self, exit_code: int | None = None) -> None:
        """Only the first call does anything. exit_code: of wandb's run."""
        if self._is_closed:
            return
        self._is_closed = True
        self.file.close()
        if self.wandb is not None:
            with self._losing():
                self.wandb.finish(exit_code)
        if self.tensorboard is not None:
            with self._losing():
                self.tensorboard.close()


def _clean(value: Any) -> Any:
    """JSON knows no NaN: a loss that is none is written as null."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """`event/key`, and `event/key/inner` of what is nested: all numbers of a row."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(f"{key}/{name}", inner)
    elif isinstance(value, int | float):
        yield key, value


class RowFile:
    """A file of lines. What a full disk refuses is kept, and tried again with the next line; `error` says why, until
    it worked."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.error: OSError | None = None
        self._pending = b""
        self._file = path.open("ab", buffering=0)
        os.truncate(path, _whole_lines(path) if keep else 0)

    def write(self, line: str) -> None:
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
            self.error = None
        except OSError as error:
            self.error = error

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line: a killed run may have left a piece of one."""
    return path.read_bytes().rfind(b"\n") + 1
