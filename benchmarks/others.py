"""A training step here and in other implementations of nGPT, of equal shape, on one process."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.arms import Arm, Step, in_turn
from benchmarks.comparisons import Comparison, compare_seconds
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
    d_model, n_layers, vocab_size, seq_len, micro = (48, 2, 128, 16, 2) if small else (384, 4, 4096, 256, 4)
    train: dict[str, Any] = {}
    if on_gpu():
        d_model, n_layers, vocab_size, seq_len, micro = 1536, 24, 32_000, 1024, 16
        train = {"precision": "bf16"}
    head_dim = d_model // 12
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": 12, "head_dim": head_dim, "d_ff": d_model * 8 // 3}
    model = {"kind": "ngpt", "vocab_size": vocab_size, **sizes}
    forms = FORMS[:1] if small else GPU_FORMS if on_gpu() else FORMS
    ours = [arm(f"megabus {f}", config_of(model, ONE, seq_len, micro, micro, kernels=f, **train)) for f in forms]
    compiled = () if small else (True,)
    theirs = [
        Arm("plain" + ", torch.compile" * c, 1, plain_step, (model, seq_len, micro, c)) for c in (False, *compiled)
    ]
    theirs.append(Arm(PACKAGE, 1, package_step, (model, seq_len, micro)))
    timings = in_turn([*ours, *theirs], rounds, 1)
    where = f"d{d_model} L{n_layers}, {micro} x {seq_len} tokens"
    return [compare_seconds(f"step, {where}", mine.label, other.label, timings) for mine in ours for other in theirs]


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
