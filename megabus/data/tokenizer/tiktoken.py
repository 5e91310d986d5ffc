"""Rank files of tiktoken, such as Llama 3's tokenizer.model, for the library `tokenizers`.

A line is a token in base64 and its rank, which is its id. Neither the pattern that splits text nor the special tokens
are in the file: programs know them by heart. They are those of the few files that exist, told apart by their size.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from megabus.data.tokenizer.byte_bpe import CL100K, byte_letters, byte_pieces
from megabus.data.tokenizer.fast import Fast
from megabus.data.tokenizer.files import TREE, TokenizerFiles

# Of openai/tiktoken, tiktoken_ext/openai_public.py, like CL100K, which Llama 3 took over. This one is GPT-2's.
R50K = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Of meta-llama/llama3, llama/tokenizer.py: 256 of them, in this order.
LLAMA3 = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(5, 251)),
]


@dataclass(frozen=True)
class Encoding:
    """What a rank file leaves out. special: ids of special tokens; bos: written before a text, as its makers do."""

    name: str
    pattern: str
    special: dict[str, int]
    eos: str
    bos: str | None = None


ENCODINGS = {
    50256: Encoding("r50k_base", R50K, {"<|endoftext|>": 50256}, "<|endoftext|>"),
    100256: Encoding(
        "cl100k_base",
        CL100K,
        {"<|endoftext|>": 100257}
        | {f"<|fim_{part}|>": 100258 + place for place, part in enumerate(("prefix", "middle", "suffix"))}
        | {"<|endofprompt|>": 100276},
        "<|endoftext|>",
    ),
    128000: Encoding(
        "Llama 3",
        CL100K,
        {token: 128000 + place for place, token in enumerate(LLAMA3)},
        "<|end_of_text|>",
        "<|begin_of_text|>",
    ),
}


def read_ranks(files: TokenizerFiles) -> Fast:
    """The tokenizer of a rank file. Raises `UserError` for one that is damaged, or is none of those known."""
    ranks: dict[bytes, int] = {}
    lines = [(n, line) for n, line in enumerate(files.raw.splitlines(), 1) if line]  # tiktoken skips empty ones too
    for number, line in lines:
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise files.fault(f"line {number} is no token in base64 and its rank") from error
    found = sorted(ranks.values())
    if len({*found}) != len(lines) or found[:1] < [0]:
        raise files.fault("is damaged: its ranks are not 0, 1, 2, ..., each of one token")
    known = ", ".join(f"{one.name} ({size})" for size, one in ENCODINGS.items())
    if found[-1] >= len(found):
        gap = next(number for number, rank in enumerate(found) if number != rank)
        problem = (
            f"is a tiktoken file without the rank {gap}: cut, or one such as p50k_base, and known are {known} only"
        )
        raise files.fault(problem, f"give the model's {TREE}")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise files.fault(f"is damaged: the byte {lacking[0]} is none of its tokens")
    encoding = ENCODINGS.get(len(ranks))
    if encoding is None:
        problem = f"is a tiktoken file of {len(ranks)} ranks, and how its program splits text is known of {known} only"
        raise files.fault(problem, f"give the model's {TREE}")
    return of_ranks(ranks, encoding, files.special("eos_token"))


def of_ranks(ranks: dict[bytes, int], encoding: Encoding, eos: str | None = None) -> Fast:
    """Byte-pair encoding that merges what gives the token of lowest rank first, as tiktoken does. eos: another end than
    the encoding's.

    tokenizers wants to be told pairs: those of each token, in the order of ranks, as transformers' conversion has them.
    """
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(spelled(left), spelled(right)) for _, _, left, right in sorted(pairs)]
    vocab = {spelled(token): rank for token, rank in ranks.items()} | encoding.special
    # A piece of text that is a token is never taken apart, whether or not merges lead to it: ignore_merges.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = byte_pieces(encoding.pattern)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in encoding.special])
    if encoding.bos is not None:
        bos = encoding.bos
        special = [(bos, encoding.special[bos])]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", special)
    return Fast(backend, encoding.bos, eos or encoding.eos)
