"""Compare what an imported model computes with what transformers makes of the directory that it came from."""

from __future__ import annotations

from pathlib import Path

import torch

from megabus.convert.load import load
from megabus.errors import UserError

LIMIT = 1e-4  # of the largest logit: fp32 over many layers, summed in another order
TOKENS = (2, 64)  # sequences and their length


@torch.no_grad()
def verify_logits(folder: Path, out: Path) -> str:
    """A line that says how far they are apart; both models are held whole, in fp32. Raises `UserError` where they
    differ by more than rounding. Needs the extra `hf`."""
    from transformers import AutoModelForCausalLM, logging  # slow to import

    ours = load(out)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
    longest = min(TOKENS[1], getattr(stock.config, "max_position_embeddings", TOKENS[1]))
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(ours.config.vocab_size, (TOKENS[0], longest), generator=draw)
    wanted_BTV = stock(tokens_BT).logits
    largest = float(wanted_BTV.abs().max())
    apart = float((ours(tokens_BT) - wanted_BTV).abs().max()) / largest
    if not apart <= LIMIT:
        problem = f"differ from those of transformers' {type(stock).__name__} by {apart:.2g} of the largest"
        raise UserError("--verify", "logits", problem, "do not use it, and report what model it is")
    whose = f"transformers' {type(stock).__name__}"
    return f"logits: as {whose} computes them, within {apart:.2g} of the largest ({largest:.3g})"
