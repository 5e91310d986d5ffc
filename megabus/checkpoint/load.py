"""Load a saved model into this process, whatever layout it was trained under."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabus.config import ModelConfig
from megabus.errors import UserError
from megabus.model.decoder import Decoder, param_specs
from megabus.model.params import global_shape

INDEX = "model.safetensors.index.json"


def load(checkpoint_dir: str | Path) -> Decoder:
    """The model of a checkpoint directory: forward(tokens (B, T) int64) -> logits (B, T, vocab_size), fp32, CPU, eval.

    Its `ModelConfig` is `model.config`. Raises `UserError` if the directory is no checkpoint or is damaged.
    """
    folder = Path(checkpoint_dir)
    config = load_model_config(folder)
    state = load_state(folder, config)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_model_config(folder: Path) -> ModelConfig:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError("checkpoint", folder, "holds no config.yaml", "give a directory that a run has saved")
    try:
        return ModelConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        problem = f"is damaged ({type(error).__name__})"
        raise UserError("checkpoint", path, problem, "restore it from another copy") from error


def load_state(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Canonical name -> full fp32 tensor, each checked against the shape that `config` declares."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError("checkpoint", folder, f"holds no {INDEX}", "give a directory that a run has saved")
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"is damaged ({type(error).__name__})"
        raise UserError("checkpoint", path, problem, "restore it from another copy") from error
    state = {}
    for name, spec in param_specs(config).items():
        if name not in files:
            raise UserError("checkpoint", path, f"lacks {name}", "restore it from another copy")
        file = folder / files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                state[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError("checkpoint", file, f"is damaged ({error})", "restore it from another copy") from error
        if tuple(state[name].shape) != global_shape(spec, config):
            problem = f"{name} has shape {tuple(state[name].shape)}, config.yaml says {global_shape(spec, config)}"
            raise UserError("checkpoint", file, problem, "restore both from one copy")
    return state
