"""Time of each function of `megabus.kernels`, forward and backward, in eager, compiled and Triton form.

python benchmarks/kernels.py --json kernels.json            # on a GPU if there is one, at the shapes of a 0.5B model

The forms take turns, call by call, and the median of a form's calls counts. Each form is first checked against the
eager definition in fp64 on the same device (`error`: of value and gradients, in units of one rounding to bf16 of the
row's entry; fp32 gradients of gains in 1e-6 of their largest entry; 1 is what rounding alone may give). On a GPU the
table also has the share of the bandwidth of a plain copy, measured there, at which the bytes move that have to move;
before every call the cache is filled with something else, but the backward pass may find there what the forward pass
left (50 MB on an H100), so only the larger shapes say what memory gives. Triton on a CPU is its interpreter: it is
checked, not timed, and cuts bf16's lower bits off (error 2).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megabus.kernels.table import EAGER, Kernels, select, why_not

SMALL = 4096  # rows that the fp64 check takes: enough for several tiles a program
COPIED = 1 << 28  # bytes of the copy that bandwidth is measured with
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


def timed(clock: Clock, jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each job's times; the jobs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 3):
        for name, job in jobs.items():
            took = clock(job)
            if turn >= 3:  # the first calls compile and warm up
                seconds[name].append(took)
    return {name: statistics.median(took) for name, took in seconds.items()}


def both_passes(kernels: Kernels, case: Case) -> Callable[[], object]:
    given = [x.detach().requires_grad_() for x in case.given]
    upstream = torch.randn_like(case.given[0])

    def job() -> object:
        return torch.autograd.grad(case.function(kernels, *given, *case.rest), given, upstream)

    return job


def unit_rows(kernels: Kernels, rows: Tensor) -> Callable[[], object]:
    return lambda: kernels.unit_rows_(rows)


def measure(device: torch.device, forms: list[Kernels], sizes: Sequence[Sequence[int]], rounds: int) -> list[dict]:
    clock, rows = Clock(device), []
    interpreted = device.type != "cuda"
    bandwidth = 0.0
    if clock.other is not None:
        source, target = clock.other[: len(clock.other) // 2], clock.other[len(clock.other) // 2 :]
        copy = timed(clock, {"copy": lambda: target.copy_(source)}, rounds)["copy"]
        bandwidth = 2 * source.nbytes / copy
        print(f"a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    timed_forms = [form for form in forms if not (interpreted and form.name == "triton")]
    for size in sizes:
        found: list[tuple[str, str, int, dict, dict]] = []
        for case in cases(device, *size):
            errors = {form.name: error(form, case) for form in forms}
            jobs = {form.name: both_passes(form, case) for form in timed_forms}
            found.append((case.name, case.shape, case.moved, timed(clock, jobs, rounds), errors))
        masters = torch.randn(size[0], size[1], device=device)
        jobs = {form.name: unit_rows(form, masters) for form in timed_forms}
        seconds = timed(clock, jobs, rounds)  # reads and writes 4 bytes an entry
        found.append(("unit_rows_", f"{size[0]} x {size[1]}, fp32", 8 * masters.numel(), seconds, {}))
        for name, shape, moved, seconds, errors in found:
            for form in forms:
                took = seconds.get(form.name)
                share = moved / took / bandwidth if took and bandwidth else None
                row = {"function": name, "shape": shape, "form": form.name, "seconds": took, "bytes": moved}
                rows.append({**row, "share_of_copy": share, "error": errors.get(form.name)})
            print(f"  {name}, {shape}", flush=True)
    return rows


def table(rows: Sequence[dict]) -> str:
    lines = ["| function | shape | form | µs | share of a copy's bandwidth | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        took = "–" if row["seconds"] is None else f"{row['seconds'] * 1e6:.1f}"
        share = "–" if row["share_of_copy"] is None else f"{row['share_of_copy']:.0%}"
        off = "–" if row["error"] is None else f"{row['error']:.2f}"
        lines.append(f"| {row['function']} | {row['shape']} | {row['form']} | {took} | {share} | {off} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forms", default="eager,compiled,triton", help="which (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each form that count (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args()
    device = torch.device(args.device)
    forms = []
    for name in args.forms.split(","):
        problem = why_not(name, device)
        print(f"{name} is left out: {problem}") if problem else forms.append(select(name, device))
    gpu = device.type == "cuda"
    # tokens, d_model, heads, head_dim, ffn units
    large = [(tokens, width, 16, 64, 4096) for tokens in (8192, 32768) for width in (1024, 1536)]
    rows = measure(device, forms, large if gpu else [(64, 48, 3, 16, 96)], args.rounds)
    print(table(rows))
    if args.json:
        name = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} CPU cores"
        facts = {"device": name, "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
