"""Print how far every layout of 1, 2 and 4 ranks is from plain PyTorch in one process (fp32, gloo, CPU).

  megabus parity
  megabus parity --device cuda  # ranks on NVIDIA GPUs, over NCCL: the layouts that there are GPUs for

The rows of the second table have `train.sequence_parallel: true`, and a seq_len that tp divides. Those of the third
have `data.document_mask: true` besides: the one process reads each document as a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from megabus.command import Parser
from megabus.engine.startup import on_gpu, prepare_environment
from megabus.errors import UserError
from megabus.testing.ranks import preload

LIMIT = 1e-5


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus parity", description=__doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a rank on each GPU (%(default)s)"
    )
    gpu = parser.parse_args(argv).device == "cuda"
    ranks = 4 if not gpu else _gpus()
    if not gpu:
        preload()
    from megabus.testing.parity import LAYOUTS, difference, engine_trace, parity_training, plain_trace, worst

    header = (
        "model",
        "layout",
        "ZeRO",
        "logits",
        "gradients",
        "5 losses",
        "grad norm",
        "masters",
        "unit rows",
    )
    largest = 0.0
    parallel: dict[str, Any] = {"seq_len": 12, "sequence_parallel": True}
    tables: list[tuple[dict[str, Any], bool]] = [({}, False), (parallel, False), (parallel, True)]
    for (train, packed), kind in product(tables, ("ngpt", "gpt")):
        if kind == "ngpt":
            print(("\n{:<6}{:<14}{:<6}" + "{:>11}" * 6).format(*header))
        reference = plain_trace(parity_training(kind, LAYOUTS[0], **train), packed)
        shown = [layout for layout in LAYOUTS if layout.world <= ranks]
        for layout in [layout for layout in shown if not train or packed or layout.tp > 1]:
            for zero in (1, 2) if layout.pp == 1 and layout.dp > 1 else (1,):
                trace = engine_trace(parity_training(kind, layout, zero_stage=zero, **train), packed, gpu)
                d = difference(trace, reference)
                numbers = (d.logits, d.grads, d.losses, d.grad_norms, d.masters)
                unit = f"{trace.unit_error:>11.1e}" if kind == "ngpt" else f"{'-':>11}"
                cells = "".join(f"{number:>11.1e}" for number in numbers)
                print(f"{kind:<6}{layout!s:<14}{zero:<6}{cells}{unit}", flush=True)
                largest = worst((largest, d.worst))
    print(f"largest difference {largest:.1e} (limit {LIMIT:.0e})")
    return int(not largest <= LIMIT)


def _gpus() -> int:
    prepare_environment()
    if not on_gpu():
        raise UserError(
            "--device", "cuda", "there is no GPU that torch can use", "leave it out: ranks are on CPUs then"
        )
    import torch

    return torch.cuda.device_count()
