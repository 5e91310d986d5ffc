"""What an evaluation is asked to do: how a pair becomes text, its options, and what an engine is built from for it."""

from __future__ import annotations

import string
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FilePath

from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import ModelConfig, Stage
from megabus.config.schema import LayoutConfig, OptimizerConfig, TrainConfig
from megabus.config.section import Count, Degree, NonNegative, Positive, Section, Wait
from megabus.config.stages import single_stage
from megabus.errors import UserError
from megabus.nli.pairs import LABELS, Pair

RESULTS = "results.json"
LARGEST_MICRO_BATCH = 16


@dataclass(frozen=True)
class Template:
    """text: with {premise} and {hypothesis}, and {{ for a brace; labels: what follows it, in the order of LABELS. The
    default is GPT-3's for such tasks (Brown et al. 2020, appendix G), as in lm-evaluation-harness's MNLI."""

    text: str = "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:"
    labels: tuple[str, ...] = (" True", " Neither", " False")

    def __post_init__(self) -> None:
        try:
            fields = sorted(name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None)
        except ValueError as error:
            raise UserError("--template", self.text, f"is malformed ({error})", "write {{ and }} for braces") from error
        if fields not in (["hypothesis"], ["hypothesis", "premise"]):
            problem = "must hold {hypothesis} once, {premise} at most once, and no other field"
            raise UserError("--template", self.text, problem, "see --help, and write {{ and }} for braces")
        for label, text in zip(LABELS, self.labels, strict=True):
            if not text.strip() or self.labels.count(text) > 1:
                problem = "is blank or another label's too"
                raise UserError("--labels", f"{label}={text!r}", problem, "give each a word of its own")

    def prompt(self, pair: Pair) -> str:
        return self.text.format_map(pair._asdict())

    def before_premise(self, pair: Pair) -> str:
        """The prompt's text up to the premise; all of it where it has none."""
        prompts = [self.prompt(pair._replace(premise=premise)) for premise in ("a", "b")]
        return commonprefix(prompts)  # noqa: RUF071 - of characters


class Settings(Section):
    """The options of `megabus evaluate-nli`, in the order of its --help. None: all, or as the checkpoint has it."""

    checkpoint: Path = Field(
        description="a run, one of its checkpoints, a Hugging Face directory or its name on the hub"
    )
    tokenizer: str | None = Field(None, description="its file, directory or hub name; the checkpoint's when left out")
    data: str | None = Field(None, description="snli, mnli, a hub data set of their form, or a local directory of one")
    split: tuple[str, ...] | None = Field(None, description="of --data, to report (test; mnli: both validation splits)")
    valid: FilePath | None = Field(None, description="file of pairs to report; the curve is measured on them too")
    test: FilePath | None = Field(None, description="file of pairs to report, and nothing else")
    train: FilePath | None = Field(None, description="file of pairs to fine-tune on, and to fit the baselines to")
    limit: Count | None = Field(None, description="report on the first pairs of each set, so many")
    train_limit: Count | None = Field(None, description="pairs to train on, drawn from the training pairs (all)")
    baseline_pairs: Count | None = Field(None, description="fit the baselines to so many of them (all)")
    template: Template = Field(Template(), description=r"text with {premise} and {hypothesis}, \n for a line break")
    max_length: Count | None = Field(None, description="tokens of a prompt; the run's longest sequence")
    tp: Degree = Field(1, description="tensor parallelism")
    pp: Degree = Field(1, description="pipeline parallelism")
    dp: Degree | None = Field(None, description="data parallelism; what is left of the ranks")
    micro_batch_size: Count | None = Field(None, description="sequences a rank computes at once (at most 16)")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of weights and activations")
    seed: int = Field(0, ge=0, lt=2**63, description="of orders, samples and resampling")
    hang_timeout: Wait = Field(600.0, description="seconds without progress before a rank ends")
    fine_tune: bool = Field(False, description="train on the gold labels; report before and after")
    epochs: Positive = Field(1.0, description="times that each training pair is seen")
    lr: Positive = Field(1e-3, description="highest learning rate")
    schedule: Literal["constant", "linear"] = Field("linear", description="course of the learning rate; linear: to 0")
    warmup_share: float = Field(0.0, ge=0, le=1, description="share of the steps to warm up over")
    batch_size: Count = Field(32, description="pairs a step, all ranks together")
    weight_decay: NonNegative = Field(0.0, description="on matrices of a gpt")
    gradient_clipping: NonNegative = Field(1.0, description="largest gradient norm; 0 clips nothing")
    curve_every: Count = Field(100, description="steps between points of the curve")
    curve_pairs: Count = Field(1000, description="pairs of a point")
    save: Path | None = Field(None, description="write the fine-tuned model there as a checkpoint")
    out: Path | None = Field(None, description="directory for results.json and a picture of each set")
    predictions: bool = Field(False, description="and every pair's scores, predictions.jsonl")

    def check(self) -> None:
        """Raise `UserError` on what can be seen before anything is read."""
        files = {"--valid": self.valid, "--test": self.test, "--train": self.train}
        file = next((key for key, path in files.items() if path is not None), None)
        hub, splits, save, out, none = self.data is not None, self.split or (), self.save, self.out, "(missing)"
        reported, tuned_on = hub or self.valid or self.test, hub or self.train or not self.fine_tune
        split, other = " ".join(splits), "choose another, or remove it"
        for wrong, key, value, problem, remedy in (
            (hub and file, "--data", self.data, f"and {file} are two sources", "give one of them"),
            (not reported, "--data", none, "there is nothing to evaluate", "give it, or --valid FILE"),
            (not hub and splits, "--split", split, "is of --data, which is not given", "leave it out"),
            (len({*splits}) < len(splits), "--split", split, "names one twice", "give each once"),
            (self.valid and self.valid == self.test, "--test", self.test, "is --valid too", "give it once"),
            (not tuned_on, "--train", none, "there is nothing to fine-tune on", "give a file of pairs"),
            (save and not self.fine_tune, "--save", save, "there is nothing new to save", "add --fine-tune"),
            (save and complete(checkpoints_of(save)), "--save", save, "holds checkpoints already", other),
            (out and (out / RESULTS).exists(), "--out", out, "holds results already", other),
            (self.predictions and not out, "--predictions", "given", "there is no directory for them", "give --out"),
        ):
            if wrong:
                raise UserError(key, value, problem, remedy)

    def engine_parts(self, model: ModelConfig, longest: int, world: int) -> tuple[TrainConfig, OptimizerConfig, Stage]:
        """The model with this evaluation's layout, batches and optimizer; `longest`: tokens that it can read."""

        def section(kind: type[Section], **others: Any) -> Any:
            """A section of a run's configuration: the keys that it shares with the settings, and others."""
            return kind.model_validate(self.model_dump(include={*kind.model_fields}) | others)

        dp = self.dp or max(1, world // (self.tp * self.pp))
        batch = self.batch_size if self.fine_tune else (self.micro_batch_size or LARGEST_MICRO_BATCH) * dp
        fitting = (n for n in range(LARGEST_MICRO_BATCH, 0, -1) if batch % (n * dp) == 0)
        micro = self.micro_batch_size or next(fitting, 1)
        if batch % (micro * dp):
            problem = f"is not divisible by --micro-batch-size x dp = {micro} x {dp}"
            raise UserError("--batch-size", batch, problem, "choose a multiple")
        length = self.max_length or longest
        train = section(TrainConfig, seq_len=length, micro_batch_size=micro, global_batch_size=batch)
        linear = {"schedule": "wsd", "decay_share": 1 - self.warmup_share}  # to 0, in a line after the warm-up
        optimizer = section(OptimizerConfig, **(linear if self.schedule == "linear" else {}))
        return train, optimizer, single_stage(model, section(LayoutConfig), train, optimizer, world)
