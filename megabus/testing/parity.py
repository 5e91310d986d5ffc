"""Every layout against plain PyTorch in one process: logits, every parameter's gradient, losses, masters."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megabus.config import Layout, Stage
from megabus.model.decoder import Decoder
from megabus.model.documents import Documents
from megabus.model.init import build_model
from megabus.model.params import spec_of
from megabus.model.rates import relative_rate
from megabus.parallel.placement import Piece
from megabus.testing.training import Training, make_training

if TYPE_CHECKING:  # the engine brings DeepSpeed, which the ranks alone need
    from megabus.engine.engine import Batch, Engine

STEPS = 5
LAYOUTS = [
    Layout(tp, pp, dp)
    for world in (1, 2, 4)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    for dp in (1, 2, 4)
    if tp * pp * dp == world
]


@dataclass
class Trace:
    """What a run of some steps showed. Gradients are the first step's, before clipping; tensors are global.

    replica_error: 0 where the ranks that hold an entry of a gradient or master in common hold the same bits.
    """

    logits: Tensor
    grads: dict[str, Tensor]
    losses: list[float]
    grad_norms: list[float]
    masters: dict[str, Tensor]
    unit_error: float = 0.0
    replica_error: float = 0.0


def parity_training(
    kind: str,
    layout: Layout,
    transfer: dict[str, int] | None = None,
    parts: dict[str, Any] | None = None,
    **train: Any,
) -> Training:
    """A small model of awkward sizes: rows that partitions cut, a vocabulary that tp does not divide, layers that pp
    does not divide, grouped queries. transfer: what `optimizer.transfer` says; parts: further keys of the model."""
    model = {
        "kind": kind,
        "vocab_size": 67,
        "d_model": 37,
        "n_layers": 5,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 6,
        "d_ff": 60,
        **(parts or {}),
    }
    batch = {"seq_len": 13, "micro_batch_size": 2, "global_batch_size": 16, "gradient_clipping": 0}
    # A larger eps than usual: entries whose gradient is mere rounding would otherwise move by a whole lr.
    return make_training(model, layout, batch | train, {"lr": 3e-3, "eps": 1e-6, "transfer": transfer})


def batch_of(stage: Stage, step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs and targets (global_batch_size, seq_len)."""
    shape = (stage.global_batch_size, stage.seq_len + 1)
    tokens = torch.randint(stage.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def lengths_of(stage: Stage, step: int) -> list[list[int]]:
    """Of that batch's rows where documents are kept apart: the tokens of each document."""
    draw, rows = random.Random(step), []
    for _ in range(stage.global_batch_size):
        cuts = sorted(draw.sample(range(1, stage.seq_len), draw.randrange(5)))
        rows.append([stop - start for start, stop in zip([0, *cuts], [*cuts, stage.seq_len], strict=True)])
    return rows


def _alone(model: Decoder, inputs_BT: Tensor, rows: list[list[int]] | None) -> Tensor:
    """Logits (B, T, V); of documents, each read as a sequence of its own, those of one length at a time."""
    if rows is None:
        return model(inputs_BT)
    lengths = [length for row in rows for length in row]
    parts = inputs_BT.flatten().split(lengths)
    logits: dict[int, Tensor] = {}
    for length in set(lengths):
        same = [number for number, part in enumerate(parts) if len(part) == length]
        logits |= dict(zip(same, model(torch.stack([parts[number] for number in same])), strict=True))
    return torch.cat([logits[number] for number in range(len(parts))]).view(*inputs_BT.shape, -1)


def plain_trace(
    training: Training,
    packed: bool = False,
    steps: int = STEPS,
    batch: Callable[[Stage, int], tuple[Tensor, Tensor]] = batch_of,
) -> Trace:
    """The same training in plain PyTorch, without megabus's engine and without DeepSpeed. packed: of
    documents that are kept apart. batch: of each step."""
    stage, optim = training.stage, training.optimizer
    model = build_model(stage.model, training.train.seed)
    groups = [{"params": [p], "lr": optim.lr * _rate(p, training)} for p in model.parameters()]
    adam = torch.optim.AdamW(groups, optim.lr, (optim.beta1, optim.beta2), optim.eps, weight_decay=0.0)
    unit = [p for p in model.parameters() if spec_of(p).unit]
    trace = Trace(torch.empty(0), {}, [], [], {})
    for step in range(steps):
        inputs, targets = batch(stage, step)
        logits = _alone(model, inputs, lengths_of(stage, step) if packed else None)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        adam.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        clip = training.train.gradient_clipping or float("inf")
        trace.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        if step == 0:
            trace.logits = logits.detach()
            trace.grads = {name: grad.clone() for name, grad in grads.items()}
        adam.step()
        with torch.no_grad():
            for p in unit:
                p.div_(p.norm(dim=1, keepdim=True))
        trace.losses.append(float(loss.detach()))
    trace.masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trace


def _rate(parameter: torch.nn.Parameter, training: Training) -> float:
    tuned = training.optimizer.transfer
    return 1.0 if tuned is None else relative_rate(spec_of(parameter), training.stage.model, tuned.d_model)


def engine_job(training: Training, packed: bool = False, steps: int = STEPS) -> dict[str, Any]:
    """On one rank: the same training under a layout. Returns this rank's pieces; see `engine_trace`."""
    from megabus.engine.engine import Engine
    from megabus.engine.fragments import inner_optimizer

    stage = training.stage
    engine = Engine(training.train, training.optimizer, stage)
    engine.write_initial(training.train.seed)
    logits = _logits(engine, rank_batches(engine, batch_of(stage, 0), lengths_of(stage, 0) if packed else None))
    grads: dict[Piece, Tensor] = {}

    def keep_grads(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepping = {id(flat): flat.grad for group in optimizer.param_groups for flat in group["params"]}
        for piece, flat, part in pieces_of_flats(engine):
            if id(flat) in stepping:
                grads[piece] = stepping[id(flat)][part].clone()

    hook = inner_optimizer(engine.deepspeed).register_step_pre_hook(keep_grads)
    losses, norms, unit_error = [], [], engine.unit_error() or 0.0
    for step in range(steps):
        rows = lengths_of(stage, step) if packed else None
        result = engine.train_step(rank_batches(engine, batch_of(stage, step), rows), training.optimizer.lr)
        hook.remove()  # the first step's gradients only
        losses.append(result.loss)
        norms.append(result.grad_norm)
        unit_error = worst((unit_error, engine.unit_error() or 0.0))
    masters = {piece: tensors["weight"].clone() for piece, tensors in engine.read().items()}
    engine.close()
    return {
        "logits": None if logits is None else logits.cpu(),
        "grads": {piece: grad.cpu() for piece, grad in grads.items()},
        "losses": losses,
        "norms": norms,
        "masters": {piece: master.cpu() for piece, master in masters.items()},
        "unit": unit_error,
    }


def pieces_of_flats(engine: Any) -> list[tuple[Piece, Tensor, slice]]:
    """Each owned piece, the flat partition that holds it, and where."""
    from megabus.engine.fragments import flat_partitions

    found = []
    for piece, tensors in engine.read().items():
        for flat in flat_partitions(engine.deepspeed):
            offset = tensors["weight"].storage_offset()
            if tensors["weight"].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                found.append((piece, flat, slice(offset, offset + len(piece))))
    return found


def rank_batches(engine: Engine, batch: tuple[Tensor, Tensor], lengths: list[list[int]] | None = None) -> list[Batch]:
    """A rank's micro batches of a global batch. lengths: of its rows' documents, where these are kept apart."""
    parts = [engine.micro_rows(micro_step) for micro_step in range(engine.stage.grad_accum)]
    batches = [(batch[0][part.start : part.stop], batch[1][part.start : part.stop]) for part in parts]
    if lengths is None:
        return [*batches]
    mine = [chain.from_iterable(lengths[part.start : part.stop]) for part in parts]
    documents = [Documents([*each], batch[0].shape[1]) for each in mine]
    return [(*tokens, apart) for tokens, apart in zip(batches, documents, strict=True)]


def _logits(engine: Any, batches: list[Batch]) -> Tensor | None:
    """This rank's vocabulary rows of its micro batches' logits; None before the last pipeline rank."""
    if engine.stage.layout.pp == 1:
        with torch.no_grad():
            to = partial(torch.Tensor.to, device=engine.device)
            moved = ((to(inputs), None, *(each.moved(to) for each in apart)) for inputs, _, *apart in batches)
            return torch.cat([engine.module.decoder(*batch) for batch in moved])
    seen, loss_fn = [], engine.module.loss_fn

    def keep_logits(h: Tensor, targets: Tensor) -> Tensor:
        seen.append(engine.decoder.output(h))
        return loss_fn(h, targets)

    engine.module.loss_fn = keep_logits
    engine.evaluate(batches, engine.stage.grad_accum, engine.stage.seq_len)
    engine.module.loss_fn = loss_fn
    return torch.cat(seen) if seen else None


def engine_trace(training: Training, packed: bool = False, gpu: bool = False, steps: int = STEPS) -> Trace:
    """Run `engine_job` on the layout's ranks, each on a GPU where `gpu` says so, and put the pieces together."""
    from megabus.model.decoder import param_specs
    from megabus.model.params import global_shape
    from megabus.parallel.topology import rank_of
    from megabus.testing.ranks import run_ranks

    model, layout = training.stage.model, training.stage.layout
    ranks = run_ranks(layout.world, engine_job, training, packed, steps, gpu=gpu)
    shapes = {name: global_shape(spec, model) for name, spec in param_specs(model).items()}
    apart = [0.0]

    def whole(key: str) -> dict[str, Tensor]:
        full = {name: torch.full(shape, float("nan")).flatten() for name, shape in shapes.items()}
        for rank in ranks:
            for piece, values in rank[key].items():
                part = full[piece.name][piece.start : piece.stop]
                apart.append(float((part - values)[~part.isnan()].abs().sum()))
                part.copy_(values)
        return {name: values.view(shapes[name]) for name, values in full.items()}

    rows = torch.empty(training.train.global_batch_size, training.train.seq_len, model.vocab_size)
    size = training.train.micro_batch_size
    for dp in range(layout.dp):
        parts = [ranks[rank_of(layout, layout.pp - 1, dp, tp)]["logits"] for tp in range(layout.tp)]
        mine = torch.cat(parts, dim=-1).view(-1, size, *rows.shape[1:])
        rows.view(-1, layout.dp, size, *rows.shape[1:])[:, dp] = mine
    first = ranks[0]
    unit = worst(rank["unit"] for rank in ranks)
    grads, masters = whole("grads"), whole("masters")
    return Trace(rows, grads, first["losses"], first["norms"], masters, unit, worst(apart))


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences of logits, losses and masters; relative ones of gradients (per parameter, against
    its largest entry) and of gradient norms."""

    logits: float
    grads: float
    losses: float
    grad_norms: float
    masters: float

    @property
    def worst(self) -> float:
        """Of what must agree to 1e-5. Masters are shown beside it: Adam divides by |gradient|, and so magnifies."""
        return worst((self.logits, self.grads, self.losses, self.grad_norms))


def worst(values: Iterable[float]) -> float:
    """The largest, and infinity if any is NaN: max() would pass a NaN over."""
    values = list(values)
    return math.inf if any(map(math.isnan, values)) else max(values)


def difference(trace: Trace, reference: Trace) -> Difference:
    """How far a trace is from the reference; what is missing or NaN in it counts as infinitely far."""
    grads = {
        name: worst([float((trace.grads[name] - grad).abs().max() / grad.abs().max())])
        for name, grad in reference.grads.items()
    }
    norms = zip(trace.grad_norms, reference.grad_norms, strict=True)
    return Difference(
        logits=worst([float((trace.logits - reference.logits).abs().max())]),
        grads=max(grads.values()),
        losses=worst(abs(a - b) for a, b in zip(trace.losses, reference.losses, strict=True)),
        grad_norms=worst(abs(a - b) / b for a, b in norms),
        masters=worst(float((trace.masters[name] - m).abs().max()) for name, m in reference.masters.items()),
    )
