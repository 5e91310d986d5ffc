"""What follows prompts, a token at a time, from a running engine under any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megabus.engine.engine import Engine
from megabus.generate import NO_TOKEN
from megabus.model.decoder import Decoder
from megabus.model.loss import IGNORED
from megabus.scoring import likelihood
from megabus.scoring.likelihood import WIDTH_STEP


class NextLogits:
    """In place of an engine's loss: keeps the logits of the token after each sequence, whose last token alone has a
    target. logits: (B, vocab_size) a micro batch, on ranks that have the head."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, decoder: Decoder, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        assert decoder.output is not None, "these layers have no head"
        rows, at = torch.arange(len(targets_BT), device=h_BTD.device), (targets_BT != IGNORED).int().argmax(1)
        if h_BTD.shape[1] == targets_BT.shape[1]:
            local = decoder.output(h_BTD[rows, at][:, None])[:, 0]
        else:  # under sequence parallelism, where a rank holds some of the positions
            local = decoder.output(h_BTD)[rows, at]
        head = decoder.output.head
        logits = local.new_zeros(len(local), decoder.config.vocab_size)
        logits[:, head.first_row : head.first_row + local.shape[1]] = local
        self.logits.append(head.tp.sum(logits))  # exact: all terms of a sum but one are zero
        return torch.zeros((), device=h_BTD.device)


def continuations(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    choose: Callable[[int, Tensor], int],
    stop: int | None,
) -> list[list[int]]:
    """Up to `max_tokens` token ids that follow each prompt, ending before `stop` and where there is no token to choose;
    the same on every rank. Collective.

    choose: from the number of a prompt and its logits (vocab_size,) to a token; asked once a token, always on the same
    rank for the same prompt. Without a cache of keys and values, so that every layout can: each token costs a forward
    pass over all micro batches that the prompts fill. No random state is touched.
    """
    texts, going = [list(prompt) for prompt in prompts], set(range(len(prompts)))
    step = math.lcm(WIDTH_STEP, engine.stage.layout.tp)  # sequence parallelism cuts it evenly
    width = -(-(max(map(len, texts)) + max_tokens) // step) * step
    loss, before = NextLogits(), engine.loss
    engine.loss = loss
    try:
        for _ in range(max_tokens):
            tokens = _next_tokens(engine, loss, texts, choose, width)
            for number in sorted(going):
                if tokens[number] in (stop, NO_TOKEN):
                    going.remove(number)
                else:
                    texts[number].append(tokens[number])
            if not going:
                break
    finally:
        engine.loss = before
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_tokens(
    engine: Engine, loss: NextLogits, texts: list[list[int]], choose: Callable[[int, Tensor], int], width: int
) -> list[int]:
    size = engine.stage.micro_batch_size
    steps = -(-len(texts) // (size * engine.stage.layout.dp))
    mine = [row if row < len(texts) else None for step in range(steps) for row in engine.micro_rows(step)]
    # The last token is read too: what it is to be followed by stands for its place alone.
    read = [None if number is None else likelihood.Sequence([*texts[number], 0], 1) for number in mine]
    parts = range(0, len(read), size) if engine.needs_data else ()
    loss.logits.clear()
    engine.evaluate([likelihood.padded(read[i : i + size], width) for i in parts], steps, width)
    found = torch.zeros(len(texts), dtype=torch.int64)
    if loss.logits and engine.mesh.at.tp == 0:  # of the ranks that know the logits, one chooses
        for number, logits_V in zip(mine, torch.cat(loss.logits), strict=True):
            if number is not None:
                found[number] = choose(number, logits_V)
    found = found.to(engine.device)
    dist.all_reduce(found)
    numbers: list[int] = found.tolist()
    return numbers
