"""Time of a training step: nGPT beside the baseline, kernels in their forms, layouts beside one process, documents kept
apart beside whole sequences; MFU."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.arms import Arm, Step, Timing, in_turn
from benchmarks.comparisons import Comparison, compare, compare_seconds, compare_speeds
from megabus.config import Layout, ModelConfig
from megabus.engine.startup import on_gpu
from megabus.testing.training import Training, make_training

if TYPE_CHECKING:
    from megabus.engine.engine import Engine

ONE = Layout(1, 1, 1)
CPU_SHAPES = [(96, 3), (256, 4), (512, 4)]  # d_model, layers
FORMS = ("eager", "compiled")
GPU_FORMS = ("eager", "compiled", "triton")


def shape(kind: str, d_model: int, n_layers: int, vocab_size: int = 4096) -> dict[str, Any]:
    """A model with a gated MLP of 8/3 d_model, rounded up to a multiple of 32."""
    d_ff = -(-8 * d_model // 96) * 32
    head_dim = min(32, d_model // 2)
    heads = d_model // head_dim
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": heads, "head_dim": head_dim, "d_ff": d_ff}
    return {"kind": kind, "vocab_size": vocab_size, **sizes}


def paper_shape(kind: str, size: str) -> dict[str, Any]:
    """The nGPT paper's 0.5B and 1B models (arXiv 2410.01131, table 2)."""
    d_model, n_layers, heads = {"0.5B": (1024, 24, 16), "1B": (1280, 36, 20)}[size]
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": heads, "head_dim": 64, "d_ff": 4 * d_model}
    return {"kind": kind, "vocab_size": 32_000, **sizes}


def config_of(model: dict[str, Any], layout: Layout, seq_len: int, micro: int, batch: int, **train: Any) -> Training:
    batches = {"seq_len": seq_len, "micro_batch_size": micro, "global_batch_size": batch}
    return make_training(model, layout, batches | train, {"lr": 1e-3})


def training_step(config: Training, documents: int = 0) -> Step:
    """See `training_engine`, of which it is the step."""
    return training_engine(config, documents)[0]


def training_engine(config: Training, documents: int = 0) -> tuple[Step, Engine]:
    """On one rank: a step on random tokens, and its engine with its first weights. documents: of random lengths in a
    sequence, where they are kept apart."""
    import torch

    from megabus.engine.engine import Batch, Engine
    from megabus.model.documents import Documents

    engine = Engine(config.train, config.optimizer, config.stage)
    engine.write_initial(0)
    stage, generator = engine.stage, torch.Generator().manual_seed(engine.mesh.at.dp)
    shape = (stage.grad_accum, stage.micro_batch_size, stage.seq_len + 1)
    tokens = torch.randint(stage.model.vocab_size, shape, generator=generator).to(engine.device)
    batches: list[Batch] = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    if documents:
        lengths = [_lengths(stage.micro_batch_size, stage.seq_len, documents, number) for number in range(len(batches))]
        batches = [(x, y, Documents(each, stage.seq_len)) for (x, y, *_), each in zip(batches, lengths, strict=True)]
    if not engine.needs_data and not documents:
        batches = []

    def step() -> None:
        if not engine.train_step(batches, 1e-3).is_finite:
            raise RuntimeError("the loss is not finite: no step was made")

    return step, engine


def _lengths(rows: int, seq_len: int, count: int, seed: int) -> list[int]:
    """Of `count` documents in each of `rows` sequences."""
    draw, lengths = random.Random(seed), []
    for _ in range(rows):
        cuts = [0, *sorted(draw.sample(range(1, seq_len), count - 1)), seq_len]
        lengths += [stop - start for start, stop in pairwise(cuts)]
    return lengths


def compiled_blocks_step(config: Training) -> Step:
    """The same with every whole block under torch.compile, sizes fixed: what `train.kernels` does not offer."""
    import torch

    from megabus.model.decoder import KINDS

    for kind in KINDS.values():
        kind.Block.forward = torch.compile(kind.Block.forward, dynamic=False)  # in this rank's process alone
    return training_step(config)


def arm(label: str, config: Training, layout: Layout = ONE) -> Arm:
    return Arm(label, layout.world, training_step, (config,))


def step_times(rounds: int, small: bool) -> list[Comparison]:
    """On a CPU: nGPT against the baseline, and compiled kernels against eager ones, in fp32 on one thread."""
    rows = []
    for d_model, n_layers in [(32, 2)] if small else CPU_SHAPES:
        seq_len, micro = (16, 2) if small else (256, 4)
        forms = FORMS[:1] if small else FORMS
        arms = [
            arm(f"{kind} {form}", config_of(shape(kind, d_model, n_layers), ONE, seq_len, micro, micro, kernels=form))
            for form in forms
            for kind in ("ngpt", "gpt")
        ]
        where = f"d{d_model} L{n_layers}, {micro} x {seq_len} tokens"
        rows += _overheads(where, forms, in_turn(arms, rounds, max(1, 512 // d_model)), {"compiled": "<= 1"})
    return rows


def _overheads(
    where: str, forms: Sequence[str], timings: dict[str, Timing], targets: dict[str, str]
) -> list[Comparison]:
    rows = [
        compare_seconds(f"step, {where}", f"ngpt {form}", f"gpt {form}", timings, targets.get(form, ""))
        for form in forms
    ]
    return rows + [compare_seconds(f"step, {where}", f"ngpt {form}", "ngpt eager", timings) for form in forms[1:]]


def blocks(rounds: int, small: bool) -> list[Comparison]:
    """Does compiling whole blocks win over compiling what lies between their matrix products?"""
    model, seq_len, micro = (shape("ngpt", 32, 2), 16, 2) if small else (shape("ngpt", 256, 4), 256, 4)
    train: dict[str, Any] = {}
    if on_gpu():
        model, seq_len, train = paper_shape("ngpt", "0.5B"), 4096, {"precision": "bf16"}
    whole = config_of(model, ONE, seq_len, micro, micro, kernels="eager", **train)
    arms = [arm(form, config_of(model, ONE, seq_len, micro, micro, kernels=form, **train)) for form in FORMS]
    arms.append(Arm("whole blocks", 1, compiled_blocks_step, (whole,)))
    timings = in_turn(arms, rounds, 2)
    where = f"d{model['d_model']} L{model['n_layers']}, {micro} x {seq_len} tokens"
    return [compare_seconds(f"step, ngpt {where}", "whole blocks", form, timings) for form in FORMS]


def documents(rounds: int, small: bool) -> list[Comparison]:
    """What it costs to keep four documents a sequence apart."""
    shapes = [(shape("ngpt", 32, 2), 16, 2)] if small else [(shape("ngpt", d, n), 256, 4) for d, n in CPU_SHAPES]
    train: dict[str, Any] = {}
    if on_gpu():
        shapes, train = [(paper_shape("ngpt", "0.5B"), 4096, 4)], {"precision": "bf16"}
    rows = []
    for model, seq_len, micro in shapes:
        config = config_of(model, ONE, seq_len, micro, micro, **train)
        apart, whole = "4 documents apart", "whole sequences"
        arms = [Arm(label, 1, training_step, (config, n)) for label, n in ((apart, 4), (whole, 0))]
        timings = in_turn(arms, rounds, max(1, 512 // model["d_model"]))
        where = f"d{model['d_model']} L{model['n_layers']}, {micro} x {seq_len} tokens"
        rows.append(compare_seconds(f"step, ngpt {where}", apart, whole, timings, "<= 1.1"))
    return rows


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def products(world: int, count: int) -> Step:
    """A rank's share of some products of matrices: how much faster two processes are that have nothing to tell."""
    import torch

    device = "cuda" if on_gpu() else "cpu"
    x_ND, weight_DD = torch.randn(256, 512, device=device), torch.randn(512, 512, device=device)

    def step() -> None:
        for _ in range(count // world):
            x_ND @ weight_DD

    return step


def layouts(rounds: int, small: bool) -> list[Comparison]:
    """Two ranks against one process on the same global batch, in micro batches of four sequences; none on one GPU."""
    model, seq_len, batch = (shape("ngpt", 32, 2), 16, 8) if small else (shape("ngpt", 512, 4), 256, 32)
    train: dict[str, Any] = {}
    if on_gpu():
        model, seq_len, train = paper_shape("ngpt", "0.5B"), 4096, {"precision": "bf16"}
    targets = {Layout(1, 1, 2): ">= 0.95", Layout(1, 2, 1): ">= 0.8", Layout(2, 1, 1): ">= 0.85"}
    targets = {layout: target for layout, target in targets.items() if not on_gpu() or layout.world <= gpus()}
    if not targets:
        return []
    all_layouts = [ONE, *targets]
    arms = [arm(str(x), config_of(model, x, seq_len, 4, batch, **train), x) for x in all_layouts]
    one, two, apart = "products, 1 process", "products, 2 processes", "two trainings, each of half of the batch"
    arms += [Arm(label, n, products, (n, 64 if small else 2048)) for n, label in ((1, one), (2, two))]
    half = config_of(model, ONE, seq_len, 4, batch // 2, **train)
    arms.append(Arm(apart, 2, training_step, (half,), apart=True))
    timings = in_turn(arms, rounds, 1)
    where = f"d{model['d_model']} L{model['n_layers']}, {batch} x {seq_len} tokens"
    silent = _gain(timings, apart, str(ONE))
    rows = [compare_speeds("speed of matrix products, nothing sent", two, one, timings)]
    rows.append(compare_speeds(f"speed, {where}, nothing sent", apart, str(ONE), timings))
    for layout, target in targets.items():
        rows.append(compare_speeds(f"speed, {where}", str(layout), str(ONE), timings))
        what, gain = f"what two ranks gain, {where}", _gain(timings, str(layout), str(ONE))
        rows.append(compare(what, f"{layout} over {ONE}", "two silent trainings over one", gain, silent, target, "x"))
    return rows


def _gain(timings: dict[str, Timing], two: str, one: str) -> Timing:
    """How many times as fast two are as one, in each round."""
    pairs = zip(timings[one].seconds, timings[two].seconds, strict=True)
    return Timing([slow / fast for slow, fast in pairs], timings[two].memory)


def sizes(rounds: int, small: bool) -> list[Comparison]:
    """How cost grows with the model and with the length of its sequences: slopes in log-log of a step's seconds beside
    those of its FLOPs, each with the memory of the larger one."""
    from megabus.model.cost import count_parameters, flops_per_token

    models = [(32, 1), (48, 2)] if small else [(128, 2), (256, 4), (512, 6), (1024, 8)]
    lengths = [16, 32] if small else [256, 1024, 4096, 8192]
    by_size = [(shape("ngpt", d, n), lengths[0]) for d, n in models]
    by_length = [(shape("ngpt", *models[1]), length) for length in lengths]
    rows = []
    for cases, batch in ((by_size, 4), (by_length, 1)):
        arms = {str(i): arm(str(i), config_of(model, ONE, n, batch, batch)) for i, (model, n) in enumerate(cases)}
        timings = in_turn(list(arms.values()), min(rounds, 3), 1)
        for i, ((before, short), (after, long)) in enumerate(pairwise(cases)):
            old, new = ModelConfig(**before), ModelConfig(**after)
            if batch == 1:
                what, times = f"{short} to {long} tokens, d{old.d_model} L{old.n_layers}", long / short
            else:
                names = [f"d{x.d_model} L{x.n_layers} ({count_parameters(x) / 1e6:.1f}M)" for x in (old, new)]
                what = f"{names[0]} to {names[1]}, 4 x {short} tokens"
                times = count_parameters(new) / count_parameters(old)
            flops = [flops_per_token(x, n) * n for x, n in ((old, short), (new, long))]
            a, b = timings[str(i)], timings[str(i + 1)]
            seconds = [math.log(y / x) / math.log(times) for x, y in zip(a.seconds, b.seconds, strict=True)]
            slope = Timing([math.log(flops[1] / flops[0]) / math.log(times)] * len(seconds), 0)
            what = f"slope of a step's seconds, {what}: {a.median:.3g} s, {b.median:.3g} s"
            rows.append(compare(what, "seconds", "FLOPs", Timing(seconds, b.memory), slope, "", ""))
    return rows


def gpu_step_times(rounds: int, small: bool) -> list[Comparison]:
    """On a GPU in bf16: the 0.5B shape at 1k and 4k tokens of context, 16k tokens a step."""
    rows = []
    for seq_len in (1024, 4096):
        micro = 16_384 // seq_len
        options = {"precision": "bf16"}
        arms = [
            arm(
                f"{kind} {form}",
                config_of(paper_shape(kind, "0.5B"), ONE, seq_len, micro, micro, kernels=form, **options),
            )
            for form in GPU_FORMS
            for kind in ("ngpt", "gpt")
        ]
        where = f"0.5B, {micro} x {seq_len} tokens"
        targets = dict.fromkeys(GPU_FORMS[1:], "<= 1.03")
        rows += _overheads(where, GPU_FORMS, in_turn(arms, rounds, 5), targets)
    return rows


def mfu(rounds: int, small: bool) -> list[Comparison]:
    """On a GPU in bf16: the share of its dense peak at which a step's FLOPs are made (counted in `model/cost.py`)."""
    from megabus.model.cost import flops_per_token
    from megabus.model.peak import peak_flops

    peak, rows = peak_flops(None, "bf16"), []
    if peak is None:
        raise RuntimeError("this GPU's peak is not known to megabus.model.cost")
    for size in ("0.5B", "1B"):
        config = config_of(paper_shape("ngpt", size), ONE, 4096, 4, 32, kernels="triton", precision="bf16")
        timing = in_turn([arm(size, config)], rounds, 3)[size]
        flops = 32 * 4096 * flops_per_token(ModelConfig(**paper_shape("ngpt", size)), 4096)
        reached = Timing([flops / seconds for seconds in timing.seconds], timing.memory)
        bound = Timing([peak] * rounds, 0)
        rows.append(compare(f"MFU, {size}, 32 x 4096 tokens", "FLOP/s", "peak", reached, bound, ">= 0.5", "FLOP/s"))
    return rows
