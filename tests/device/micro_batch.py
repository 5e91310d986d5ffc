"""What a micro batch of a shipped configuration asks of a GPU: kernels launched, and bytes that they read and write.

The configuration's own model runs on the GPU of shapes with all its layers, in plain or in Triton's kernels: of these
runs everything but the kernel itself, which is counted by the tensors that it is given. Attention counts as a kernel
that never holds the scores.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabus.config import load_config, resolve_stages

CONFIGS = Path(__file__).parents[2] / "configs"
PRODUCTS = ("mm", "addmm", "bmm", "mm_out")
PROGRAMS = 528  # of a backward kernel of Triton's: 4 for each of an H100's processors
COUNTED = 3  # micro batches of a step, the second of which is looked at: it neither begins nor ends the step


@dataclass(frozen=True)
class Size:
    """config: a file of `configs/`; kernels: `eager` or `triton`; layers: None for its own."""

    config: str
    kernels: str = "eager"
    recompute: bool = False
    layers: int | None = None

    def __str__(self) -> str:
        return f"{self.config}, {self.kernels}" + ", recompute" * self.recompute


@dataclass(frozen=True)
class Kernels:
    """Of a micro batch; `step`: once a step, beside its micro batches."""

    micro_batch: int
    launches: dict[str, int]
    bytes: dict[str, int]
    step: int
    step_bytes: int


def count(size: Size) -> Kernels:
    """For a process of its own, as `cases.look` is."""
    from megabus.testing.simulate import fake_world
    from tests.support import fake_accelerator, fake_gpu

    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    fake_gpu.make_gpu()
    fake_accelerator.install()
    if size.kernels == "triton":
        _triton_by_its_tensors()
    with fake_world(1, 0, "cpu:fake,gpu:fake"), fake_gpu.on_fake_gpu() as watch:
        return _count(size, watch)


def _count(size: Size, watch: Any) -> Kernels:
    from megabus.engine.engine import Engine

    changed = [f"train.recompute={str(size.recompute).lower()}"]
    changed += [] if size.layers is None else [f"model.n_layers={size.layers}"]
    micro = load_config(CONFIGS / size.config, changed).train.micro_batch_size
    config = load_config(CONFIGS / size.config, [*changed, f"train.global_batch_size={micro * COUNTED}"])
    engine = Engine(config.train, config.optimizer, resolve_stages(config, 1)[0])
    shape = (micro, config.train.seq_len)
    marks: list[tuple[Counter[str], Counter[str]]] = []

    def mark() -> None:
        marks.append((Counter(watch.kernels), Counter(watch.bytes_by)))

    engine.heartbeat = mark
    for _ in range(2):
        watch.reset()
        marks.clear()
        engine.train_step(
            [tuple(torch.zeros(shape, dtype=torch.int64) for _ in range(2)) for _ in range(COUNTED)], 1e-3
        )  # type: ignore[misc]
    launches, moved = (marks[2][i] - marks[1][i] for i in (0, 1))
    step = watch.kernels.total() - COUNTED * launches.total()
    return Kernels(micro, dict(launches), dict(moved), step, watch.bytes - COUNTED * moved.total())


def _triton_by_its_tensors() -> None:
    """Let `triton` be a form for the GPU of shapes, and each of its kernels one that is counted."""
    from megabus.engine import engine
    from megabus.kernels import triton_form, triton_gate, triton_head, triton_norms, triton_qk
    from tests.support.fake_gpu import Watch

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return self

        def __call__(self, *args: Any, **_: Any) -> None:
            assert Watch.now is not None
            Watch.now.count(self.name, [x for x in args if isinstance(x, torch.Tensor)])

    for room in (triton_gate, triton_head, triton_norms, triton_qk):
        for name, value in vars(room).items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction") and value.fn.__module__ == room.__name__:
                setattr(room, name, Counted(f"triton {room.__name__.rpartition('_')[2]}{name}"))
        if hasattr(room, "programs"):
            room.programs = lambda device: PROGRAMS
    engine.select = lambda *_: triton_form.TRITON


def counted(sizes: Sequence[Size]) -> list[Kernels]:
    from megabus.testing.simulate import in_child

    found = in_child(_counted, [(size,) for size in sizes])
    for size, one in zip(sizes, found, strict=True):
        assert isinstance(one, Kernels), f"{size}: {one}"
    return found


def _counted(size: Size) -> Kernels | str:
    try:
        return count(size)
    except Exception:
        return traceback.format_exc()


SIZES = [
    Size(config, kernels, recompute)
    for config in ("ngpt_0.5b.yaml", "ngpt_1b.yaml")
    for kernels, recompute in (("eager", False), ("triton", False))
]


def lines(found: Iterable[tuple[Size, Kernels]]) -> Iterable[str]:
    yield "| configuration | micro batch | kernels | of them products | GB | by products | once a step: kernels, GB |"
    yield "|---|---|---|---|---|---|---|"
    for size, one in found:
        launches, moved = (
            (sum(each.values()), sum(n for name, n in each.items() if name in PRODUCTS))
            for each in (one.launches, one.bytes)
        )
        row = (
            size,
            one.micro_batch,
            launches[0],
            launches[1],
            f"{moved[0] / 1e9:.1f}",
            f"{moved[1] / 1e9:.1f}",
            f"{one.step}, {one.step_bytes / 1e9:.1f}",
        )
        yield f"| {' | '.join(map(str, row))} |"
