"""What an evaluation is asked to do, and what an engine is built from for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ValidationInfo
from pydantic.dataclasses import dataclass

from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config.schema import LayoutConfig, OptimizerConfig, TrainConfig
from megabus.config.stages import Stage, single_stage
from megabus.errors import UserError
from megabus.nli.prompt import Template

if TYPE_CHECKING:
    from megabus.checkpoint.state import SavedState  # which needs torch; settings are checked without

RESULTS = "results.json"
LARGEST_MICRO_BATCH = 16


def _range(holds: Callable[[Any], bool], problem: str, remedy: str) -> AfterValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        if not holds(value):
            raise UserError("--" + str(info.field_name).replace("_", "-"), value, problem, remedy)
        return value

    return AfterValidator(check)


Count = Annotated[int, _range(lambda n: n >= 1, "is below 1", "give 1 or more")]
Positive = Annotated[float, _range(lambda x: 0 < x < float("inf"), "is not a positive number", "raise it")]
NonNegative = Annotated[float, _range(lambda x: 0 <= x < float("inf"), "is below 0", "give 0 or more")]
Share = Annotated[float, _range(lambda x: 0 <= x <= 1, "is no share", "give 0 to 1")]
Seed = Annotated[int, _range(lambda n: 0 <= n < 2**63, "is out of range", "give 0 to 2^63 - 1")]


@dataclass(frozen=True)
class Settings:
    """See `megabus evaluate-nli --help`. Counts in pairs; None: all of them, or found out from the checkpoint. Raises
    `UserError` on a number out of its range."""

    checkpoint: Path
    tokenizer: Path | None = None
    data: str | None = None
    split: tuple[str, ...] | None = None
    valid: Path | None = None
    test: Path | None = None
    train: Path | None = None
    limit: Count | None = None
    train_limit: Count | None = None
    baseline_pairs: Count | None = None
    template: Template = field(default_factory=Template)
    max_length: Count | None = None
    tp: Count = 1
    pp: Count = 1
    dp: Count | None = None
    micro_batch_size: Count | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Seed = 0
    hang_timeout: Positive = 600.0
    fine_tune: bool = False
    epochs: Positive = 1.0
    lr: Positive = 1e-3
    schedule: Literal["constant", "linear"] = "linear"
    warmup_share: Share = 0.0
    batch_size: Count = 32
    weight_decay: NonNegative = 0.0
    gradient_clipping: NonNegative = 1.0
    curve_every: Count = 100
    curve_pairs: Count = 1000
    save: Path | None = None
    out: Path | None = None
    predictions: bool = False

    def check(self) -> None:
        """Raise `UserError` on what can be seen before anything is read."""
        for wrong, key, value, problem, remedy in self._rules():
            if wrong:
                raise UserError(key, value, problem, remedy)

    def _rules(self) -> Iterator[tuple[object, str, object, str, str]]:
        """What would be wrong, and the error that says so; what comes later may rely on what comes before."""
        files = {"--valid": self.valid, "--test": self.test, "--train": self.train}
        given = {key: path for key, path in files.items() if path is not None}
        hub, splits, save, none = self.data is not None, self.split or (), self.save, "(missing)"
        reported, tuned_on = hub or self.valid or self.test, hub or self.train
        yield hub and given, "--data", self.data, f"and {next(iter(given), '')} are two sources", "give one of them"
        yield not reported, "--data", none, "there is nothing to evaluate", "give it, or --valid FILE"
        yield not hub and splits, "--split", " ".join(splits), "is of --data, which is not given", "leave it out"
        yield self.valid and self.valid == self.test, "--test", self.test, "is --valid too", "give it once"
        for split, count in Counter(splits).items():
            yield count > 1, "--split", split, "is given twice", "give it once"
        for key, path in given.items():
            yield not path.is_file(), key, path, "no such file", "check the path"
        nothing = "there is nothing to fine-tune on"
        yield self.fine_tune and not tuned_on, "--train", none, nothing, "give a file of pairs"
        yield save and not self.fine_tune, "--save", save, "there is nothing new to save", "add --fine-tune"
        other = "choose another, or remove it"
        yield save and complete(checkpoints_of(save)), "--save", save, "holds checkpoints already", other
        yield self.out and (self.out / RESULTS).exists(), "--out", self.out, "holds results already", other
        where = "there is no directory to write them to"
        yield self.predictions and self.out is None, "--predictions", "given", where, "give --out"

    def as_json(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def engine_parts(self, state: SavedState, world: int) -> tuple[TrainConfig, OptimizerConfig, Stage]:
        """The checkpoint's model with this evaluation's layout, batches and optimizer."""
        dp = self.dp or max(1, world // (self.tp * self.pp))
        micro, batch = self.micro_batch_size, self.batch_size
        if not self.fine_tune:
            micro = micro or LARGEST_MICRO_BATCH
            batch = micro * dp
        elif batch % (dp * (micro or 1)):
            parts = f"dp = {dp}" if micro is None else f"--micro-batch-size x dp = {micro} x {dp}"
            raise UserError("--batch-size", batch, f"is not divisible by {parts}", "choose a multiple")
        train = TrainConfig(
            seq_len=self.max_length or state.longest_sequence(),
            micro_batch_size=micro or next(n for n in range(LARGEST_MICRO_BATCH, 0, -1) if batch // dp % n == 0),
            global_batch_size=batch,
            precision=self.precision,
            gradient_clipping=self.gradient_clipping,
            seed=self.seed,
        )
        linear = {"schedule": "wsd", "decay_share": 1 - self.warmup_share}  # to 0, in a line after the warm-up
        schedule = linear if self.schedule == "linear" else {"schedule": "constant"}
        rates = {"lr": self.lr, "warmup_share": self.warmup_share, "weight_decay": self.weight_decay}
        optimizer = OptimizerConfig.model_validate(rates | schedule)
        layout = LayoutConfig(tp=self.tp, pp=self.pp, dp=self.dp)
        return train, optimizer, single_stage(state.model, layout, train, optimizer, world)
