"""What an evaluation is asked to do, and the engine's configuration that follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import RunConfig, parse_config
from megabus.errors import UserError
from megabus.nli.prompt import Template

if TYPE_CHECKING:
    from megabus.checkpoint.state import SavedState  # which needs torch; settings are checked without

RESULTS = "results.json"
LARGEST_MICRO_BATCH = 16


@dataclass(frozen=True)
class Settings:
    """See `megabus evaluate-nli --help`. Counts in pairs; None: all of them, or found out from the checkpoint."""

    checkpoint: Path
    tokenizer: Path | None = None
    data: str | None = None
    split: tuple[str, ...] | None = None
    valid: Path | None = None
    test: Path | None = None
    train: Path | None = None
    limit: int | None = None
    train_limit: int | None = None
    baseline_pairs: int | None = None
    template: Template = field(default_factory=Template)
    max_length: int | None = None
    tp: int = 1
    pp: int = 1
    dp: int | None = None
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    hang_timeout: float = 600.0
    fine_tune: bool = False
    epochs: float = 1.0
    lr: float = 1e-3
    schedule: Literal["constant", "linear"] = "linear"
    warmup_share: float = 0.0
    batch_size: int = 32
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0
    curve_every: int = 100
    curve_pairs: int = 1000
    save: Path | None = None
    out: Path | None = None
    predictions: bool = False

    def check(self) -> None:
        """Raise `UserError` on what can be seen before anything is read."""
        local = {"--valid": self.valid, "--test": self.test, "--train": self.train}
        given = [key for key, path in local.items() if path is not None]
        if self.data is not None and given:
            raise UserError("--data", self.data, f"and {given[0]} are two sources", "give one of them")
        if self.data is None and self.valid is None and self.test is None:
            raise UserError("--data", "(missing)", "there is nothing to evaluate", "give it, or --valid FILE")
        if self.data is None and self.split is not None:
            raise UserError("--split", " ".join(self.split), "is of --data, which is not given", "leave it out")
        if self.valid is not None and self.valid == self.test:
            raise UserError("--test", self.test, "is --valid too", "give it once")
        for split in self.split or ():
            if self.split is not None and self.split.count(split) > 1:
                raise UserError("--split", split, "is given twice", "give it once")
        for key, path in local.items():
            if path is not None and not path.is_file():
                raise UserError(key, path, "no such file", "check the path")
        if self.fine_tune and self.data is None and self.train is None:
            raise UserError("--train", "(missing)", "there is nothing to fine-tune on", "give a file of pairs")
        self._check_numbers()
        if self.save is not None and not self.fine_tune:
            raise UserError("--save", self.save, "there is nothing new to save", "add --fine-tune")
        if self.save is not None and complete(checkpoints_of(self.save)):
            raise UserError("--save", self.save, "holds checkpoints already", "choose another, or remove it")
        if self.out is not None and (self.out / RESULTS).exists():
            raise UserError("--out", self.out, "holds results already", "choose another, or remove it")
        if self.predictions and self.out is None:
            raise UserError("--predictions", "given", "there is no directory to write them to", "give --out")

    def _check_numbers(self) -> None:
        for name in ("limit", "train_limit", "baseline_pairs", "max_length", "tp", "pp", "dp"):
            _at_least_1(name, getattr(self, name))
        for name in ("micro_batch_size", "batch_size", "curve_every", "curve_pairs"):
            _at_least_1(name, getattr(self, name))
        for name in ("epochs", "lr", "hang_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(_option(name), getattr(self, name), "is not a positive number", "raise it")
        for name in ("weight_decay", "gradient_clipping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(_option(name), getattr(self, name), "is below 0", "give 0 or more")
        if not 0 <= self.warmup_share <= 1:
            raise UserError("--warmup-share", self.warmup_share, "is no share", "give 0 to 1")
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed", self.seed, "is out of range", "give 0 to 2^63 - 1")

    def as_json(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least_1(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(_option(name), value, "is below 1", "give 1 or more")


def run_config(settings: Settings, state: SavedState, world: int) -> RunConfig:
    """The engine's configuration: the checkpoint's model with this evaluation's layout, batches and optimizer."""
    dp = settings.dp or max(1, world // (settings.tp * settings.pp))
    micro, batch = settings.micro_batch_size, settings.batch_size
    if not settings.fine_tune:
        micro = micro or LARGEST_MICRO_BATCH
        batch = micro * dp
    elif batch % (dp * (micro or 1)):
        parts = f"dp = {dp}" if micro is None else f"--micro-batch-size x dp = {micro} x {dp}"
        raise UserError("--batch-size", batch, f"is not divisible by {parts}", "choose a multiple")
    elif micro is None:
        micro = next(size for size in range(LARGEST_MICRO_BATCH, 0, -1) if batch // dp % size == 0)
    data = settings.data or settings.valid or settings.test
    return parse_config(
        {
            "run_dir": str(settings.save or settings.checkpoint),
            "model": state.model.model_dump(),
            "layout": {"tp": settings.tp, "pp": settings.pp, "dp": settings.dp},
            "train": {
                "seq_len": settings.max_length or state.longest_sequence(),
                "micro_batch_size": micro,
                "global_batch_size": batch,
                "max_steps": 1,  # unused: the pairs and the epochs are the budget
                "precision": settings.precision,
                "gradient_clipping": settings.gradient_clipping,
                "seed": settings.seed,
            },
            "optimizer": schedule_of(settings.schedule, settings.lr, settings.warmup_share)
            | {"weight_decay": settings.weight_decay},
            "data": {"train": str(settings.train or data), "valid": str(data)},
        }
    )


def schedule_of(kind: str, lr: float, warmup_share: float) -> dict[str, Any]:
    """The optimizer's keys for a learning rate that stays, or falls to 0 in a line after the warm-up."""
    if kind == "constant":
        return {"lr": lr, "schedule": "constant", "warmup_share": warmup_share}
    return {"lr": lr, "schedule": "wsd", "warmup_share": warmup_share, "decay_share": 1 - warmup_share}
