"""Time of each function of `megabus.kernels`, forward and backward, in eager, compiled and Triton form.

The forms take turns, call by call. Each is first checked against the eager definition in fp64 on the same device:
value and gradients in units of one rounding to bf16 of the row's entry, fp32 gradients of gains in 1e-6 of their
largest. On a GPU there is also the bandwidth at which the bytes move that have to move, beside a plain copy's, measured
there; before every call the cache is filled with something else, but the backward pass may find there what the forward
pass left (50 MB on an H100), so only the larger shapes say what memory gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare, compare_seconds
from megabus.engine.startup import on_gpu
from megabus.kernels.choice import select, why_not
from megabus.kernels.eager import Targets
from megabus.kernels.form import EAGER, Kernels
from megabus.testing.ranks import run_ranks

SMALL = 4096  # rows that the fp64 check takes: enough for several tiles a program
ALLOWED = 3.0  # error, where 1 is what one rounding may give, and sums of gains' gradients have several
COPIED = 1 << 28  # bytes of the copy that bandwidth is measured with
VOCABULARY = 32_000
SLEEPS = [2_000_000 << doublings for doublings in range(11)]  # cycles: from about 1 ms to about 1 s


@dataclass
class Case:
    """function(kernels, *given, *rest): `given` have gradients; `moved`: bytes of one forward and one backward pass."""

    name: str
    shape: str
    function: Callable[..., Tensor]
    given: list[Tensor]
    rest: list[Tensor]
    moved: int

    def first_rows(self, rows: int) -> Case:
        """The same on less data, for the check."""
        cut = [x if x.dtype == torch.float32 else x[..., :rows, :] if x.dim() == 2 else x[:, :rows] for x in self.given]
        tables = [x[:rows] for x in self.rest]
        return Case(self.name, self.shape, self.function, cut, tables, 0)


def cases(device: torch.device, tokens: int, width: int, heads: int, head_dim: int, ffn: int) -> list[Case]:
    """Bytes that must move, of bf16 (2 bytes) entries: forward reads each input and writes the output; backward reads
    each input and the output's gradient and writes the inputs' gradients. Gains, tables of cos and sin, and what is
    kept for a row are left out: they stay in the cache or weigh less than 1%."""
    T = min(tokens, 4096)
    random = torch.Generator(device).manual_seed(0)

    def bf16(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16()

    def gain(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=random, device=device)

    angle = torch.rand(T, 1, head_dim // 2, generator=random, device=device) * 6
    tables = [angle.cos(), angle.sin()]
    h, x = bf16(tokens, width), bf16(tokens, width)
    q = bf16(tokens // T, T, heads, head_dim)
    u, v = bf16(tokens, ffn), bf16(tokens, ffn)
    by_d, by_q, by_f = f"{tokens} x {width}", f"{tokens} x {heads} x {head_dim}", f"{tokens} x {ffn}"
    nd, nq, nf = (2 * y.numel() for y in (h, q, u))
    return [
        Case("residual", by_d, lambda k, *a: k.residual(*a), [h, x, gain(width)], [], 8 * nd),  # 2 + 1, 3 + 2
        Case("rms_norm", by_d, lambda k, *a: k.rms_norm(*a, 1e-5), [h, gain(width)], [], 5 * nd),  # 1 + 1, 2 + 1
        Case("rotate", by_q, lambda k, *a: k.rotate(*a), [q], tables, 4 * nq),  # 1 + 1, 1 + 1: x is not needed again
        Case("rotate_unit", by_q, lambda k, *a: k.rotate_unit(*a, None), [q], tables, 5 * nq),  # 1 + 1, 2 + 1
        Case(
            "rotate_unit, gain",
            by_q,
            lambda k, q, gain_HC, *a: k.rotate_unit(q, *a, gain_HC),
            [q, gain(heads, head_dim)],
            tables,
            5 * nq,
        ),
        Case("gate", by_f, lambda k, *a: k.gate(*a, None, None), [u, v], [], 8 * nf),  # 2 + 1, 3 + 2
        Case("gate, gains", by_f, lambda k, *a: k.gate(*a), [u, v, gain(ffn), gain(ffn)], [], 8 * nf),
    ]


def results(kernels: Kernels, case: Case, wide: bool = False) -> list[Tensor]:
    given = [(x.double() if wide else x).detach().requires_grad_() for x in case.given]
    y = case.function(kernels, *given, *(x.double() if wide else x for x in case.rest))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, given, upstream)]


def error(kernels: Kernels, case: Case) -> float:
    """The largest error in units of what one rounding may give (see above)."""
    case, worst = case.first_rows(SMALL), 0.0
    for got, want in zip(results(kernels, case), results(EAGER, case, wide=True), strict=True):
        largest = want.abs().amax(-1, keepdim=True)
        allowed = 1e-6 * largest + (2**-8 * want.abs() if got.dtype == torch.bfloat16 else 0)
        worst = max(worst, float(((got.double() - want).abs() / allowed).max()))
    return worst


@dataclass
class Head:
    """Tokens' logits before their gains, (N, V) in bf16, half of whose targets are this rank's."""

    raw: Tensor
    gain: Tensor
    targets: Targets

    @classmethod
    def of(cls, device: torch.device, tokens: int, rows: int) -> Head:
        random = torch.Generator(device).manual_seed(0)
        raw = 3 * torch.randn(tokens, rows, generator=random, device=device)
        gain = 0.5 + torch.rand(rows, generator=random, device=device)
        share = torch.rand(tokens, generator=random, device=device)
        row = torch.randint(rows, (tokens,), generator=random, device=device)
        here = row % 2 == 0
        return cls(raw.bfloat16(), gain, Targets(row, here, share, -(share * here)))

    @property
    def shape(self) -> str:
        return f"{self.raw.shape[0]} x {self.raw.shape[1]}"

    @property
    def moved(self) -> int:
        """Logits are read for their sums, then read and written."""
        return 3 * self.raw.nbytes

    def run(self, kernels: Kernels) -> Tensor:
        """The losses; logits become gradients."""
        given = (self.raw, self.gain, self.targets)
        losses: Tensor = kernels.cross_entropy_(*given, lambda x: x, lambda x: x, True)
        return losses

    def first(self, tokens: int, dtype: torch.dtype) -> Head:
        """Of that many tokens, with logits of their own in fp64 or bf16, and what counts tokens in fp64 or fp32."""
        part = self.targets.part(slice(tokens))
        if dtype == torch.float64:
            part = part._replace(share=part.share.double(), own=part.own.double())
        return Head(self.raw[:tokens].to(dtype, copy=True), self.gain, part)

    def error(self, kernels: Kernels) -> float:
        """As `error`'s, of losses and gradients."""
        part, exact = (self.first(256, dtype) for dtype in (torch.bfloat16, torch.float64))
        losses, wanted = part.run(kernels), exact.run(EAGER)
        off = (part.raw - exact.raw).abs() / (2**-8 * exact.raw.abs() + 1e-6 * part.targets.share[:, None])
        return max(float(off.max()), float((losses - wanted).abs().max() / (1e-6 * wanted.abs().max())))


class Clock:
    """Seconds that a call takes on the device, with a cold cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.other = torch.empty(COPIED // 4, device=device) if device.type == "cuda" else None

    def __call__(self, job: Callable[[], object]) -> float:
        if self.other is None:
            begun = time.perf_counter()
            job()
            return time.perf_counter() - begun
        for cycles in SLEEPS:
            self.other.zero_()
            torch.cuda._sleep(cycles)  # meanwhile the host queues the whole job: its own time must not count
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            stop.record()
            asleep = not start.query()  # still: so all is queued before the job begins, and it never waits for the host
            torch.cuda.synchronize(self.device)
            if asleep:
                return float(start.elapsed_time(stop)) / 1e3
        raise RuntimeError("the host cannot queue the job while the device sleeps: does the job wait for the device?")


def timed(clock: Clock, jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Each job's times; the jobs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 3):
        for name, job in jobs.items():
            took = clock(job)
            if turn >= 3:  # the first calls compile and warm up
                seconds[name].append(took)
    return {name: Timing(took, 0) for name, took in seconds.items()}


def both_passes(kernels: Kernels, case: Case) -> Callable[[], object]:
    given = [x.detach().requires_grad_() for x in case.given]
    upstream = torch.randn_like(case.given[0])

    def job() -> object:
        return torch.autograd.grad(case.function(kernels, *given, *case.rest), given, upstream)

    return job


def unit_rows(kernels: Kernels, rows: Tensor) -> Callable[[], object]:
    return lambda: kernels.unit_rows_(rows)


def kernels(rounds: int, small: bool) -> list[Comparison]:
    """At shapes of the 0.5B model on a GPU; at some that stay in a CPU's cache and some that do not on one thread."""
    if on_gpu():
        # tokens, d_model, heads, head_dim, ffn units
        sizes = [(tokens, width, 16, 64, 4096) for tokens in (8192, 32768) for width in (1024, 1536)]
        return _measure(torch.device("cuda"), sizes, 30)
    sizes = [(64, 48, 3, 16, 96)] if small else [(256, 256, 8, 32, 704), (1024, 512, 16, 32, 1376)]
    rows: list[Comparison] = run_ranks(1, _measure, torch.device("cpu"), sizes, rounds, timeout=600)[0]
    return rows


def _measure(device: torch.device, sizes: Sequence[Sequence[int]], rounds: int) -> list[Comparison]:
    clock, rows = Clock(device), []
    forms = [select(form, device) for form in ("eager", "compiled", "triton") if why_not(form, device) is None]
    copy, copied = None, 0
    if clock.other is not None:
        source, target = clock.other[: len(clock.other) // 2], clock.other[len(clock.other) // 2 :]
        copied = 2 * source.nbytes
        copy = timed(clock, {"copy": lambda: target.copy_(source)}, rounds)["copy"]
    for size in sizes:
        found = []
        for case in cases(device, *size):
            for form in forms:
                if (off := error(form, case)) > ALLOWED:
                    raise RuntimeError(
                        f"{form.name} {case.name}, {case.shape}: {off:.1f} times as far off as rounding goes"
                    )
            found.append((case.name, case.shape, case.moved, {form.name: both_passes(form, case) for form in forms}))
        masters = torch.randn(size[0], size[1], device=device)  # of which 4 bytes an entry are read and written
        jobs = {form.name: unit_rows(form, masters) for form in forms}
        found.append(("unit_rows_", f"{size[0]} x {size[1]}, fp32", 8 * masters.numel(), jobs))
        head = Head.of(device, min(size[0], 8192), VOCABULARY if device.type == "cuda" else 4096)
        for form in forms:
            if (off := head.error(form)) > ALLOWED:
                raise RuntimeError(f"{form.name} cross_entropy_, {head.shape}: {off:.1f} times as far off")
        head_jobs: dict[str, Callable[[], object]] = {form.name: partial(head.run, form) for form in forms}
        found.append(("cross_entropy_", head.shape, head.moved, head_jobs))
        for name, shape, moved, jobs in found:
            timings = timed(clock, jobs, rounds)
            rows += [compare_seconds(f"{name}, {shape}", form.name, "eager", timings) for form in forms[1:]]
            if copy is not None:
                reached = Timing([moved / seconds / 1e9 for seconds in timings[forms[-1].name].seconds], 0)
                possible = Timing([copied / seconds / 1e9 for seconds in copy.seconds], 0)
                target_share = ">= 0.8" if name == "residual" else ""
                what = f"{name}, {shape}, bytes a second"
                rows.append(compare(what, forms[-1].name, "a copy", reached, possible, target_share, "GB/s"))
    return rows
