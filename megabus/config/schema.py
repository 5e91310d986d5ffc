"""What a YAML file may say. Types and ranges only: how keys must fit together is `stages.py`'s business."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


def _whole(value: Any) -> Any:
    """Let counts be written 2e6: YAML reads that as a string or a float, and a budget is rarely typed in full."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[PositiveInt, BeforeValidator(_whole)]


class Section(BaseModel):
    """Every section refuses unknown keys and cannot change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` is no 1: pydantic would take it for a number."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is true or false where no switch is")
        return value


class RopeScaling(Section):
    """How RoPE's frequencies are lowered for longer sequences, as imported Llama models have it.

    linear: all by `factor`. llama3: those whose wave is longer than original_max_position / low_freq_factor by
    `factor`, those shorter than original_max_position / high_freq_factor not, with a ramp between.
    """

    kind: Literal["linear", "llama3"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position: Count = 8192


class ModelConfig(Section):
    """A decoder's shape. `ngpt` is the normalized GPT, `gpt` the RMSNorm/SwiGLU/RoPE baseline."""

    kind: Literal["ngpt", "gpt"] = "ngpt"
    vocab_size: Count
    d_model: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = Field(None, description="key/value heads (GQA); n_heads when left out")
    head_dim: Count
    d_ff: Count
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    alpha_init: Positive = Field(0.05, description="ngpt: the initial eigen learning rate of every block")
    init_std: Positive = Field(0.02, description="gpt: standard deviation of the initial weights")
    norm_eps: Positive = Field(1e-5, description="gpt: added to the squared length of h, so growth keeps it")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def grown(self, **sizes: int) -> ModelConfig:
        """This model with larger sizes, validated. Raises pydantic's ValidationError for what is none."""
        return ModelConfig.model_validate(self.model_dump() | sizes)


class LayoutConfig(Section):
    """Degrees of tensor, pipeline and data parallelism; dp is what is left of the world when left out."""

    tp: Count = 1
    pp: Count = 1
    dp: Count | None = None


class TrainConfig(Section):
    """Batches, budget and numerics. A budget is needed; the first one reached ends the run."""

    seq_len: Count
    micro_batch_size: Count
    global_batch_size: Count
    max_tokens: Count | None = None
    max_flops: Positive | None = None
    max_steps: Count | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[1, 2] = 1
    overlap_comm: bool = Field(False, description="with zero_stage 2: reduce gradients while backward goes on (GPUs)")
    gradient_clipping: NonNegative = Field(1.0, description="largest gradient norm; 0 clips nothing")
    kernels: Literal["auto", "eager", "compiled", "triton"] = Field(
        "auto", description="form of what runs between matrix products; auto takes eager"
    )
    recompute: bool = Field(False, description="recompute each block's activations in the backward pass")
    sequence_parallel: bool = Field(
        False,
        description="cut activations between tensor-parallel regions along the sequence: less memory for layout.tp",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, a function of the share of the budget that is spent."""

    lr: Positive
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = Field(0.0, description="on matrices only; ngpt has none")
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_share: Share = Field(0.0, description="share of the budget to warm up over; ngpt needs none")
    decay_share: Share = Field(0.2, description="wsd: the last share of the budget, over which lr falls")
    min_lr_ratio: Share = 0.0
    implementation: Literal["torch", "deepspeed", "apex"] = Field(
        "torch", description="of AdamW: torch's fused one, DeepSpeed's (built when first used), or NVIDIA apex's"
    )


class StageConfig(Section):
    """One growth: the sizes to grow to, and whatever else changes with them; what is left out stays."""

    d_model: Count | None = None
    n_layers: Count | None = None
    n_heads: Count | None = None
    n_kv_heads: Count | None = None
    d_ff: Count | None = None
    layout: LayoutConfig | None = None
    seq_len: Count | None = None
    micro_batch_size: Count | None = None
    global_batch_size: Count | None = None
    lr: Positive | None = None
    kappa: Share | None = None
    max_tokens: Count | None = Field(None, description="cap of this stage")
    max_flops: Positive | None = Field(None, description="cap of this stage")


class ScalingLaw(Section):
    """Chinchilla's form L(N, D) = E + A/N^alpha + B/D^beta; the defaults are Hoffmann et al. 2022."""

    E: float = 1.69
    A: Positive = 406.4
    B: Positive = 410.7
    alpha: Positive = 0.34
    beta: Positive = 0.28


class KappaConfig(Section):
    """When to grow: at the share kappa of the improvement that the present size is predicted to give."""

    kappa: Share = 0.8
    predictor: Literal["constant", "scaling_law", "reference", "fit"] = "fit"
    constant: float | list[float] | None = Field(None, description="final loss; one, or one a stage")
    scaling_law: ScalingLaw = ScalingLaw()
    reference: list[tuple[Positive, float]] | None = Field(None, description="[parameters, final loss] rows")
    start: Literal["stage", "run"] = "stage"
    smoothing: Decay = Field(0.0, description="EMA of validation losses")
    patience: Count = Field(1, description="evaluations in a row that must meet the target")
    max_std: Positive = Field(0.25, description="vaguest prediction to act on, as a share of start - mp")
    min_evals: Count = Field(8, description="evaluations a stage must see before kappa may trigger (fit: 5 or more)")


class BoostConfig(Section):
    """A larger learning rate for the rows and layers that a growth has added, until they have caught up."""

    factor: Positive = Field(2.0, description="multiple of the learning rate that they begin with")
    tokens: Count = Field(1_000_000, description="tokens after the growth over which it falls linearly to 1")


class GrowthConfig(Section):
    """How to grow (BUS, bootstrapped model upscaling) and through which stages."""

    write: Literal["tilt", "clone", "noise"] = "tilt"
    channels: Literal["even", "uneven"] = "even"
    depth: Literal["identity", "split", "stack"] = "identity"
    moments: Literal["reset", "carry", "grow"] = "reset"
    boost: BoostConfig | None = None
    buffer_mb: Count = Field(256, description="most MiB that growing takes on a rank beside its old and its new shard")
    max_tokens: Count | None = Field(None, description="cap of the first stage")
    max_flops: Positive | None = Field(None, description="cap of the first stage")
    trigger: KappaConfig = KappaConfig()
    stages: list[StageConfig] = Field(default_factory=list)


class Corpus(Section):
    path: str = Field(description="prefix of a .bin/.idx pair")
    weight: Positive = 1.0


def _corpora(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


class DataConfig(Section):
    """Token files made by tools/preprocess.py. `train` is one prefix or a weighted blend."""

    train: Annotated[list[Corpus], BeforeValidator(_corpora)]
    valid: str
    tokenizer: str | None = Field(None, description="SentencePiece model, copied beside checkpoints")

    @property
    def train_corpora(self) -> list[tuple[str, float]]:
        return [(corpus.path, corpus.weight) for corpus in self.train]


class EvalConfig(Section):
    every: Count = Field(50, description="steps between validations")
    tokens: Count = Field(65536, description="validation tokens each time, always the same ones")


class LogConfig(Section):
    every: Count = 10
    unit_norm_every: Count = Field(10, description="steps between measurements of the masters' unit rows")
    wandb: bool = False
    wandb_mode: Literal["offline", "online"] = "offline"
    tensorboard: bool = False
    peak_tflops: Positive | None = Field(None, description="of one device, for MFU; known for common GPUs")


class CheckpointConfig(Section):
    """Sharded checkpoints under RUN_DIR/checkpoints; the last state of a run is always saved."""

    every: Count = Field(500, description="steps between saves")
    keep_last: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(None, description="keep for good those at multiples of this many steps")
    asynchronous: bool = Field(True, description="write while training goes on (costs a copy in host memory)")
    on_error: Literal["continue", "stop"] = Field("continue", description="what a full disk does to the run")


class FaultsConfig(Section):
    """What a run does about its accidents."""

    max_skips: Annotated[int, Field(ge=0)] = Field(
        3, description="steps in a row with a non-finite loss or gradient that are skipped; more roll back"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        2, description="returns to the last checkpoint, past the data that failed, before the run gives up"
    )
    hang_timeout: Annotated[float, Field(gt=0, le=604_800)] = Field(
        600.0, description="seconds without progress before a rank shows its stacks and ends"
    )
    stop_exit_code: Annotated[int, Field(ge=0, le=255)] = Field(
        0, description="of a run that saved because of a signal or the stop file; a scheduler's requeue code"
    )


class PreflightConfig(Section):
    """What is looked at before training. Versions, code and configuration are compared over ranks in any case."""

    enabled: bool = Field(True, description="compare and measure machines, files, memory and links, and show a table")
    min_bandwidth: Positive | None = Field(None, description="GB/s that a link between neighbours must carry each way")


class RunConfig(Section):
    """A whole run: everything that a YAML file may hold."""

    run_dir: str
    resume: Literal["auto", "strict", "never"] = Field(
        "auto", description="strict refuses damaged checkpoints and a changed configuration; never refuses old runs"
    )
    init_from: str | None = Field(
        None,
        description="run or checkpoint (tools/convert.py makes one of any Llama) whose weights a new run begins with",
    )
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    growth: GrowthConfig = GrowthConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    preflight: PreflightConfig = PreflightConfig()
