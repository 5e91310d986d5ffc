"""What transformers' own decoders say of themselves in config.json, by strict types, as our model; and our model so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megabus.config import ModelConfig
from megabus.config.model import StockClass
from megabus.config.section import MOST_LAYERS, NonNegative, Positive
from megabus.config.stock import STOCK, stock_class
from megabus.convert.hf_rope import RopeKeys, Size, read_rope, written_rope
from megabus.errors import UserError
from megabus.plain_file import shown


@dataclass(frozen=True)
class Family:
    """One of transformers' classes. missing: what it takes for keys that config.json lacks; says: what an export says
    beside what all do, lest the class take something else for it."""

    architecture: str
    missing: dict[str, Any] = field(default_factory=dict)
    says: dict[str, Any] = field(default_factory=dict)
    theta: float = 10000.0


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
FAMILIES: dict[StockClass, Family] = {
    "llama": Family("LlamaForCausalLM", says=_NO_BIAS),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        {"sliding_window": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768},
        _NO_WINDOW,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_position_embeddings": 32768},
        {"attention_bias": False} | _NO_WINDOW,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768},
        {"pad_token_id": None} | _NO_BIAS | _NO_WINDOW,
        theta=2e6,
    ),
}
# What sets some well-known others apart, beside that nobody has built them.
WHY_NOT = {
    "olmo2": "it normalises q and k over all heads together, which neither cloned heads nor tensor parallelism keep",
}
# What other decoders compute, and where it changes nothing. transformers' classes here pass over such a key; whoever
# wrote it has not meant that.
OF_OTHERS = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_chunk_size": None,
    "clip_qkv": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "num_experts": 0,
    "num_local_experts": 0,
}


class _Stock(RopeKeys):
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    initializer_range: NonNegative | None = None
    hidden_act: str = "silu"
    architectures: list[str] | None = None
    attention_dropout: float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size = 4


def check_known(model_type: object) -> StockClass:
    """Raise `UserError` for an architecture that megabus does not compute."""
    for name in FAMILIES:
        if name == model_type:
            return name
    why = f", and {WHY_NOT[str(model_type)]}" if str(model_type) in WHY_NOT else ""
    known = ", ".join(FAMILIES)
    problem = f"is none that megabus computes{why}"
    raise UserError("config.json model_type", shown(model_type), problem, f"give one of {known}, or a megabus export")


def stock_model(tree: dict[str, Any]) -> ModelConfig:
    """Raises pydantic's ValidationError, and `UserError` for what megabus does not compute."""
    name = check_known(tree.get("model_type"))
    family, computes = FAMILIES[name], STOCK[name]
    config = _Stock.model_validate(family.missing | tree)
    for key, found, wanted in (
        ("attention_bias", config.attention_bias and "attention_bias" in family.says, False),
        ("mlp_bias", config.mlp_bias and "mlp_bias" in family.says, False),
        ("hidden_act", config.hidden_act, "silu"),
    ):
        if found != wanted:
            raise UserError(f"config.json {key}", found, "is not supported", f"only {wanted} is")
    for key, none in OF_OTHERS.items():
        if tree.get(key) not in (None, none):
            problem = f"is nothing that transformers' {family.architecture} computes"
            raise UserError(f"config.json {key}", shown(tree[key]), problem, "set it to null if the weights do without")
    if config.attention_dropout:
        remedy = "set it to 0: logits stay, and training is without"
        raise UserError("config.json attention_dropout", config.attention_dropout, "is not supported", remedy)
    if config.architectures not in (None, [family.architecture]):
        problem = f"is not what a {name} is: {family.architecture} alone"
        remedy = "set it to that if the weights are of one"
        raise UserError("config.json architectures", shown(config.architectures), problem, remedy)
    _check_window(name, config)
    theta, scaling = read_rope(config, family.theta)
    return ModelConfig(
        kind="gpt",
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        d_ff=config.intermediate_size,
        rope_theta=theta,
        rope_scaling=scaling,
        nope_interval=_nope_interval(config) if computes.nope else None,
        qkv_bias=computes.qkv_bias,
        qk_norm=computes.qk_norm,
        tie_embeddings=bool(config.tie_word_embeddings),
        norm_eps=config.rms_norm_eps * config.hidden_size,  # theirs is added to the mean of |h|^2, ours to |h|^2
        init_std=config.initializer_range or 0.02,
        export_as=name,
    )


def _check_window(name: StockClass, config: _Stock) -> None:
    """Every query sees all positions before it: a window that is no shorter than the longest context is none."""
    remedy = "set it to null, and train on no longer sequences than it"
    window = config.sliding_window if name == "mistral" or config.use_sliding_window else None
    longest = config.max_position_embeddings
    if "sliding_window" in FAMILIES[name].says and window is not None and (longest is None or window < longest):
        problem = f"is shorter than max_position_embeddings = {longest}, and windows are not supported"
        raise UserError("config.json sliding_window", window, problem, remedy)
    odd = [kind for kind in config.layer_types or () if kind != "full_attention"]
    if odd:
        raise UserError("config.json layer_types", shown(odd[0]), "is not supported", "only full_attention is")


def _nope_interval(config: _Stock) -> int:
    """Every so many-th layer is without positions; more than there can be layers where none is, so that none comes by
    growth. The interval that stands beside a list says no more than what that leaves open."""
    n = config.num_hidden_layers
    if config.no_rope_layers is None:
        return config.no_rope_layer_interval
    listed = config.no_rope_layers[:n]
    for interval in (config.no_rope_layer_interval, *range(1, n + 1), MOST_LAYERS):
        if [bool(x) for x in listed] == [(i + 1) % interval != 0 for i in range(n)]:
            return interval
    problem = "are no layers at equal intervals"
    raise UserError(
        "config.json no_rope_layers", shown(listed), problem, "only every so many-th layer can be without RoPE"
    )


def stock_config(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of a gpt, but for its sizes. Raises `UserError` for what no class can be."""
    name = stock_class(model)
    family = FAMILIES[name]
    config = {
        "model_type": name,
        "architectures": [family.architecture],
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps / model.d_model,  # ours is added to |h|^2, theirs to its mean
        **written_rope(model),
        **family.says,
        "megabus": model.model_dump(),
    }
    if model.nope_interval is not None:
        layers = [int((i + 1) % model.nope_interval != 0) for i in range(model.n_layers)]
        config |= {"no_rope_layers": layers, "no_rope_layer_interval": model.nope_interval}
    return config
