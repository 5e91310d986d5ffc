"""A model's section of the file: the decoder's shape, and what it computes."""

from __future__ import annotations

from math import log
from typing import Annotated, Literal

from pydantic import Field

from megabus.config.section import Count, CountFrom0, Positive, Section

Turns = Annotated[float, Field(ge=1e-3, le=1e6)]  # numbers of a size that logarithms and pairs can be made of
StockClass = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"]


class RopeScaling(Section):
    """How RoPE's frequencies are lowered for longer sequences, as imported models have it.

    linear: all by `factor`. llama3: those whose wave is longer than original_max_position / low_freq_factor by
    `factor`, those shorter than original_max_position / high_freq_factor not, with a ramp between. yarn (Peng et al.
    2023, arXiv 2309.00071): those that turn less than beta_slow times in original_max_position by `factor`, those that
    turn more than beta_fast times not, with a ramp over the pairs between; and rotated q and k become longer.
    """

    kind: Literal["linear", "llama3", "yarn"] = Field(description="how, see above")
    factor: Positive = Field(description="what frequencies are divided by")
    low_freq_factor: Positive = Field(
        1.0, description="llama3: longer waves than its share are scaled by all of factor"
    )
    high_freq_factor: Positive = Field(4.0, description="llama3: shorter waves than its share stay as they are")
    original_max_position: Count = Field(
        8192, description="llama3 and yarn: tokens, the longest sequence before scaling"
    )
    beta_fast: Turns = Field(32.0, description="yarn: frequencies that turn more often stay as they are")
    beta_slow: Turns = Field(1.0, description="yarn: frequencies that turn less often are scaled by all of factor")
    truncate: bool = Field(True, description="yarn: the ramp begins and ends at whole pairs")
    attention_factor: Positive | None = Field(
        None, description="yarn: what rotated q and k are multiplied by; 0.1 ln(factor) + 1 when left out"
    )

    @property
    def length(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * log(self.factor) + 1.0 if self.factor > 1 else 1.0)


class ModelConfig(Section):
    """A decoder's shape. `ngpt` is the normalized GPT, `gpt` the RMSNorm/SwiGLU/RoPE baseline."""

    kind: Literal["ngpt", "gpt"] = Field("ngpt", description="never changes in a run")
    vocab_size: Count = Field(description="pieces of the tokenizer; never changes in a run")
    d_model: Count = Field(description="channels of the residual stream")
    n_layers: CountFrom0 = Field(
        description="blocks of attention and MLP; at least layout.pp, or none (head on embedding) to grow by fresh ones"
    )
    n_heads: Count = Field(description="query heads; divisible by n_kv_heads and by layout.tp")
    n_kv_heads: Count | None = Field(None, description="key/value heads (GQA); n_heads when left out")
    head_dim: Count = Field(description="entries of a head, even; never changes in a run")
    d_ff: Count = Field(description="hidden units of the MLP; divisible by layout.tp")
    rope_theta: Positive = Field(10000.0, description="base of RoPE's frequencies")
    rope_scaling: RopeScaling | None = None
    nope_interval: Count | None = Field(
        None,
        description="gpt: every so many-th layer does not turn q and k by their positions (SmolLM3); none when "
        "left out",
    )
    qkv_bias: bool = Field(False, description="gpt: q, k and v have biases (Qwen2)")
    qk_norm: bool = Field(
        False, description="gpt: RMSNorm of every head of q and of k, by a gain that all heads share (Qwen3)"
    )
    tie_embeddings: bool = Field(False, description="gpt: one matrix is the embedding and the head")
    alpha_init: Positive = Field(
        0.05, description="ngpt: the initial eigen learning rate of every block; with transfer, in the run it names"
    )
    s_z_init: Positive = Field(
        1.0, description="ngpt: the initial scale of the logits; with transfer, in the run it names"
    )
    init_std: Positive = Field(
        0.02, description="gpt: standard deviation of the initial weights; with transfer, in the run it names"
    )
    embed_init_std: Positive | None = Field(None, description="gpt: the embedding's; init_std when left out")
    head_init_std: Positive | None = Field(
        None, description="gpt: the head's, in the run that transfer names; init_std when left out"
    )
    norm_eps: Positive = Field(1e-5, description="gpt: added to the squared length of h, so growth keeps it")
    export_as: StockClass | None = Field(
        None,
        description="gpt: transformers' class that it becomes in an export; when left out, the first that computes it",
    )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def embed_std(self) -> float:
        return self.embed_init_std or self.init_std

    @property
    def head_std(self) -> float:
        return self.head_init_std or self.init_std

    def grown(self, **sizes: int) -> ModelConfig:
        """This model with larger sizes, validated. Raises pydantic's ValidationError for what is none."""
        return ModelConfig.model_validate(self.model_dump() | sizes)
