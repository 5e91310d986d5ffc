"""A megabus export's config.json says twice what the model is: in keys that transformers computes with, and in a
section of ours. Whoever changes one of the two must not be read as if only the other stood there."""

from __future__ import annotations

from math import isclose
from pathlib import Path
from typing import Any

from megabus.config import ModelConfig
from megabus.config.model import INITIAL_VALUES
from megabus.config.stock import stock_class
from megabus.convert.hf_rest import KEYS
from megabus.convert.hf_rope import RopeKeys, read_rope, written_rope
from megabus.convert.hf_stock import FAMILIES, stock_model
from megabus.errors import UserError
from megabus.plain_file import shown

ROPE = ("rope_scaling", "rope_parameters")  # sections, of which transformers 5 reads the first, and drops it in saving
LENGTHS = (
    "max_position_embeddings",
    "original_max_position_embeddings",
)  # which it may leave to keys beside it
# What says nothing about the mathematics, or is compared by what it means.
FREE = {"architectures", "auto_map", "megabus", "rope_theta", *ROPE, *KEYS}
LATER = {"s_z_init": 1.0}  # keys that the first exports did not have, and what they would have said
# Of a model's own keys, those that only its first weights follow from, and those that are compared apart.
UNSAID = {*INITIAL_VALUES, "export_as", "n_kv_heads"}
APART = {"rope_theta", "rope_scaling", "norm_eps"}


def check_accounts(folder: Path, config: dict[str, Any], model: ModelConfig, ours: dict[str, Any]) -> None:
    """Raise `UserError` about the first key that does not say what the `megabus` section, read as `model`, says.

    ours: config.json as an export of that model has it. Raises pydantic's ValidationError for keys of wrong types.
    """
    missing = LATER if model.kind == "ngpt" else ours  # transformers' own classes know what they take instead
    for key, value in ours.items():
        if key not in FREE and (found := config.get(key, missing.get(key))) != value:
            raise _differ(folder, model, key, found, value)
    if model.kind == "ngpt":
        _check_rope(folder, config, model, model.rope_theta)
        return
    theirs = stock_model(config)
    _check_rope(folder, config, model, FAMILIES[stock_class(theirs)].theta)
    said, wanted = (one.model_dump(exclude=UNSAID | APART) | {"n_kv_heads": one.kv_heads} for one in (theirs, model))
    for key, value in wanted.items():
        if said[key] != value:
            raise _differ(folder, model, key, said[key], value)
    if not isclose(theirs.norm_eps, model.norm_eps, rel_tol=1e-12):  # it was divided and multiplied by d_model
        raise _differ(folder, model, "norm_eps", theirs.norm_eps, model.norm_eps)


def _check_rope(folder: Path, config: dict[str, Any], model: ModelConfig, default_theta: float) -> None:
    """Which of the keys counts depends on the version of transformers: each that is there must say the same."""
    written = written_rope(model)
    wanted = read_rope(RopeKeys.model_validate(written), model.rope_theta)
    theta = config.get("rope_theta")
    if theta is not None and theta != model.rope_theta:
        raise _differ(folder, model, "rope_theta", theta, model.rope_theta)
    beside = {key: config.get(key) for key in ("rope_theta", *LENGTHS)}
    there = [key for key in ROPE if config.get(key)]
    for key in there or ROPE[-1:] if model.kind == "gpt" else there:  # an nGPT's are its rope_frequencies
        found = read_rope(RopeKeys.model_validate(beside | {key: config.get(key)}), default_theta)
        if found != wanted:
            raise _differ(folder, model, key, config.get(key, "(missing)"), written[key] or written[ROPE[-1]])


def _differ(folder: Path, model: ModelConfig, key: str, found: object, wanted: object) -> UserError:
    problem = f"has {key} = {shown(found)}, and {shown(wanted)} in its megabus section: one was changed"
    other = ", or delete that section: then the other keys count" if model.kind == "gpt" else ""
    return UserError("config.json", folder, problem, f"set it back{other}")
