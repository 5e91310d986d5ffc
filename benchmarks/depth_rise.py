"""By how much the loss rises when a model gets layers, for every manner: the table of docs/growth.md.

python -m benchmarks.depth_rise data/twenty-train data/twenty-valid     # some minutes on one core

Trains nGPTs of one and two layers in this process and grows whole tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import get_args
from unittest.mock import patch

import torch
from torch import Tensor

import megabus
from megabus.command import Parser, run
from megabus.config import GrowthConfig, ModelConfig
from megabus.config.schema import Depth
from megabus.data.batches import TokenSource
from megabus.errors import UserError
from megabus.growth import maps
from megabus.kernels.eager import unit_rows_
from megabus.model.decoder import Decoder, param_specs
from megabus.model.params import spec_of
from megabus.table import aligned

SEQ_LEN, BATCH, LR = 256, 4, 8e-3
PAIRS = [(1, 2), (2, 4), (1, 4)]
RATIOS = [1, 1 / 9]  # of taper's shares, beside its own
MULTIPLES = [0.5, 0.6, 0.7]  # of alpha for each of two copies

State = dict[str, Tensor]


def model_of(n_layers: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, d_model=48, n_layers=n_layers, n_heads=2, head_dim=24, d_ff=132)


def trained(config: ModelConfig, source: TokenSource, stops: list[int]) -> Iterator[State]:
    """The model's weights after so many steps at a constant rate."""
    model = megabus.build_model(config, seed=0)
    adam = torch.optim.Adam(model.parameters(), LR, betas=(0.9, 0.95))
    for step in range(max(stops)):
        inputs, targets = source.batch(step * BATCH * SEQ_LEN, SEQ_LEN, range(BATCH))
        adam.zero_grad()
        model.loss(model.hidden(inputs), targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        for parameter in model.parameters():
            if spec_of(parameter).unit:
                unit_rows_(parameter.data)
        if step + 1 in stops:
            yield {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def loss_of(config: ModelConfig, state: State, source: TokenSource, sequences: int) -> float:
    model = Decoder(config)
    model.load_state_dict(state)
    rows = [range(at, at + 8) for at in range(0, sequences, 8)]
    batches = (source.batch(0, SEQ_LEN, each) for each in rows)
    return sum(float(model.loss(model.hidden(x), y)[0]) for x, y in batches) / len(rows)


def grown_states(old: ModelConfig, new: ModelConfig, state: State) -> Iterator[tuple[str, State]]:
    """Every manner; `taper` with other proportions; and two copies whose alphas are a multiple of the original's."""

    def by(depth: Depth) -> State:
        return megabus.grow_state(state, old, new, 0, GrowthConfig(depth=depth))

    for depth in get_args(Depth):
        yield depth, by(depth)
    for ratio in RATIOS:
        with patch.object(maps, "TAPER_RATIO", ratio):
            grown = by("taper")
        yield f"taper, ratio {ratio:.2f}", grown
    for multiple in MULTIPLES if new.n_layers == 2 * old.n_layers else []:
        loud, specs = by("interleave"), param_specs(new)
        yield f"{multiple} alpha each", {n: x * multiple if specs[n].gate else x for n, x in loud.items()}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.depth_rise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", help="prefix of token files")
    parser.add_argument("valid", help="prefix of token files")
    parser.add_argument("--vocab-size", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1500], help="after which to grow (300 1500)")
    parser.add_argument("--sequences", type=int, default=64, help="of the validation, in eights (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.steps) < 1 or len(set(args.steps)) < len(args.steps):
        raise UserError("--steps", args.steps, "are no steps after which to grow", "give numbers from 1 on, each once")
    torch.set_num_threads(1)
    train, valid = (TokenSource([(p, 1.0)], SEQ_LEN, 0, args.vocab_size) for p in (args.train, args.valid))
    states = {
        (layers, steps): state
        for layers in sorted({old for old, _ in PAIRS})
        for steps, state in zip(
            sorted(args.steps), trained(model_of(layers, args.vocab_size), train, args.steps), strict=True
        )
    }
    header, rows = ["new layers"], dict[str, list[str]]()
    for (layers, steps), state in states.items():
        old = model_of(layers, args.vocab_size)
        before = loss_of(old, state, valid, args.sequences)
        specs = param_specs(old)
        alpha = torch.cat([specs[name].multiplier * x for name, x in state.items() if specs[name].gate]).mean()
        print(f"L{layers} after {steps} steps: loss {before:.4f}, mean alpha {alpha:.2f}", flush=True)
        for new in (model_of(n, args.vocab_size) for first, n in PAIRS if first == layers):
            header.append(f"L{layers}-{new.n_layers} at {steps}")
            for name, grown in grown_states(old, new, state):
                line = rows.setdefault(name, [])
                line += ["–"] * (len(header) - 2 - len(line))
                line.append(f"{loss_of(new, grown, valid, args.sequences) - before:+.4f}")
    width = len(header)
    print("\n" + aligned(header, [[name, *line, *["–"] * (width - 1 - len(line))] for name, line in rows.items()], {0}))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
