"""A model's section of the file: the decoder's shape, and what it computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megabus.config.rope import RopeScaling as RopeScaling
from megabus.config.section import (
    Factor,
    Heads,
    Hidden,
    Layers,
    LayersOrNone,
    Positive,
    Section,
    Vocabulary,
    Width,
)

StockClass = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"]

# Keys that initial values follow from, by the kind that reads them. An nGPT's are also the multiples that its gains are
# stored in: a gain acts as raw * multiplier.
INITIAL = {"ngpt": ("alpha_init", "s_z_init"), "gpt": ("init_std", "embed_init_std", "head_init_std")}
INITIAL_VALUES = (*INITIAL["ngpt"], *INITIAL["gpt"])


class ModelConfig(Section):
    """A decoder's shape. `ngpt` is the normalized GPT, `gpt` the RMSNorm/SwiGLU/RoPE baseline."""

    kind: Literal["ngpt", "gpt"] = Field("ngpt", description="never changes in a run")
    vocab_size: Vocabulary = Field(description="ids of tokens: the tokenizer's, or more; never changes in a run")
    d_model: Width = Field(description="channels of the residual stream")
    n_layers: LayersOrNone = Field(
        description="blocks of attention and MLP; at least layout.pp, or none (head on embedding) to grow by fresh ones"
    )
    n_heads: Heads = Field(description="query heads; divisible by n_kv_heads and by layout.tp")
    n_kv_heads: Heads | None = Field(None, description="key/value heads (GQA); n_heads when left out")
    head_dim: Heads = Field(description="entries of a head, even; never changes in a run")
    d_ff: Hidden = Field(description="hidden units of the MLP; divisible by layout.tp")
    rope_theta: Factor = Field(10000.0, description="base of RoPE's frequencies")
    rope_scaling: RopeScaling | None = None
    nope_interval: Layers | None = Field(
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
