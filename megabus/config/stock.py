"""Which of transformers' classes computes what a gpt computes: an export that cannot be is refused before training."""

from __future__ import annotations

from typing import NamedTuple, get_args

from megabus.config.model import ModelConfig, StockClass
from megabus.errors import UserError


class Computes(NamedTuple):
    """What sets a class apart. heads_divide: it refuses a d_model that its number of heads does not divide."""

    qkv_bias: bool = False
    qk_norm: bool = False
    nope: bool = False
    heads_divide: bool = False


STOCK: dict[StockClass, Computes] = {
    "llama": Computes(heads_divide=True),
    "mistral": Computes(),
    "qwen2": Computes(qkv_bias=True),
    "qwen3": Computes(qk_norm=True),
    "smollm3": Computes(nope=True),
}
# Keys of a model that nGPT has no part for.
OF_GPT = ("nope_interval", "qkv_bias", "qk_norm", "tie_embeddings", "export_as")


def stock_class(model: ModelConfig) -> StockClass:
    """The class that a gpt is exported as. Raises `UserError` where none computes it, or not the one it asks for."""
    check_kind(model)
    names: tuple[StockClass, ...] = get_args(StockClass)
    if model.export_as is not None:
        return model.export_as
    return next(name for name in names if _why_not(model, name) is None)


def check_kind(model: ModelConfig, size_key: str = "model.") -> None:
    """Raise `UserError` unless a model's keys go together; `size_key`: what names of its sizes begin with."""
    if model.kind == "ngpt":
        for name in OF_GPT:
            if (value := getattr(model, name)) != type(model).model_fields[name].default:
                raise UserError(f"model.{name}", value, "is not for ngpt", "leave it out, or set model.kind to gpt")
        if model.rope_scaling is not None and model.rope_scaling.kind == "yarn":
            problem = "makes rotated q and k longer, which are unit vectors in ngpt"
            raise UserError(
                "model.rope_scaling.kind", "yarn", problem, "use llama3 or linear, or set model.kind to gpt"
            )
        return
    if model.rope_scaling is not None and model.rope_scaling.kind == "yarn" and model.rope_theta <= 1:
        problem = "turns all pairs alike, and the ramp of model.rope_scaling.kind = yarn is between slow and fast ones"
        raise UserError("model.rope_theta", model.rope_theta, problem, "raise it above 1")
    apart = [name for name in ("qkv_bias", "qk_norm", "nope_interval") if getattr(model, name)]
    if len(apart) > 1:
        problem = f"goes with no {apart[0]}: no class of transformers computes both"
        raise UserError(f"model.{apart[1]}", getattr(model, apart[1]), problem, "leave one of the two out")
    if model.tie_embeddings and model.head_init_std is not None:
        problem = "is of a head of its own, and model.tie_embeddings is true"
        raise UserError("model.head_init_std", model.head_init_std, problem, "leave it out: embed_init_std counts")
    if model.export_as is not None and (why := _why_not(model, model.export_as)) is not None:
        key, value, problem, remedy = why
        key = size_key + key if key == "d_model" else f"model.{key}"
        raise UserError(key, value, f"{problem}, and model.export_as is {model.export_as}", remedy)


def _why_not(model: ModelConfig, name: StockClass) -> tuple[str, object, str, str] | None:
    """(key, value, problem, remedy) where a class does not compute what the model does."""
    wanted = STOCK[name]
    other = "set model.export_as to the class that computes it, or leave it out"
    for key, has, value in (
        ("qkv_bias", wanted.qkv_bias, model.qkv_bias),
        ("qk_norm", wanted.qk_norm, model.qk_norm),
        ("nope_interval", wanted.nope, model.nope_interval is not None),
    ):
        if has != value:
            return key, getattr(model, key), f"is not what transformers' {name} computes", other
    if wanted.heads_divide and model.d_model % model.n_heads:
        problem = f"is not divisible by n_heads = {model.n_heads}, as transformers' {name} asks"
        remedy = "choose sizes that divide, or leave model.export_as out: mistral computes the same, and does not ask"
        return "d_model", model.d_model, problem, remedy
    return None
