"""Hugging Face directories, out and in.

An nGPT is written with its own modelling files and our names; a `gpt` as one of transformers' own classes, Llama or
its kin, whose names stand in the parameters' declarations. Both ways memory holds a block; a matrix that is transposed,
whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from megabus.checkpoint.entries import odd_entry
from megabus.checkpoint.load import ADAPTER, MERGE
from megabus.checkpoint.state import LONGEST, Progress, SavedState
from megabus.checkpoint.tensor_file import DTYPES, TensorFileWriter
from megabus.config import Layout, ModelConfig
from megabus.config.stages import check_cut
from megabus.convert.hf_accounts import check_accounts
from megabus.convert.hf_rest import CONTEXT, check_ids, copy_rest, extends, inside, read_json, rest_of, tokenizer_of
from megabus.convert.hf_stock import stock_config, stock_model
from megabus.convert.hf_tokenizer import compare_as_read, write_tokenizer
from megabus.convert.source import HasState, OpenFiles, Source, blocks, whole
from megabus.data.tokenizer.files import TREE
from megabus.errors import UserError, warn
from megabus.model.cost import totals
from megabus.model.decoder import param_specs
from megabus.model.layers import rope_frequencies
from megabus.model.params import ParamSpec, global_shape
from megabus.parallel.fragments import Kind
from megabus.plain_file import shown

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")  # dtypes of weights, as safetensors names them
SINGLE = "model.safetensors"
FILE = re.compile(r"[\w.-]+\.safetensors")  # a file of weights that an index may name
# What a value of another type should be, by pydantic's names of what is wrong: "10000" is no number in JSON.
WRITTEN_AS = {
    "float_type": "write a number, without quotation marks",
    "int_type": "write a whole number, without quotation marks",
    "int_from_float": "write a whole number",
    "bool_type": "write true or false, without quotation marks",
    "string_type": "write a text, in quotation marks",
    "list_type": "write a list",
    "dict_type": "write an object of keys, in braces",
}
NGPT_FILES = ("configuration_ngpt.py", "modeling_ngpt.py")


def hf_name(spec: ParamSpec, model: ModelConfig) -> str:
    if model.kind == "ngpt":
        return spec.name
    return spec.llama if spec.layer is None else f"model.layers.{spec.layer}.{spec.llama}"


def transposed(spec: ParamSpec, model: ModelConfig) -> bool:
    """Llama's matrices are (out, in); a write row's d_model entries are its outputs."""
    return model.kind == "gpt" and spec.is_matrix and spec.role == "write"


def write_hugging_face(source: Source, out: Path, dtype: str, max_shard_bytes: int, like: Path | None = None) -> None:
    """Fill the empty directory `out`; files of weights stay below max_shard_bytes unless one tensor is larger.

    like: a Hugging Face directory whose tokenizer, special tokens and longest context are taken over. Where the
    tokenizer of the weights is that one with more pieces, it goes out itself.
    """
    model, specs = source.state.model, param_specs(source.state.model)
    config = _config(source.state)
    own = source.tokenizer
    extended = like is not None and own is not None and extends(own, like)
    taken = {} if like is None else copy_rest(like, out, model.vocab_size, own, extended)
    if own is not None and (like is None or extended):
        config |= write_tokenizer(own, out)
    config |= taken | _longer_context(source.state, taken)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        shape = global_shape(spec, model)
        shapes[name] = shape[::-1] if transposed(spec, model) else shape
    groups = _groups(shapes, DTYPES[dtype][1].itemsize, max_shard_bytes)
    weight_map, total = {}, 0
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        tensors = {hf_name(specs[n], model): shapes[n] for n in names}
        with TensorFileWriter(out / file, tensors, dtype, hashed=False) as writer:
            total += writer.nbytes
            for name in names:
                key = hf_name(specs[name], model)
                weight_map[key] = file
                columns = whole(source, name).T if transposed(specs[name], model) else None
                width = shapes[name][1] if columns is not None else 1
                for start, stop in blocks(0, torch.Size(shapes[name]).numel(), width):
                    if columns is None:
                        writer.write(key, source.read("weight", name, start, stop), start)
                    else:
                        writer.write(key, columns[start // width : stop // width], start)
    if len(groups) > 1:
        _dump(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _dump(out / CONFIG, config | {"dtype": dtype})
    if model.kind == "ngpt":
        for file in NGPT_FILES:
            with resources.as_file(resources.files("megabus.convert") / "hf_files" / file) as path:
                shutil.copyfile(path, out / file)
    if (out / TREE).exists():
        compare_as_read(out)


def _longer_context(state: SavedState, taken: dict[str, Any]) -> dict[str, int]:
    """The key of the longest context where a run has trained on longer sequences than a --like directory says."""
    said, trained = taken.get(CONTEXT), state.longest_sequence() if state.config else 0
    if type(said) is not int or said >= trained:
        return {}
    warn(f"{CONTEXT} is {trained}, the longest sequence of the run, and not the {said} of --like")
    return {CONTEXT: trained}


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
    if model.n_layers == 0:
        raise UserError("n_layers", 0, "is no model that transformers knows", "grow it to a layer or more first")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        CONTEXT: state.longest_sequence(),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _config(state: SavedState) -> dict[str, Any]:
    sizes = _sizes(state)
    return _ngpt_config(state) if state.model.kind == "ngpt" else sizes | stock_config(state.model)


def _ngpt_config(state: SavedState) -> dict[str, Any]:
    return {
        "model_type": "megabus_ngpt",
        "architectures": ["NGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ngpt.NGPTConfig",
            "AutoModelForCausalLM": "modeling_ngpt.NGPTForCausalLM",
        },
        **_sizes(state),
        "tie_word_embeddings": False,
        "rope_frequencies": list(rope_frequencies(state.model)),
        "alpha_init": state.model.alpha_init,
        "s_z_init": state.model.s_z_init,
        "megabus": state.model.model_dump(),
    }


# ---- in


class HuggingFaceSource:
    """A directory of either kind, ours or a stock class's. longest: tokens of a sequence that it can be asked to read;
    left: what of it no other form keeps; without_tokenizer: why its tokenizer is among that, unless that was asked for
    (`with_tokenizer`)."""

    def __init__(self, folder: Path, files: OpenFiles, with_tokenizer: bool = True) -> None:
        self.folder, self.files = folder, files
        config = read_json(folder / CONFIG)
        self.weight_map = _weight_map(folder, files)
        stored = sum((folder / file).stat().st_size for file in set(self.weight_map.values()))
        model = model_of(config, folder, len(self.weight_map), stored)
        self.state, self.longest = _without_a_run(model), _longest(config)
        self.specs = param_specs(model)
        self.tokenizer, self.without_tokenizer = tokenizer_of(folder) if with_tokenizer else (None, "")
        self.left = rest_of(folder, config, self.tokenizer)
        self._check()

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        spec = self.specs[name]
        key = hf_name(spec, self.state.model)
        tensor = self._tensor(key)
        width = prod(global_shape(spec, self.state.model)[1:])
        first, last = start // width, -(-stop // width)
        rows = tensor[:, first:last].T if transposed(spec, self.state.model) else tensor[first:last]
        values = rows.float().reshape(-1)[start - first * width : stop - first * width]
        if (odd := odd_entry(kind, values)) is not None:
            problem = f"holds {odd} in {key}"
            raise UserError("weights", self.folder / self.weight_map[key], problem, "restore it from another copy")
        return values

    def _tensor(self, key: str) -> Any:
        """A tensor of the files, to be sliced. Raises `UserError` where it is not in the file that the index names."""
        try:
            return self.files[inside(self.folder / self.weight_map[key])].get_slice(key)
        except SafetensorError as error:
            problem = f"lacks {key} in {self.weight_map[key]}, where {INDEX} puts it"
            raise UserError("weights", self.folder, problem, "restore both from one copy") from error

    def _check(self) -> None:
        model = self.state.model
        keys = {hf_name(spec, model) for spec in self.specs.values()}
        missing = sorted(keys - set(self.weight_map))
        # Buffers that older files carry; they are computed from the configuration.
        rest = {key for key in self.weight_map if not key.endswith("rotary_emb.inv_freq")}
        heads = {hf_name(spec, model) for name, spec in untied_specs(model).items() if name not in self.specs}
        unknown = sorted(rest - keys - heads)
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which such a model has not"
            raise UserError("weights", self.folder, what, "give the whole model, as transformers or megabus saved it")
        for spec in self.specs.values():
            shape = global_shape(spec, self.state.model)
            shape = shape[::-1] if transposed(spec, self.state.model) else shape
            key = hf_name(spec, self.state.model)
            there = self._tensor(key)
            found, dtype = tuple(there.get_shape()), there.get_dtype()
            if found != shape:
                problem = f"{key} has shape {found}, config.json says {shape}"
                raise UserError("weights", self.folder, problem, "restore both from one copy")
            if dtype not in FLOATS:
                problem = f"{key} is {dtype}, and weights are {', '.join(FLOATS)}"
                raise UserError("weights", self.folder, problem, "give weights that are not quantised")

        for key in heads & set(self.weight_map):
            self._check_tie(key)

    def _check_tie(self, head: str) -> None:
        """A tied head may be stored beside the embedding, and then must be its rows."""
        tied = next(spec for spec in self.specs.values() if spec.tied)
        shape, key = global_shape(tied, self.state.model), hf_name(tied, self.state.model)
        one, other = self._tensor(key), self._tensor(head)
        same = tuple(other.get_shape()) == shape
        for start, stop in blocks(0, prod(shape), shape[1]) if same else ():
            rows = slice(start // shape[1], stop // shape[1])
            same = same and bool(one[rows].equal(other[rows]))
        if not same:
            problem = f"has another {head} than {key}, and config.json says that they are tied"
            raise UserError("weights", self.folder, problem, "set tie_word_embeddings to false there, or restore it")


def longest_of(source: HasState) -> int:
    """Tokens of the longest sequence that weights in any form can be asked to read: what their run or `config.json`
    says."""
    return source.longest if isinstance(source, HuggingFaceSource) else source.state.longest_sequence()


def _longest(config: dict[str, Any]) -> int:
    """Others' models say hundreds of thousands: of them no more than of a model of which nothing is known."""
    said = _context(config)
    if said is None:
        return LONGEST
    return said if "megabus" in config else min(said, LONGEST)


def _context(config: dict[str, Any]) -> int | None:
    said = config.get(CONTEXT)
    return said if type(said) is int and said > 0 else None


def untied_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """The declarations of the model with a head of its own."""
    return param_specs(model.model_copy(update={"tie_embeddings": False}))


def _weight_map(folder: Path, files: OpenFiles) -> dict[str, str]:
    """The file of each tensor: a plain name, in this directory."""
    single = folder / SINGLE
    if os.path.lexists(single):
        return dict.fromkeys(files[inside(single)].keys(), single.name)
    if any(folder.glob("pytorch_model*.bin")):
        problem, remedy = "are pickled, which may run any code", "save them with safe_serialization in transformers"
        raise UserError("weights", folder, problem, remedy)
    if not os.path.lexists(folder / INDEX):
        if any((folder / name).exists() for name in ADAPTER):
            raise UserError("weights", folder, "are an adapter and no whole model", MERGE)
        problem = f"holds a {CONFIG} and neither {SINGLE} nor {INDEX}"
        raise UserError("weights", folder, problem, "give the whole directory, as transformers or megabus saved it")
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict):
        raise UserError("weights", folder / INDEX, "has no weight_map", "restore it from another copy")
    for key, file in found.items():
        if not isinstance(file, str) or not FILE.fullmatch(file):
            problem = f"puts {shown(key)} into {shown(file)}, which is no safetensors file beside it"
            raise UserError("weights", folder / INDEX, problem, "restore it from another copy")
        files[inside(folder / file)]  # there, and whole
    return found


def named_files(folder: Path) -> list[str]:
    """Those that a directory's index names, and the one that weights without an index lie in: patterns of the hub."""
    found = read_json(folder / INDEX).get("weight_map") if os.path.lexists(folder / INDEX) else None
    named = found.values() if isinstance(found, dict) else ()
    return [SINGLE, *sorted({file for file in named if isinstance(file, str) and FILE.fullmatch(file)})]


def model_of(config: dict[str, Any], folder: Path, tensors: int, stored: int) -> ModelConfig:
    """The model that a config.json describes. Raises `UserError` for what megabus does not compute, and for sizes that
    the `tensors` of the files, of `stored` bytes together, cannot have: nothing is made by them before."""
    if config.get("quantization_config"):
        how = shown(config["quantization_config"])
        remedy = "give weights that are not quantised, such as model.dequantize() of transformers saves"
        raise UserError("config.json quantization_config", how, "is not supported", remedy)
    exported = "megabus" in config
    section = ["megabus"] if exported else []  # that is being read
    try:
        model = ModelConfig.model_validate(config["megabus"]) if exported else stock_model(config)
        section = []
        _check_fits(model, folder, tensors, stored)
        if exported:
            check_accounts(folder, config, model, _config(_without_a_run(model)))
        check_ids(config, model.vocab_size, "config.json", folder, "set it to one of the tokenizer's, or to null")
        return model
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, (*section, *first["loc"])))
        said = f"{where} = {shown(first['input'])}: {first['msg']}"
        problem = f"lacks {where}" if first["type"] == "missing" else f"has {said}"
        remedy = WRITTEN_AS.get(first["type"], "restore it from another copy")
        raise UserError("config.json", folder, problem, remedy) from error


def described(folder: Path) -> SavedState:
    """What config.json says by itself, where there are no files yet to compare it with."""
    return _without_a_run(model_of(read_json(folder / CONFIG), folder, sys.maxsize, sys.maxsize))


def context_of(folder: Path, state: SavedState) -> int | None:
    """Tokens of the longest sequence that weights were made for: by the config.json of their directory, else by the run
    that they come from. None where neither says it."""
    if os.path.lexists(folder / CONFIG):
        return _context(read_json(folder / CONFIG))
    return state.longest_sequence() if state.config else None


def _check_fits(model: ModelConfig, folder: Path, tensors: int, stored: int) -> None:
    count, entries = totals(model)
    # An entry takes two bytes or more, and one matrix may be tied to another. What is missing is told by name later.
    if count > 2 * tensors + 100 or entries > stored:
        problem = f"describes {count} tensors of {entries} entries, the files hold {tensors} in {stored} bytes"
        raise UserError("config.json", folder, problem, "restore both from one copy")
    try:
        check_cut(model, Layout(1, 1, 1))
    except UserError as error:
        problem = f"describes a model that cannot be: {error.key} = {error.value} {error.problem}"
        raise UserError("config.json", folder, problem, "restore it from another copy") from error


def _without_a_run(model: ModelConfig) -> SavedState:
    """Of weights alone."""
    return SavedState(Progress(), 0, model, Layout(1, 1, 1), 0, ("weight",), {}, {}, {})
