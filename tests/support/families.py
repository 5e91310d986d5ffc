"""Transformers' own decoders in small, as their owners save them, and what becomes of one here: a row of a table."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import normalizers

import megabus
from megabus.config import ModelConfig, RunConfig
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.data.batches import TokenSource
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.data.tokenizer.byte_bpe import byte_pieces
from megabus.data.tokenizer.odd_text import BASES, odd_lines
from megabus.generate import generate
from megabus.model.decoder import Decoder
from tests.support.small_runs import rows_of, run_config, start
from tests.support.sources import MemorySource

LIMIT = 1e-5
TOKENS = torch.randint(67, (3, 40), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {  # by name: transformers imports a class when it is asked for, and one worker alone asks
    "llama": ("LlamaConfig", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "num_attention_heads": 6, "head_dim": 10}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": (
        "Qwen3Config",
        {"head_dim": 10, "tie_word_embeddings": True, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
}
PIECES, PADDED = 600, 616  # ids of the tokenizers below, and rows of a vocabulary that was padded
TEXT = [f"{base} and {base}, {base.upper()}; the theory of the other there\n" for base in BASES] * 3
# Of runs of 2 and 4 ranks: where the small model lies, and where the grown one.
Layouts = tuple[dict[str, int], dict[str, int]]
LAYOUTS: tuple[Layouts, ...] = (({"tp": 2}, {"pp": 2}), ({"tp": 2, "pp": 2}, {"pp": 2, "dp": 2}))


def stock(name: str, folder: Path, **more: object) -> torch.nn.Module:
    """A model of random weights, gains and biases, as its owners save it."""
    sizes = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 62, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")) | {"max_position_embeddings": 64}
    config_class, own = FAMILIES[name]
    kind = getattr(transformers, config_class)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes | heads | ids | own | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def loaded(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def larger(model: ModelConfig) -> dict[str, int]:
    """Sizes half as wide again and a layer deeper."""
    return {"d_model": 72, "n_heads": model.n_heads * 3 // 2, "n_kv_heads": 3, "d_ff": 90, "n_layers": 5}


def grown_source(old: Decoder, sizes: dict[str, int]) -> MemorySource:
    """The model grown in one process."""
    grown = MemorySource(old.config.grown(**sizes))
    state = megabus.grow_state(old.state_dict(), old.config, grown.state.model, seed=0)
    grown.tensors |= {("weight", key): values for key, values in state.items()}
    return grown


# ---- a row of the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Differences are relative, of logits or of losses; ranks: of each layout; ids: odd texts that come out with
    others; tokens: generated ones that are others."""

    imported: float
    grown: float
    ranks: tuple[float, ...]
    exported: float
    ids: int
    tokens: int

    @property
    def differences(self) -> tuple[float, ...]:
        return self.imported, self.grown, *self.ranks, self.exported

    @property
    def is_well(self) -> bool:
        return max(self.differences) <= LIMIT and self.ids == self.tokens == 0


def with_tokenizer(name: str, folder: Path) -> None:
    """Llama and Mistral come with SentencePiece, the others with byte-level BPE, which writes a BOS for one of them."""
    if name in ("llama", "mistral"):
        train_tokenizer(TEXT, PIECES, folder / "tokenizer", "bpe")
        return
    backend = tokenizers.Tokenizer.from_file(str(train_tokenizer(TEXT, PIECES - 1, folder / "own")))
    (folder / "own.json").unlink()
    backend.add_special_tokens(["<bos>"])
    if name == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        # Transformers cuts its text so, whatever tokenizer.json says.
        backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), byte_pieces(PRETOKENIZE_REGEX)
    if name == "smollm3":
        pieces = [("<bos>", backend.token_to_id("<bos>"))]
        backend.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", "<bos> $A $B", pieces)
    named = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)


def begun(name: str, folder: Path) -> tuple[torch.nn.Module, Decoder]:
    """The stock model with a tokenizer and a vocabulary larger than that, in folder/hf; and it as megabus reads it."""
    theirs = stock(name, folder / "hf", vocab_size=PADDED)
    with_tokenizer(name, folder / "hf")
    return theirs, megabus.load(folder / "hf")


def trained(folder: Path, corpus: Path, layouts: Layouts, old: ModelConfig) -> RunConfig:
    """A run of two steps that begins with the stock model, grows it after the first, and ends. corpus: token files
    `train` and `valid` of ids below 67."""
    model = old.model_dump(exclude_none=True, exclude_defaults=True)
    growth = {"max_tokens": 128, "stages": [larger(old) | {"layout": layouts[1]}]}
    changes = {"model": model, "growth": growth, "init_from": str(folder / "hf"), "train__max_tokens": 256}
    changes |= {"data__tokenizer": str(folder / "hf")}
    world = prod(layouts[0].values())
    config = run_config(corpus, folder / f"run-{world}", [layouts[0]] * 3, **changes)
    start(config, world)
    return config


@torch.no_grad()
def compared(theirs: torch.nn.Module, ours: Decoder, runs: Sequence[RunConfig], folder: Path) -> Row:
    wanted = theirs(TOKENS).logits
    for made in ("grown", "out"):
        shutil.rmtree(folder / made, ignore_errors=True)
    convert(grown_source(ours, larger(ours.config)), folder / "grown", "hf")
    grown = loaded(folder / "grown")
    ranks = tuple(worst_of_run(config, theirs, folder / "out" / Path(config.run_dir).name) for config in runs)
    last = Path(runs[-1].run_dir)
    out, run = loaded(folder / "out" / last.name), megabus.load(last)
    assert {type(model) for model in (grown, out)} == {type(theirs)}
    return Row(
        imported=apart(ours(TOKENS), wanted),
        grown=apart(grown(TOKENS).logits, wanted),
        ranks=ranks,
        exported=apart(out(TOKENS).logits, run(TOKENS)),
        ids=other_ids(folder / "hf", folder / "out" / last.name),
        tokens=other_tokens(run, out),
    )


def worst_of_run(config: RunConfig, theirs: torch.nn.Module, out: Path) -> float:
    """Of the run's first loss against transformers', of the loss after the growth against that before, and of the last
    loss against what transformers computes with the export."""
    out.parent.mkdir(exist_ok=True)
    with OpenFiles() as files:
        convert(open_source(Path(config.run_dir), files), out, "hf")
    tokens, targets = TokenSource([(config.data.valid, 1.0)], 16, 0, PADDED).batch(0, 16, range(16))

    def loss(model: torch.nn.Module) -> float:
        return float(F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()))

    first, *_, last = (row["loss"] for row in rows_of(config, "eval"))
    (growth,) = rows_of(config, "growth")
    pairs = [(first, loss(theirs)), (growth["loss_after"], growth["loss_before"]), (last, loss(loaded(out)))]
    assert last != first
    return max(abs(found / wanted - 1) for found, wanted in pairs)


def other_ids(origin: Path, out: Path) -> int:
    """Of some 300 odd texts, how many transformers gives other ids with the export's tokenizer than the original. Where
    that is SentencePiece's, texts that spell a special token are left out: transformers reads them as the token."""
    first, theirs = Tokenizer(origin), transformers.AutoTokenizer.from_pretrained(out)
    lines = [line for line in odd_lines() if first.kind == "tokenizers" or "<" not in line]
    found = theirs(lines, add_special_tokens=False)["input_ids"]
    assert theirs("a")["input_ids"] == [*first.prefix, *first.encode("a")]
    return sum(ids != wanted for ids, wanted in zip(found, first.encode_batch(lines), strict=True))


def other_tokens(ours: Decoder, theirs: torch.nn.Module) -> int:
    """Of 3 x 12 generated tokens, how many are others without a cache, or by megabus (which has one)."""
    prompts = TOKENS[:, :9]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(prompts)  # it would take zeros among them for padding
    plain, cached = (theirs.generate(prompts, use_cache=use, **options)[:, 9:] for use in (False, True))
    mine = torch.tensor([list(generate(ours, row.tolist(), 12, temperature=0)) for row in prompts])
    return int((cached != plain).sum() + (mine != plain).sum())
