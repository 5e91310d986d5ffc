"""One rank of a layout on the GPU of shapes: what it asks the device for in a step, and in whatever else a run does."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megabus.config import RunConfig, parse_config, resolve_stages

STEPS = 2  # after each of which events are counted; what is asked for in a step is of the last one
MICRO_BATCHES = 2
SIZES = {"vocab_size": 509, "d_model": 76, "n_heads": 6, "n_kv_heads": 2, "head_dim": 14, "d_ff": 202}
GROWN = {"d_model": 100, "n_heads": 12, "n_kv_heads": 4, "d_ff": 300}
SEQ_LEN, MICRO_BATCH = 62, 3


@dataclass(frozen=True)
class Case:
    """layout, and after a growth: (tp, pp, dp)."""

    layout: tuple[int, int, int] = (1, 1, 1)
    rank: int = 0
    precision: str = "fp32"
    zero_stage: int = 1
    recompute: bool = False
    sequence_parallel: bool = False
    grows_to: tuple[int, int, int] | None = None
    deterministic: bool = False
    rest: bool = False  # what else a run does between steps

    @property
    def world(self) -> int:
        tp, pp, dp = self.layout
        return tp * pp * dp

    def __str__(self) -> str:
        tp, pp, dp = self.layout
        extra = (
            [f"ZeRO-{self.zero_stage}"]
            + ["recompute"] * self.recompute
            + ["sequence parallel"] * self.sequence_parallel
        )
        grown = [] if self.grows_to is None else ["grows to tp{} pp{} dp{}".format(*self.grows_to)]
        return " ".join([f"tp{tp} pp{pp} dp{dp} rank {self.rank}", self.precision, *extra, *grown])

    def config(self) -> RunConfig:
        (tp, pp, dp), growth = self.layout, {}
        if self.grows_to is not None:
            layout = dict(zip(("tp", "pp", "dp"), self.grows_to, strict=True))
            stage = GROWN | {
                "n_layers": pp + 1,
                "layout": layout,
                "global_batch_size": MICRO_BATCH * MICRO_BATCHES * layout["dp"],
            }
            boost = {"factor": 2.0, "tokens": 1e9}
            growth = {"growth": {"max_tokens": 1e3, "boost": boost, "stages": [stage]}}
        train = {
            "seq_len": SEQ_LEN,
            "micro_batch_size": MICRO_BATCH,
            "global_batch_size": MICRO_BATCH * MICRO_BATCHES * dp,
            "max_steps": 9,
            "precision": self.precision,
            "zero_stage": self.zero_stage,
            "recompute": self.recompute,
            "sequence_parallel": self.sequence_parallel,
            "deterministic": self.deterministic,
        }
        tree = {
            "run_dir": "unused",
            "model": {"kind": "ngpt", "n_layers": pp, **SIZES},
            "layout": {"tp": tp, "pp": pp, "dp": dp},
            "train": train,
            "optimizer": {"lr": 1e-3, "max_angle": 0.1},
            "data": {"train": "unused", "valid": "unused"},
        }
        return parse_config(tree | growth)


@dataclass
class Asked:
    """Of the device, by one thing that a run does."""

    kernels: int
    bytes: int
    waits: Counter[tuple[str, str]]
    messages: list[tuple[Any, ...]]
    quadratic: int  # calls of attention that hold all scores
    names: frozenset[str]  # of the operations that launch kernels


@dataclass
class Seen:
    """By what was done; events that are held after each step; heartbeats of each; resets of peak-memory counters by
    place."""

    asked: dict[str, Asked] = field(default_factory=dict)
    events: list[int] = field(default_factory=list)
    beats: list[int] = field(default_factory=list)
    resets: Counter[str] = field(default_factory=Counter)


def look(case: Case, spoil: Callable[[], None] | None = None) -> Seen:
    """Run a case. For a process of its own: it gets another device for good. spoil: a fault to plant before."""
    from megabus.testing.simulate import fake_world
    from tests.support import fake_accelerator, fake_gpu

    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # DeepSpeed looks how it is aligned
    fake_gpu.make_gpu()
    fake_accelerator.install()
    if spoil is not None:
        spoil()
    with fake_world(case.world, case.rank, "cpu:fake,gpu:fake"), fake_gpu.on_fake_gpu() as watch:
        seen = Seen(resets=fake_accelerator.RESETS)
        _run(case, seen, watch)
    return seen


def look_at(jobs: Sequence[tuple[Any, ...]]) -> list[Seen]:
    """`look` of each, in a fork of its own."""
    from megabus.testing.simulate import in_child

    seen = in_child(_looked, jobs)
    for job, found in zip(jobs, seen, strict=True):
        assert isinstance(found, Seen), f"{job[0]}: {found}"
    return seen


def _looked(*job: Any) -> Seen | str:
    try:
        return look(*job)
    except Exception:  # torch's hold what does not travel between processes
        return traceback.format_exc()


def _know_shapes(case: Case, engine: Any) -> None:
    """A later pipeline rank would read the shape of h from what the one before it sends, and nothing comes."""
    layout = engine.stage.layout
    if engine.mesh.at.pp > 0:
        length = SEQ_LEN // (layout.tp if case.sequence_parallel else 1)
        shape, dtype = [MICRO_BATCH, length, engine.stage.model.d_model], next(engine.module.parameters()).dtype
        engine.deepspeed.pipe_recv_buf = engine.deepspeed._allocate_or_extend_buffers(0, shape, dtype)


def _run(case: Case, seen: Seen, watch: Any) -> None:
    from megabus.checkpoint.host_memory import HostMemory
    from megabus.checkpoint.save import Snapshot
    from megabus.engine.engine import Engine
    from megabus.growth.transition import grow_engine
    from megabus.parallel.agree import on_any_rank
    from megabus.train.environment import peak_memory
    from tests.support.fake_accelerator import EVENTS

    def asked(what: str) -> None:
        count = sum(watch.kernels.values())
        seen.asked[what] = Asked(
            count, watch.bytes, watch.waits, watch.messages, watch.quadratic, frozenset(watch.kernels)
        )
        watch.reset()

    def batches(engine: Engine, count: int) -> list[Any]:
        shape = (MICRO_BATCH, SEQ_LEN)
        pair = [(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)) for _ in range(count)]
        return pair if engine.needs_data else []

    def steps(engine: Engine, what: str) -> None:
        _know_shapes(case, engine)
        beats: list[None] = []
        engine.heartbeat = lambda: beats.append(None)
        engine.deepspeed.tput_timer.start_step = 0  # where it is enabled, it waits from the third step on
        for _ in range(STEPS):
            watch.reset()
            engine.train_step(batches(engine, MICRO_BATCHES), 1e-3)
            seen.events.append(len(EVENTS))
            seen.beats.append(len(beats))
            beats.clear()
        asked(what)

    config = case.config()
    stages = resolve_stages(config, case.world)
    engine = Engine(config.train, config.optimizer, stages[0])
    asked("build")
    steps(engine, "step")
    if case.rest:
        engine.write_initial(0)
        asked("initial weights")
        engine.evaluate(batches(engine, 2), 2, SEQ_LEN)
        asked("evaluation")
        engine.unit_error()
        asked("unit rows")
        engine.gain_percentiles()
        asked("gains")
        peak_memory(engine.device)
        asked("memory")
        on_any_rank([False, True, False], engine.device)
        asked("agreement")
        Snapshot.take(None, engine.placement, engine.read(), HostMemory())
        asked("snapshot")
    if case.grows_to is not None:
        engine = grow_engine(engine, config, stages[1]).engine
        asked("growth")
        engine.boost.factor = 1.5
        steps(engine, "step after growth")


CASES = [  # of the suite
    Case(grows_to=(1, 1, 1), rest=True),
    Case((2, 2, 1), 0, "bf16", recompute=True, grows_to=(1, 2, 2)),
    Case((2, 2, 1), 2, "fp32", rest=True),
    Case((2, 2, 1), 3, "bf16", sequence_parallel=True, grows_to=(2, 1, 2)),
    Case((1, 1, 2), 1, "bf16", zero_stage=2, deterministic=True),
]
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
MORE = [
    Case(layout, rank, precision, grows_to=layout[::-1], rest=rank == 0)
    for layout in LAYOUTS
    for precision in ("fp32", "bf16")
    for rank in sorted({0, layout[0] * layout[1] * layout[2] - 1})
]
MORE += [Case((2, 1, 1), 1, p, zero_stage=2, recompute=True, sequence_parallel=True) for p in ("fp32", "bf16")]
