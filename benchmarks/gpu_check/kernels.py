"""Every kernel in every form against fp64, and the share of a copy's bandwidth at which it moves its bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from benchmarks import kernels as measured
from benchmarks.gpu_check.part import Check
from megabus.kernels.choice import Choice, select, why_not
from megabus.kernels.form import Kernels

SIZES = [(32_768, 1024, 16, 64, 4096), (8192, 1280, 20, 64, 5120), (4099, 1000, 3, 72, 1777)]
SMALL = [(64, 48, 3, 16, 96)]
UNIT_ERROR = 1e-6


def kernels(check: Check) -> None:
    _measure(check, ("triton", "eager"))


def compiled(check: Check) -> None:
    """Apart, for compiling takes longest, and may fail where Triton's kernels are right."""
    _measure(check, ("compiled",))


def _measure(check: Check, forms: tuple[Choice, ...]) -> None:
    device = torch.device("cuda" if check.on_gpu else "cpu")
    clock = measured.Clock(device)
    copy = None
    if clock.other is not None:
        half = len(clock.other) // 2
        source, target = clock.other[:half], clock.other[half:]
        seconds = measured.timed(clock, {"copy": lambda: target.copy_(source)}, 10)["copy"].median
        copy = 2 * source.nbytes / seconds
        check.tell("copy", f"{copy / 1e9:.0f} GB/s")
    for choice in forms:
        if choice != "eager" and not check.on_gpu:
            check.tell(choice, "needs a GPU")
            continue
        if (problem := why_not(choice, device)) is not None:
            check.tell(choice, problem, False)
            continue
        form = select(choice, device)
        for size in SMALL if check.small else SIZES:
            _one_size(check, form, device, size, clock, copy)


def _one_size(
    check: Check,
    form: Kernels,
    device: torch.device,
    size: tuple[int, int, int, int, int],
    clock: measured.Clock,
    copy: float | None,
) -> None:
    for case in measured.cases(device, *size):
        off = measured.error(form, case)
        took = _seconds(clock, measured.both_passes(form, case))
        text = f"{off:.2f} of {measured.ALLOWED:g} roundings off, {_speed(took, case.moved, copy)}"
        check.tell(f"{form.name} {case.name}, {case.shape}", text, off <= measured.ALLOWED)
    head = measured.Head.of(device, min(size[0], 8192), 67 if check.small else measured.VOCABULARY)
    off = head.error(form)
    text = f"{off:.2f} of {measured.ALLOWED:g} roundings off, "
    text += _speed(_seconds(clock, partial(head.run, form)), head.moved, copy)
    check.tell(f"{form.name} cross_entropy_, {head.shape}", text, off <= measured.ALLOWED)
    masters = torch.randn(size[0], size[1], device=device)
    form.unit_rows_(masters)
    off = float((masters.double().norm(dim=1) - 1).abs().max())
    took = _seconds(clock, measured.unit_rows(form, masters))
    text = f"lengths {off:.1e} off 1, {_speed(took, 8 * masters.numel(), copy)}"
    check.tell(f"{form.name} unit_rows_, {size[0]} x {size[1]}, fp32", text, off <= UNIT_ERROR)


def _seconds(clock: measured.Clock, job: Callable[[], object]) -> float:
    return median(measured.timed(clock, {"job": job}, 5)["job"].seconds)


def _speed(seconds: float, moved: int, copy: float | None) -> str:
    share = "" if copy is None else f", {moved / seconds / copy:.0%} of a copy's bandwidth"
    return f"{seconds * 1e3:.3g} ms{share}"
