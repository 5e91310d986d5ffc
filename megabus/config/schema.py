"""What a YAML file may say. Types and ranges only: how keys must fit together is `stages.py`'s business."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from megabus.config.after_growth import BoostConfig, RewarmConfig, SettleConfig
from megabus.config.faults import FaultsConfig, ProfileConfig
from megabus.config.model import ModelConfig as ModelConfig
from megabus.config.paths import Pathname
from megabus.config.phases import PhaseConfig
from megabus.config.section import (
    STAGES,
    Angle,
    Batch,
    Count,
    Decay,
    Degree,
    Exponent,
    Heads,
    Hidden,
    Layers,
    Length,
    NonNegative,
    Positive,
    Section,
    Share,
    Width,
)

Averaged = Annotated[float, Field(gt=0.0, lt=1.0)]  # a running mean's decay
Depth = Literal["append", "identity", "split", "taper", "stack", "interleave", "fresh"]


class LayoutConfig(Section):
    """Degrees of tensor, pipeline and data parallelism: tp x pp x dp is the number of ranks."""

    tp: Degree = Field(1, description="tensor parallelism: ranks that share every layer's matrices")
    pp: Degree = Field(1, description="pipeline parallelism: groups of layers, each on ranks of its own")
    dp: Degree | None = Field(None, description="data parallelism: copies; what is left of the ranks when left out")


def _decays(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _distinct(decays: list[float]) -> list[float]:
    if len(set(decays)) < len(decays):
        raise ValueError("names a decay twice; give each once")
    return decays


class TrainConfig(Section):
    """Batches, budget and numerics. A budget is needed; the first one reached ends the run."""

    seq_len: Length = Field(description="tokens of a sequence; a divisor of the run's longest")
    micro_batch_size: Batch = Field(description="sequences that a rank computes at once")
    global_batch_size: Batch = Field(
        description="sequences of a step over all ranks; a multiple of micro_batch_size*dp"
    )
    max_tokens: Count | None = Field(None, description="budget in tokens")
    max_flops: Positive | None = Field(None, description="budget in FLOPs of training, validation not counted")
    max_steps: Count | None = Field(None, description="budget in optimizer steps")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of weights and activations; masters are fp32")
    zero_stage: Literal[1, 2] = Field(1, description="ZeRO: 2 cuts gradients too, and needs layout.pp = 1")
    overlap_comm: bool = Field(False, description="with zero_stage 2: reduce gradients while backward goes on (GPUs)")
    gradient_clipping: NonNegative = Field(1.0, description="largest gradient norm; 0 clips nothing")
    logit_power: NonNegative | None = Field(
        None,
        description="ngpt: precondition the gradients of E_out h by (s_z / mean s_z) to this power in place of s_z; "
        "s_z's own stay true",
    )
    kernels: Literal["auto", "eager", "compiled", "triton"] = Field(
        "auto",
        description="form of what runs between matrix products; auto takes eager, and on GPUs where "
        "`make gpu-check` has passed triton",
    )
    deterministic: bool = Field(
        False,
        description="on GPUs: the same bits from the same start on the same machines and GPUs, as on CPUs, by slower "
        "attention, sums and scatters",
    )
    ema: Annotated[list[Averaged], BeforeValidator(_decays), AfterValidator(_distinct), Field(max_length=8)] = Field(
        default_factory=list,
        description="decays a step of running means of the weights: one, or a list; each takes 4 bytes a parameter "
        "and an evaluation of its own",
    )
    recompute: bool = Field(False, description="recompute each block's activations in the backward pass")
    sequence_parallel: bool = Field(
        False,
        description="cut activations between tensor-parallel regions along the sequence: less memory for layout.tp",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of initial weights, data order and growth")
    phases: list[PhaseConfig] = Field(default_factory=list, max_length=STAGES)

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError(
                "is not supported: its loss scaling skips steps, and unit vectors of d_model entries near "
                "1/sqrt(d_model) leave it few significant bits; use bf16 or fp32"
            )
        return value


class TransferConfig(Section):
    """The run in which lr was tuned: rates and initial values follow from how each stage differs from it.

    ngpt: nu-GPT's rules (arXiv 2604.27077). gpt: muP's (arXiv 2203.03466), which are of the width alone.
    """

    d_model: Width = Field(description="its channels")
    n_layers: Layers | None = Field(
        None, description="ngpt: its blocks, where deeper stages are to begin with a smaller alpha_init"
    )
    steps: Count | None = Field(None, description="ngpt: its optimizer steps; needed")


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, a function of the share of the budget that is spent."""

    lr: Positive = Field(description="highest learning rate of the first stage; with transfer, in the run it names")
    beta1: Decay = Field(0.9, description="decay of Adam's first moment")
    beta2: Decay = Field(0.95, description="decay of Adam's second moment")
    eps: Positive = Field(
        1e-8, description="added to the root of the second moment; with a gate, where it is half open"
    )
    gate: Exponent | None = Field(
        None,
        description="a of GatedAdamW: steps are multiplied by sigmoid(a log(root of the second moment / eps)); 1 is "
        "AdamW, 0.5 is the paper's",
    )
    max_angle: Angle | None = Field(
        None, description="ngpt: radians that a row may turn by in a step at most, but for the embedding's"
    )
    weight_decay: NonNegative = Field(0.0, description="on matrices only; ngpt has none")
    schedule: Literal["constant", "cosine", "log", "wsd"] = Field(
        "wsd",
        description="course of lr over the budget; wsd (warm-up, stable, decay) falls at its end only, cosine and log "
        "(logarithmic) from the warm-up on",
    )
    warmup_share: Share = Field(0.0, description="share of the budget to warm up over; ngpt needs none")
    decay_share: Share = Field(0.2, description="wsd: the last share of the budget, over which lr falls")
    decay: Literal["linear", "log"] = Field("linear", description="wsd: the course of its fall")
    decay_rho: Annotated[float, Field(ge=1e-6, le=1)] = Field(
        0.1, description="of a logarithmic fall: the share of it after which it slows down; the smaller, the steeper"
    )
    min_lr_ratio: Share = Field(0.0, description="cosine, log and wsd: share of lr that they end at")
    implementation: Literal["torch", "deepspeed", "apex"] = Field(
        "torch", description="of AdamW: torch's fused one, DeepSpeed's (built when first used), or NVIDIA apex's"
    )
    transfer: TransferConfig | None = None


class StageConfig(Section):
    """One growth: the sizes to grow to, and whatever else changes with them; what is left out stays."""

    d_model: Width | None = Field(None, description="channels; no fewer than before, as for all sizes")
    n_layers: Layers | None = Field(None, description="blocks")
    n_heads: Heads | None = Field(None, description="query heads")
    n_kv_heads: Heads | None = Field(None, description="key/value heads; grow them with n_heads")
    d_ff: Hidden | None = Field(None, description="hidden units of the MLP")
    layout: LayoutConfig | None = None
    seq_len: Length | None = Field(None, description="tokens of a sequence; a divisor of the run's longest")
    micro_batch_size: Batch | None = Field(None, description="sequences that a rank computes at once")
    global_batch_size: Batch | None = Field(None, description="sequences of a step over all ranks")
    weights: list[NonNegative] | None = Field(None, description="of the corpora of data.train, in their order; 0: none")
    lr: Positive | None = Field(None, description="highest learning rate; the schedule goes on")
    kappa: Share | None = Field(None, description="share to reach before the next growth; not in the last stage")
    max_tokens: Count | None = Field(None, description="cap of this stage, in tokens of its own; not in the last stage")
    max_flops: Positive | None = Field(
        None, description="cap of this stage, in FLOPs of its own; not in the last stage"
    )


class ScalingLaw(Section):
    """Chinchilla's form L(N, D) = E + A/N^alpha + B/D^beta; the defaults are Hoffmann et al. 2022."""

    E: NonNegative = Field(1.69, description="loss that no size and no data go below, in nats")
    A: Positive = Field(406.4, description="weight of the size's term")
    B: Positive = Field(410.7, description="weight of the data's term")
    alpha: Positive = Field(0.34, description="exponent of N, the parameters")
    beta: Positive = Field(0.28, description="exponent of D, the tokens")

    def floor(self, n_params: int) -> float:
        """The loss in nats per token that a model of `n_params` parameters approaches with ever more tokens."""
        return self.E + self.A * n_params**-self.alpha

    def loss(self, n_params: int, tokens: float) -> float:
        """The loss in nats per token after `tokens` > 0 tokens; infinity is allowed."""
        return self.floor(n_params) + self.B * tokens**-self.beta

    def tokens(self, n_params: int, loss: float) -> float:
        """Tokens to reach a loss in nats per token from scratch; infinity for one that it never reaches."""
        above = loss - self.floor(n_params)
        power = math.log(self.B / above) / self.beta if above > 0 else math.inf
        return math.exp(power) if power < 709 else math.inf  # where fp64 ends: a small beta, next to the floor

    def fall(self, n_params: int, loss: float) -> float:
        """-dL / dlog D at a loss: the nats that it falls by for a relative rise of the tokens."""
        return self.beta * (loss - self.floor(n_params))


class KappaConfig(Section):
    """When to grow: when a size has achieved a fraction kappa of its predicted loss improvement, or when the next size
    gives more nats a FLOP."""

    rule: Literal["kappa", "marginal"] = Field(
        "kappa",
        description="grow by kappa, or when the next size's predicted nats a FLOP exceed the present one's, by "
        "scaling_law as this run's own stages correct it",
    )
    kappa: Share = Field(0.95, description="fraction of the predicted improvement to achieve before growing")
    predictor: Literal["constant", "scaling_law", "reference", "fit"] = Field(
        "fit", description="what predicts a size's final loss: a power law fitted to its own curve, or the keys below"
    )
    constant: float | list[float] | None = Field(None, description="final loss in nats; one, or one a stage")
    scaling_law: ScalingLaw = ScalingLaw()
    reference: list[tuple[Positive, float]] | None = Field(
        None, description="[parameters, final loss] of models that were trained"
    )
    patience: Count = Field(1, description="evaluations in a row that must meet the target")
    max_std: Positive = Field(
        0.25,
        description="largest std to act on: of the predicted loss mp, over start - mp; with rule marginal of "
        "the present return, over itself",
    )
    min_evals: Count = Field(8, description="evaluations that a stage needs before kappa may trigger (fit: 5 or more)")


class GrowthConfig(Section):
    """How to grow (BUS, bootstrapped model upscaling) and through which stages."""

    write: Literal["tilt", "clone"] = Field(
        "tilt", description="copies of write rows: tilted (exact, breaks symmetry), or plain clones"
    )
    read: Literal["tilt", "clone"] = Field(
        "tilt", description="rows that read h: tilted so that they see new channels too (exact), or plain clones"
    )
    channels: Literal["even", "uneven"] = Field("even", description="weights of a channel's copies")
    depth: Depth = Field(
        "append",
        description="new layers. append: silent copies of the pile on top of it, exact; identity: silent copies, each "
        "beside its original, exact; split: copies beside originals that share their gate evenly; taper: so that less "
        "changes; stack: the pile on top again, as loud; interleave: copies beside originals, as loud; fresh: drawn "
        "anew, on top",
    )
    moments: Literal["reset", "carry", "grow"] = Field(
        "grow",
        description="Adam's moments: afresh, the originals' kept, all mapped; the last two send and hold three times "
        "as much in a growth as afresh does",
    )
    boost: BoostConfig | None = None
    rewarm: RewarmConfig | None = None
    settle: SettleConfig | None = None
    buffer_mb: Count = Field(256, description="most MiB that growing takes on a rank beside its old and its new shard")
    max_tokens: Count | None = Field(None, description="cap of the first stage, in tokens")
    max_flops: Positive | None = Field(None, description="cap of the first stage, in FLOPs")
    trigger: KappaConfig = KappaConfig()
    stages: list[StageConfig] = Field(default_factory=list, max_length=STAGES)

    @property
    def buffer_bytes(self) -> int:
        return self.buffer_mb * 2**20


class Corpus(Section):
    """One of the corpora that are blended. Their weights need not sum to 1."""

    path: Pathname | list[Pathname] = Field(
        description="prefix of a .bin/.idx pair, also at a URL, or a pattern of prefixes (web-*); several, or a list, "
        "are read as one corpus"
    )
    weight: NonNegative = Field(1.0, description="its part of the samples, beside the others' weights; 0: none yet")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


def _corpora(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


class DataConfig(Section):
    """Token files made by megabus preprocess. `train` is one prefix or a weighted blend. Prefixes may be URLs that
    fsspec knows (s3://, https://)."""

    train: Annotated[list[Corpus], BeforeValidator(_corpora)] = Field(
        min_length=1, description="a prefix, or a list of corpora"
    )
    valid: Pathname = Field(description="prefix of the .bin/.idx pair to validate on, or a pattern of prefixes")
    cache: Pathname | None = Field(
        None, description="directory that files of URLs are copied to; $XDG_CACHE_HOME/megabus, or that of ~/.cache"
    )
    tokenizer: Pathname | None = Field(
        None,
        description="what made the data: a file, directory or hub name; is saved. That of init_from is when left out",
    )
    document_mask: bool = Field(
        False,
        description="keep documents apart, in training and validation: attention and positions restart at each that "
        "the .idx has; off, because how an imported model was trained is not known",
    )

    @property
    def train_corpora(self) -> list[tuple[list[str], float]]:
        """(prefixes, weight) of each."""
        return [(corpus.paths, corpus.weight) for corpus in self.train]


Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class ExtraConfig(Section):
    """What else is measured of the model while it trains: before and after each growth, and at the end of the run."""

    every: Count | None = Field(None, description="steps between further measurements")
    data: dict[Name, Pathname] = Field(
        {}, description="name: prefix of a .bin/.idx pair; its loss and bits per byte, on as many tokens as eval.tokens"
    )
    tasks: list[str] = Field(
        [], description="of lm-evaluation-harness (needs lm_eval), on the weights written aside, by another process"
    )
    task_path: Pathname | None = Field(None, description="directory of task files, beside the harness's own")
    metadata: dict[str, Any] = Field({}, description="what those are told, as lm_eval's --metadata does")
    limit: Count | None = Field(None, description="documents of a task at most")


class EvalConfig(Section):
    """When the validation loss is measured, and on how much."""

    every: Count = Field(50, description="steps between validations")
    tokens: Count = Field(65536, description="validation tokens each time, always the same ones")
    extra: ExtraConfig = ExtraConfig()


class SamplesConfig(Section):
    """Texts that the model writes while it trains, by its own weights under the running layout. Training is the same
    bit for bit with and without."""

    every: Count = Field(description="steps between them; once more at the end of the run")
    prompts: list[str] = Field(min_length=1, description="texts to go on from; an empty one begins a document")
    max_tokens: Count = Field(40, description="tokens that are added to each; together they fit train.seq_len")
    temperature: NonNegative = Field(0.8, description="of the draws, whose seed is the run's; 0: the likeliest token")


class LogConfig(Section):
    """What is told of the run, beside RUN_DIR/metrics.jsonl, which is always written."""

    every: Count = Field(10, description="steps between lines of the log; the metrics have every step")
    why: bool = Field(False, description="say at each validation why kappa has grown the model, or has not")
    unit_norm_every: Count = Field(10, description="steps between measurements of the masters' unit rows")
    wandb: bool = Field(False, description="send metrics to Weights & Biases too (needs wandb)")
    wandb_mode: Literal["offline", "online"] = Field("offline", description="offline writes to disk, to sync later")
    tensorboard: bool = Field(False, description="write metrics for TensorBoard too (needs tensorboard)")
    peak_tflops: Positive | None = Field(None, description="of one device, in TFLOP/s, for MFU; known for common GPUs")
    samples: SamplesConfig | None = None
    profile: ProfileConfig | None = None


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class CallbackConfig(Section):
    """A class of yours that is told of steps, validations, growths and saves (docs/callbacks.md)."""

    name: Pathname = Field(description="path/to/file.py:Class, or module:Class; a subclass of megabus.Callback")
    arguments: dict[str, Any] = Field({}, description="what it is made with, by name")
    on_error: Literal["stop", "drop"] = Field(
        "stop", description="what an exception in it does: end the run with a checkpoint, or go on without it"
    )

    @field_validator("name")
    @classmethod
    def _has_two_parts(cls, value: str) -> str:
        place, _, attribute = value.rpartition(":")
        if not place or not attribute.isidentifier():
            raise ValueError("names no class; write path/to/file.py:Class, or module:Class")
        return value


class CheckpointConfig(Section):
    """Sharded checkpoints under RUN_DIR/checkpoints; the last state of a run is always saved."""

    every: Count = Field(500, description="steps between saves")
    keep_last: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(None, description="keep for good those at multiples of this many steps")
    asynchronous: bool = Field(True, description="write while training goes on (costs a copy in host memory)")
    on_error: Literal["continue", "stop"] = Field("continue", description="what a full disk does to the run")


class PreflightConfig(Section):
    """What is looked at before training. Versions, code and configuration are compared over ranks in any case."""

    enabled: bool = Field(True, description="compare machines, files and memory, and show a table")
    measure: Literal["auto", "always", "never"] = Field(
        "auto",
        description="speed of ranks and links before training; auto: on several nodes, and where min_bandwidth is set",
    )
    min_bandwidth: Positive | None = Field(None, description="GB/s that a link between neighbours must carry each way")


class RunConfig(Section):
    """A whole run: everything that a YAML file may hold."""

    run_dir: Pathname = Field(description="directory of metrics, checkpoints and the rest; all nodes must share it")
    resume: Literal["auto", "strict", "never"] = Field(
        "auto", description="strict refuses damaged checkpoints and a changed configuration; never refuses old runs"
    )
    init_from: Pathname | None = Field(
        None,
        description="what a new run's weights are at first: a run or checkpoint, a Hugging Face directory of one of "
        "the classes that model.export_as names or of an nGPT, or its name on the hub",
    )
    extend_vocabulary: bool = Field(
        False,
        description="the tokenizer of init_from has fewer pieces than data.tokenizer: rows of a new piece are the mean "
        "of those of the pieces that the old one spells it with",
    )
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    growth: GrowthConfig = GrowthConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    callbacks: list[Annotated[CallbackConfig, BeforeValidator(_named)]] = Field(
        [], description="what else is told of the run; a name alone stands for a class without arguments"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    preflight: PreflightConfig = PreflightConfig()
