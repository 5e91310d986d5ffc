"""A training step here and in other implementations of nGPT, of equal shape, on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from benchmarks.arms import Arm, Step, Timing, in_turn
from benchmarks.comparisons import Comparison, compare, compare_seconds
from benchmarks.plain_ngpt import PlainNGPT
from benchmarks.training import FORMS, GPU_FORMS, ONE, arm, config_of
from megabus.engine.startup import on_gpu

PACKAGE = "nGPT-pytorch"


def missing() -> str | None:
    """Why it cannot run."""
    if find_spec("nGPT_pytorch") is None:
        return f"{PACKAGE} is not installed: pip install megabus[bench]"
    return None


def others(rounds: int, small: bool) -> list[Comparison]:
    """Its d_ff is 8/3 d_model, which 384 makes a whole number; all learn with AdamW, clip and normalise."""
    if on_gpu():
        return _beside(rounds, (1536, 24, 32_000), 1024, 16, GPU_FORMS, True, {"precision": "bf16"})
    if small:
        return _beside(rounds, (48, 2, 128), 16, 2, FORMS[:1], True)
    return _beside(rounds, (384, 4, 4096), 256, 4, FORMS, True)


def large(rounds: int, small: bool) -> list[Comparison]:
    """The same at 8k tokens a step, and at d768, beside plain PyTorch alone: some 20 minutes on a CPU."""
    if small:
        return _beside(rounds, (48, 2, 128), 32, 2, FORMS[:1], False)
    rows = _beside(rounds, (384, 4, 4096), 1024, 8, FORMS, False)
    rows += _beside(rounds, (768, 6, 4096), 256, 4, FORMS, False)
    return rows + _beside(min(rounds, 3), (768, 6, 4096), 1024, 8, FORMS, False)


def _beside(
    rounds: int,
    sizes: tuple[int, int, int],
    seq_len: int,
    micro: int,
    forms: Sequence[str],
    package: bool,
    train: Mapping[str, Any] = MappingProxyType({}),
) -> list[Comparison]:
    """Compiled beside compiled and eager beside eager are what is held against a bar, in seconds and in memory."""
    d_model, n_layers, vocab_size = sizes
    heads = {"n_heads": 12, "head_dim": d_model // 12}
    model = {"kind": "ngpt", "vocab_size": vocab_size, "d_model": d_model, "n_layers": n_layers, **heads}
    model["d_ff"] = d_model * 8 // 3
    ours = [arm(f"megabus {f}", config_of(model, ONE, seq_len, micro, micro, kernels=f, **train)) for f in forms]
    plain = {form: "plain" + ", torch.compile" * (form != "eager") for form in forms}
    names = list(dict.fromkeys(plain.values()))
    theirs = [Arm(name, 1, plain_step, (model, seq_len, micro, name != "plain")) for name in names]
    theirs += [Arm(PACKAGE, 1, package_step, (model, seq_len, micro))] * package
    timings = in_turn([*ours, *theirs], rounds, 1)
    where = f"d{d_model} L{n_layers}, {micro} x {seq_len} tokens"
    rows = []
    for form, mine in zip(forms, ours, strict=True):
        for other in theirs:
            bar = "<= 1" if other.label == plain[form] else ""
            rows.append(compare_seconds(f"step, {where}", mine.label, other.label, timings, bar))
        here, there = (Timing([timings[label].memory / 2**20], 0) for label in (mine.label, plain[form]))
        rows.append(compare(f"peak memory, {where}", mine.label, plain[form], here, there, "<= 1", "MiB"))
    return rows


def plain_step(model: dict[str, Any], seq_len: int, micro: int, compiled: bool) -> Step:
    import torch

    torch.manual_seed(0)
    sizes = {key: value for key, value in model.items() if key != "kind"}
    net = PlainNGPT(**sizes).to(_device())
    return _step(net, torch.compile(net) if compiled else net, net.normalise, model["vocab_size"], seq_len, micro)


def package_step(model: dict[str, Any], seq_len: int, micro: int) -> Step:
    """The registry's, with its weights normalised after the step, as ours are, and not wherever they are used."""
    import torch
    from nGPT_pytorch import nGPT

    torch.manual_seed(0)
    net = nGPT(
        num_tokens=model["vocab_size"],
        dim=model["d_model"],
        depth=model["n_layers"],
        dim_head=model["head_dim"],
        heads=model["n_heads"],
        add_value_residual=False,
        manual_norm_weights=True,
    ).to(_device())
    matrices = sum(p.numel() for p in net.parameters() if p.dim() == 2)
    block = 4 * model["n_heads"] * model["head_dim"] + 3 * model["d_ff"]
    assert matrices == model["d_model"] * (model["n_layers"] * block + 2 * model["vocab_size"]), "not the same shape"

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return net(tokens, return_loss=True)

    return _step(net, loss_of, net.norm_weights_, model["vocab_size"], seq_len, micro)


def _device() -> str:
    return "cuda" if on_gpu() else "cpu"


def _step(net: Any, loss_of: Any, normalise: Callable[[], object], vocab_size: int, seq_len: int, micro: int) -> Step:
    import torch

    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0, fused=True)
    tokens = torch.randint(vocab_size, (micro, seq_len + 1), generator=torch.Generator().manual_seed(0)).to(_device())

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu()):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        normalise()

    return step
