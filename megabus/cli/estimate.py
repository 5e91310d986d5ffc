"""Estimate a run on a cluster before there is one: memory, step time, layouts, growths. Computed, with no GPU.

  megabus estimate --config run.yaml --world 1024 --gpu h100
  megabus estimate --config run.yaml --world 16 --gpu a100 --nodes-of 4 layout.tp=4
  megabus estimate --config run.yaml --world 1 --gpu rtx4090
  megabus estimate --config run.yaml --world 1 --gpu-memory-gib 16 --gpu-tflops 88 --gpu-gbs 672
  megabus estimate --config run.yaml --world 4 --gpu cpu --json -

Times are predicted, not measured: docs/estimate.md says from what.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megabus.command import Parser
from megabus.config import RunConfig, load_config, resolve_stages
from megabus.config.stages import stage_section
from megabus.errors import UserError
from megabus.estimate.devices import DEVICES, Device, device
from megabus.pathname import path_of, path_text

if TYPE_CHECKING:  # it imports torch: only where it is needed
    from megabus.estimate.whole_run import StageEstimate

REBUILD = 5.0


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus estimate", description=__doc__)
    parser.add_argument("--config", type=path_of, required=True, help="YAML of the run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--world", type=int, required=True, help="ranks")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(DEVICES)} (%(default)s)")
    parser.add_argument("--nodes-of", type=int, help="devices of a node; tensor parallelism is proposed within one")
    parser.add_argument("--gpu-memory-gib", type=float, help="of a device, in 2^30 bytes")
    parser.add_argument("--reserve-gb", type=float, help="of that, for drivers and communication")
    parser.add_argument("--gpu-tflops", type=float, help="dense peak of a device in the run's precision")
    parser.add_argument("--gpu-gbs", type=float, help="GB/s of a device's memory")
    parser.add_argument("--efficiency", type=float, help="share of the peak that a layer's matrix products reach")
    parser.add_argument("--intra-gbs", type=float, help="GB/s one way between devices of a node, as reached")
    parser.add_argument("--inter-gbs", type=float, help="GB/s one way of a device between nodes, as reached")
    parser.add_argument("--intra-us", type=float, help="microseconds of a message within a node")
    parser.add_argument("--inter-us", type=float, help="microseconds of a message between nodes")
    parser.add_argument("--rebuild-s", type=float, default=REBUILD, help="seconds to build an engine (%(default)s)")
    parser.add_argument("--top", type=int, default=5, help="layouts shown of each stage (%(default)s)")
    parser.add_argument(
        "--json", type=path_text, metavar="FILE", help="write the values there; - prints them in place of the tables"
    )
    args = parser.parse_intermixed_args(argv)
    above_0 = ("gpu_memory_gib", "gpu_tflops", "gpu_gbs", "efficiency", "intra_gbs", "inter_gbs")
    for name in ("world", "nodes_of", "top", *above_0):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise UserError("--" + name.replace("_", "-"), value, "is no number above 0", "give a positive number")
    for name in ("reserve_gb", "intra_us", "inter_us", "rebuild_s"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise UserError("--" + name.replace("_", "-"), value, "is no number from 0 on", "give 0 or more")
    if args.efficiency is not None and args.efficiency > 1:
        raise UserError("--efficiency", args.efficiency, "is more than the whole peak", "give a share, such as 0.6")
    config = load_config(args.config, args.overrides)
    from megabus.estimate.whole_run import as_dict, estimate_run, tables

    chosen = _changed(device(args.gpu), args)
    if chosen.reserve >= chosen.memory:
        problem = f"leaves nothing of a device's {chosen.memory / 1e9:g} GB"
        raise UserError(
            "--reserve-gb", f"{chosen.reserve / 1e9:g}", problem, "give less, or more with --gpu-memory-gib"
        )
    stages = resolve_stages(config, args.world)
    estimates = estimate_run(config, stages, chosen, args.top, args.rebuild_s)
    values = json.dumps(as_dict(estimates, chosen), indent=1)
    if args.json and args.json != "-":
        try:
            Path(args.json).write_text(values + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                "--json", args.json, f"cannot be written ({error.strerror})", "name another file"
            ) from error
    print(values if args.json == "-" else tables(estimates, chosen), flush=True)
    _refuse_what_fits_nowhere(config, estimates, chosen)
    return 0


def _refuse_what_fits_nowhere(config: RunConfig, estimates: Sequence[StageEstimate], device: Device) -> None:
    from megabus.estimate.layouts import micro_batches

    for one in estimates:
        if not one.ranking.best and one.ranking.own is None:
            room = f"{(device.memory - device.reserve) / 1e9:.3g} GB"
            tried = ", ".join(map(str, micro_batches(one.stage)))
            problem = f"fits no layout of {one.stage.layout.world} ranks of {room}, with micro batches of {tried}"
            if not config.train.recompute:
                problem += " and train.recompute: false"
            remedy = "try more ranks (--world), a device with more memory, or a smaller model"
            if one.settings is not None:
                remedy = f"it fits with {one.settings}; else {remedy}"
            raise UserError(stage_section(one.stage.index), f"stage {one.name}", problem, remedy)


def _changed(base: Device, args: argparse.Namespace) -> Device:
    """The device with what the flags say in place of the table's figures."""

    def given(value: float | None, scale: float, default: float) -> float:
        return default if value is None else value * scale

    tflops = None if args.gpu_tflops is None else args.gpu_tflops * 1e12
    figures = (args.gpu_memory_gib, args.gpu_tflops, args.gpu_gbs)
    own = all(figure is not None for figure in figures)  # of a card that the table need not know
    return replace(
        base,
        name="this GPU" if own else base.name,
        memory=given(args.gpu_memory_gib, 2**30, base.memory),
        reserve=given(args.reserve_gb, 1e9, base.reserve),
        bf16=tflops or base.bf16,
        fp32=tflops or base.fp32,
        efficiency=given(args.efficiency, 1, base.efficiency),
        memory_bandwidth=given(args.gpu_gbs, 1e9, base.memory_bandwidth),
        intra=replace(
            base.intra,
            latency=given(args.intra_us, 1e-6, base.intra.latency),
            bandwidth=given(args.intra_gbs, 1e9, base.intra.bandwidth),
        ),
        inter=replace(
            base.inter,
            latency=given(args.inter_us, 1e-6, base.inter.latency),
            bandwidth=given(args.inter_gbs, 1e9, base.inter.bandwidth),
        ),
        nodes_of=args.nodes_of or base.nodes_of,
    )
