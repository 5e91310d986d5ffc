"""Hugging Face directories, out and in.

An nGPT is written with its own modelling files and our names; the `gpt` baseline as a stock LlamaForCausalLM, whose
names stand in the parameters' declarations. Both ways memory holds one tensor.
"""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabus.checkpoint.save import TOKENIZER
from megabus.checkpoint.state import Progress, SavedState
from megabus.config import Layout, ModelConfig
from megabus.config.schema import RopeScaling
from megabus.convert.hf_tokenizer import write_tokenizer
from megabus.convert.source import OpenFiles, Source, blocks, whole
from megabus.convert.tensor_file import DTYPES, TensorFileWriter
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from megabus.model.layers import rope_frequencies
from megabus.model.params import ParamSpec, global_shape
from megabus.parallel.fragments import Kind

INDEX = "model.safetensors.index.json"
NGPT_FILES = ("configuration_ngpt.py", "modeling_ngpt.py")


def hf_name(spec: ParamSpec, model: ModelConfig) -> str:
    if model.kind == "ngpt":
        return spec.name
    return spec.llama if spec.layer is None else f"model.layers.{spec.layer}.{spec.llama}"


def transposed(spec: ParamSpec, model: ModelConfig) -> bool:
    """Llama's matrices are (out, in); a write row's d_model entries are its outputs."""
    return model.kind == "gpt" and spec.is_matrix and spec.role == "write"


def write_hugging_face(source: Source, out: Path, dtype: str, max_shard_bytes: int) -> None:
    """Fill the empty directory `out`; files of weights stay below max_shard_bytes unless one tensor is larger."""
    model, specs = source.state.model, param_specs(source.state.model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        shape = global_shape(spec, model)
        shapes[name] = shape[::-1] if transposed(spec, model) else shape
    groups = _groups(shapes, DTYPES[dtype][1].itemsize, max_shard_bytes)
    weight_map, total = {}, 0
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        with TensorFileWriter(out / file, {hf_name(specs[n], model): shapes[n] for n in names}, dtype) as writer:
            total += writer.nbytes
            for name in names:
                key = hf_name(specs[name], model)
                weight_map[key] = file
                if transposed(specs[name], model):
                    writer.write(key, whole(source, name).T)
                    continue
                for start, stop in blocks(0, torch.Size(shapes[name]).numel()):
                    writer.write(key, source.read("weight", name, start, stop), start)
    if len(groups) > 1:
        _dump(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = _ngpt_config(source.state) if model.kind == "ngpt" else _llama_config(source.state)
    ids = {} if source.tokenizer is None else write_tokenizer(source.tokenizer, out)
    _dump(out / "config.json", config | {"dtype": dtype} | ids)
    if model.kind == "ngpt":
        for file in NGPT_FILES:
            with resources.as_file(resources.files("megabus.convert") / "hf_files" / file) as path:
                shutil.copyfile(path, out / file)


def _groups(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _dump(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _sizes(state: SavedState) -> dict[str, Any]:
    model = state.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": state.longest_sequence(),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _ngpt_config(state: SavedState) -> dict[str, Any]:
    return {
        "model_type": "megabus_ngpt",
        "architectures": ["NGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ngpt.NGPTConfig",
            "AutoModelForCausalLM": "modeling_ngpt.NGPTForCausalLM",
        },
        **_sizes(state),
        "rope_frequencies": list(rope_frequencies(state.model)),
        "alpha_init": state.model.alpha_init,
        "megabus": state.model.model_dump(),
    }


def _llama_config(state: SavedState) -> dict[str, Any]:
    model = state.model
    if model.d_model % model.n_heads:
        problem = f"transformers' Llama asks that n_heads = {model.n_heads} divide it"
        raise UserError("d_model", model.d_model, problem, "grow to a size that it divides")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {"rope_type": model.rope_scaling.kind, "factor": model.rope_scaling.factor}
    if model.rope_scaling is not None and model.rope_scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": model.rope_scaling.low_freq_factor,
            "high_freq_factor": model.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling.original_max_position,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_sizes(state),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps / model.d_model,  # ours is added to |h|^2, theirs to its mean
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "megabus": model.model_dump(),
    }


# ---- in


class HuggingFaceSource:
    """A directory of either kind, ours or any Llama's."""

    def __init__(self, folder: Path, files: OpenFiles) -> None:
        self.folder, self.files = folder, files
        config = _read_json(folder / "config.json")
        model = model_of(config, folder)
        layout = Layout(1, 1, 1)
        self.state = SavedState(Progress(), 0, model, layout, 0, ("weight",), {}, {}, {})
        self.specs = param_specs(model)
        self.tied = bool(config.get("tie_word_embeddings"))
        single = folder / "model.safetensors"
        if not single.exists():
            self.weight_map = dict(_read_json(folder / INDEX)["weight_map"])
        else:
            self.weight_map = dict.fromkeys(self.files[single].keys(), single.name)
        tokenizer = folder / TOKENIZER
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self._last: tuple[str, Tensor] = ("", torch.empty(0))
        self._check()

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._whole(name))
        return self._last[1][start:stop]

    def _whole(self, name: str) -> Tensor:
        spec = self.specs[name]
        key = self._key(spec)
        values = self.files[self.folder / self.weight_map[key]].get_tensor(key).float()
        return (values.T if transposed(spec, self.state.model) else values).contiguous().reshape(-1)

    def _key(self, spec: ParamSpec) -> str:
        key = hf_name(spec, self.state.model)
        if key not in self.weight_map and self.tied and spec.axes == ("vocab", "embed"):
            return next(hf_name(s, self.state.model) for s in self.specs.values() if s.lookup)
        return key

    def _check(self) -> None:
        keys = {self._key(spec) for spec in self.specs.values()}
        missing = sorted(keys - set(self.weight_map))
        # Buffers that older files carry; they are computed from the configuration.
        rest = {key for key in self.weight_map if not key.endswith("rotary_emb.inv_freq")}
        unknown = sorted(rest - keys - ({"lm_head.weight"} if self.tied else set()))
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which a Llama has not"
            raise UserError("weights", self.folder, what, "give a whole LlamaForCausalLM or megabus export")
        for spec in self.specs.values():
            shape = global_shape(spec, self.state.model)
            shape = shape[::-1] if transposed(spec, self.state.model) else shape
            key = self._key(spec)
            found = tuple(self.files[self.folder / self.weight_map[key]].get_slice(key).get_shape())
            if found != shape:
                problem = f"{key} has shape {found}, config.json says {shape}"
                raise UserError("weights", self.folder, problem, "restore both from one copy")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "give a Hugging Face directory with safetensors weights"
        raise UserError("Hugging Face directory", path, f"cannot be read ({error})", remedy) from error
    if not isinstance(tree, dict):
        raise UserError("Hugging Face directory", path, "holds no keys", "restore it from another copy")
    return tree


def model_of(config: dict[str, Any], folder: Path) -> ModelConfig:
    """The model that a config.json describes. Raises `UserError` for what megabus does not compute."""
    if "megabus" in config:
        return ModelConfig.model_validate(config["megabus"])
    if config.get("model_type") != "llama":
        problem = f"is a {config.get('model_type')}"
        raise UserError("config.json", folder, problem, "give a Llama or a megabus export")
    refused = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, wanted in refused.items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"config.json {key}", config[key], "is not supported", f"only {wanted} is")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    return ModelConfig(
        kind="gpt",
        vocab_size=config["vocab_size"],
        d_model=hidden,
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        d_ff=config["intermediate_size"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_scaling=_scaling(scaling, config),
        norm_eps=config.get("rms_norm_eps", 1e-6) * hidden,
        init_std=config.get("initializer_range") or 0.02,
    )


def _scaling(scaling: dict[str, Any], config: dict[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=scaling["factor"])
    if kind != "llama3":
        raise UserError("config.json rope_type", kind, "is not supported", "default, linear and llama3 are")
    return RopeScaling(
        kind="llama3",
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_position=scaling.get("original_max_position_embeddings") or config["max_position_embeddings"],
    )
