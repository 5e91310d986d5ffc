"""Sample text from a model in one process, a token at a time, with cached keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megabus.errors import UserError
from megabus.model.decoder import Decoder
from megabus.model.layers import KVCache

NO_TOKEN = -1


def generate(
    model: Decoder,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    n_ids: int | None = None,
    never: Sequence[int] = (),
) -> Iterator[int]:
    """Up to `max_tokens` token ids that follow `prompt`, ending before `stop`.

    temperature: 0 takes the likeliest token each time. top_k: sample from the k likeliest. top_p: sample from the
    fewest tokens whose probabilities sum to p (Holtzman et al. 2020). n_ids: from this id on none is taken, as of a
    vocabulary that was padded; never: nor are these, as of one with gaps. The same arguments give the same tokens.
    """
    _check(len(prompt) > 0, "prompt", "(empty)", "give at least one token")
    _check(max_tokens >= 1, "max_tokens", max_tokens, "give 1 or more")
    _check(temperature >= 0, "temperature", temperature, "give 0 or more")
    _check(top_k is None or top_k >= 1, "top_k", top_k, "give 1 or more")
    _check(0 < top_p <= 1, "top_p", top_p, "give a share above 0, at most 1")
    _check(0 <= seed < 2**63, "seed", seed, "give 0 to 2^63 - 1")
    _check(n_ids is None or 1 <= n_ids <= model.config.vocab_size, "n_ids", n_ids, "give the tokenizer's number of ids")
    draw = torch.Generator().manual_seed(seed)

    def choose(logits_V: Tensor) -> int:
        return chosen(logits_V[:n_ids].double().cpu(), draw, temperature, top_k, top_p, never)

    return _tokens(model, prompt, max_tokens, choose, stop)


@torch.inference_mode()
def _tokens(
    model: Decoder, prompt: Sequence[int], max_tokens: int, choose: Callable[[Tensor], int], stop: int | None
) -> Iterator[int]:
    device, cache = next(model.parameters()).device, KVCache()
    new = torch.tensor([list(prompt)], device=device)
    for _ in range(max_tokens):
        token = choose(model(new, cache)[0, -1])
        if token == stop:
            return
        if token == NO_TOKEN:
            problem = "is no number: the model has diverged, or is damaged"
            raise UserError("logits", "nan", problem, "take an earlier checkpoint, or weights of fp32")
        yield token
        new = torch.tensor([[token]], device=device)


def chosen(
    logits_V: Tensor,
    draw: torch.Generator,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    never: Sequence[int] = (),
) -> int:
    """The next token by its logits, fp64 on the CPU; NO_TOKEN where one is NaN or infinite, as of a model that has
    diverged. See `generate` for the rest."""
    if not logits_V.max().isfinite():
        return NO_TOKEN
    if never:
        logits_V = logits_V.index_fill(0, torch.tensor(never), -torch.inf)
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = (logits_V - logits_V.max()) / temperature
    values, tokens = logits_V.sort(descending=True, stable=True)
    if top_k is not None:
        values, tokens = values[:top_k], tokens[:top_k]
    shares = values.softmax(0)
    before = shares.cumsum(0) - shares
    shares = shares * (before < top_p)  # the first always stays
    return int(tokens[torch.multinomial(shares, 1, generator=draw)])


def _check(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(key, value, "is out of range", remedy)
