"""What a micro batch takes of memory: the model's own code, run on tensors that have shapes and no entries.

So of blocks and head there is no formula here that could differ from the model. Layers are alike, and only one is run;
each further one adds what it saves. A small model is run on the CPU instead: that takes less time than operations on
shapes, the first of which imports torch's compiler, while all other ranks of a starting run wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from megabus.config.schema import ModelConfig
from megabus.estimate.live_bytes import LiveBytes
from megabus.kernels.adjacent import joined
from megabus.kernels.form import EAGER, Kernels
from megabus.model.decoder import Decoder
from megabus.model.layers import rope_at, rope_frequencies
from megabus.model.params import spec_of
from megabus.model.where import as_on_gpu
from megabus.parallel.tensor_parallel import ProcessGroupTP

CPU, META = torch.device("cpu"), torch.device("meta")
LITTLE = 2e8  # multiply-adds of a forward pass that a CPU does in some 10 ms
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Shape:
    """One micro batch on one rank. sequence_parallel and tp: see `ProcessGroupTP`; rank: which tensor-parallel one.
    kernels: see `FORMS`. on_gpu: whether it computes there, whatever device its shapes are on."""

    model: ModelConfig
    tp: int
    rank: int
    batch: int
    seq_len: int
    precision: Precision
    recompute: bool
    sequence_parallel: bool
    kernels: str
    on_gpu: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def boundary(self) -> int:
        """Bytes of h between two pipeline ranks."""
        return self.batch * self.seq_len * self.model.d_model * self.dtype.itemsize // (self.tp if self._cut else 1)

    @property
    def _cut(self) -> bool:
        return self.sequence_parallel and self.tp > 1


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro batch on a pipeline rank, without its weights and gradients.

    saved: after forward, for backward. peak: the most while forward and backward run; later: the most of it from the
    first gradient of a weight on. moved: what is read and written between products of matrices, gradients being added
    into their sums included.
    """

    saved: int
    peak: int
    later: int
    moved: int


def footprint(shape: Shape, layers: int, first: bool, last: bool) -> Footprint:
    """Of a pipeline rank of `layers` blocks, with the embedding if it is the `first`, the head if the `last`."""
    run = min(layers, 1)
    one = _run(shape, last, run)
    more = (layers - run) * layer_bytes(shape) + (_embedding_saves(shape) if first else 0)
    least = _embedding_peak(shape) if first else 0
    moved = one.moved + (layers - run) * _run(shape, False).moved + (_embedding_moves(shape) if first else 0)
    return Footprint(one.saved + more, max(one.peak + more, least), max(one.later + more, least), moved)


def layer_bytes(shape: Shape) -> int:
    """What a further block saves for backward, with what it gives to the next."""
    return _run(shape, False).saved


def _embedding_moves(shape: Shape) -> int:
    """Rows are read and written, their gradients too, into zeros as large as the weight, which go into its sum."""
    weight = -(-shape.model.vocab_size // shape.tp) * shape.model.d_model
    return 4 * shape.boundary + weight * (shape.dtype.itemsize + _sum_moves(shape.dtype))


def _sum_moves(dtype: torch.dtype) -> int:
    """Bytes of a gradient's entry that is added into its fp32 sum."""
    return dtype.itemsize + 8


def _embedding_saves(shape: Shape) -> int:
    """h, and which tokens are whose: row numbers and a mask."""
    return shape.boundary + (9 * shape.batch * shape.seq_len if shape.tp > 1 else 0)


def _embedding_peak(shape: Shape) -> int:
    """In its backward, when all layers are done: the gradient of h, and that of the weight with its fp32 form."""
    weight = -(-shape.model.vocab_size // shape.tp) * shape.model.d_model
    return 2 * shape.boundary + weight * (shape.dtype.itemsize + (4 if shape.dtype.itemsize < 4 else 0))


@lru_cache(maxsize=1024)
def _run(shape: Shape, last: bool, blocks: int = 1) -> Footprint:
    """Of one block, or of none, with the head if it is the last. What a block takes is that of its tokens and a
    constant, so larger micro batches follow from two (of one sequence, some copies are none); the head takes tokens in
    chunks, and does not."""
    if last or shape.batch <= 3:
        return _trace(shape, last, blocks)
    two, three = (_trace(replace(shape, batch=n), False) for n in (2, 3))
    pairs = zip(astuple(two), astuple(three), strict=True)
    return Footprint(*(a + (shape.batch - 2) * (b - a) for a, b in pairs))


def _trace(shape: Shape, last: bool, blocks: int = 1) -> Footprint:
    model = shape.model.model_copy(update={"n_layers": 1 + blocks if last else 2 + blocks})
    tp, device = _ShapesOnly(shape.tp, shape.rank, shape.sequence_parallel), _device(shape, last)
    with device:
        decoder = Decoder(model, (1, 1 + blocks), tp, shape.recompute, FORMS[shape.kernels])
        decoder.to(shape.dtype)
        if shape.on_gpu:
            _lay_side_by_side(list(decoder.parameters()))
        targets = torch.zeros(shape.batch, shape.seq_len, dtype=torch.int64)
        length = shape.seq_len // (shape.tp if tp.sequence_parallel else 1)
        h = torch.zeros(shape.batch, length, model.d_model, dtype=shape.dtype, requires_grad=True)
    tables = rope_at(0, shape.seq_len, rope_frequencies(model), h)  # shared by all layers, counted on their own
    known = [*decoder.parameters(), *tables, targets, h]
    live, before = LiveBytes(known, device.type), 0

    def hand_over(parameter: Tensor) -> None:
        """What DeepSpeed does with a gradient: it goes into sums, whose memory is counted elsewhere; outside of bf16
        with ZeRO-1 by way of fp32."""
        nonlocal before
        if before == 0:
            before, live.peak = live.peak, live.now
        assert parameter.grad is not None
        moved = live.moved + parameter.numel() * _sum_moves(parameter.dtype)
        parameter.grad.float()
        parameter.grad, live.moved = None, moved

    for parameter in decoder.parameters():
        parameter.register_post_accumulate_grad_hook(hand_over)
    with live, as_on_gpu(shape.on_gpu):
        out = decoder.hidden(h)
        saved = live.now
        if last:
            loss, _ = decoder.loss(out, targets)
            del out
            loss.backward()
        else:
            _Next.apply(out).backward()
    return Footprint(saved, max(before, live.peak), live.peak, live.moved)


def _lay_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """As DeepSpeed does, which makes q, k and v one matrix on a GPU, and up and gate."""
    for matrices in (True, False):
        own = [parameter for parameter in parameters if spec_of(parameter).is_matrix == matrices]
        whole = parameters[0].new_empty(sum(map(Tensor.numel, own)))
        for parameter, part in zip(own, whole.split(list(map(Tensor.numel, own))) if own else (), strict=True):
            parameter.data = part.view_as(parameter)


def _device(shape: Shape, last: bool) -> torch.device:
    model, tokens = shape.model, shape.batch * shape.seq_len
    rows = (2 * model.n_heads + 2 * model.kv_heads) * model.head_dim + 3 * model.d_ff + last * model.vocab_size
    return CPU if tokens * rows * model.d_model <= LITTLE * shape.tp else META


class _Next(torch.autograd.Function):
    """The layers that follow, as far as h sees them: they give a gradient of its size. (`backward` does too where it is
    handed one, and imports sympy.)"""

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(h_BTD)
        return h_BTD.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h_BTD,) = ctx.saved_tensors
        return torch.empty_like(h_BTD)


class _ShapesOnly(ProcessGroupTP):
    """Tensor parallelism that takes memory and sends nothing."""

    def __init__(self, size: int, rank: int, sequence_parallel: bool) -> None:
        super().__init__(None, size, rank, sequence_parallel)  # type: ignore[arg-type]

    def _all_reduce(self, x: Tensor, op: Any) -> None:
        pass

    def _all_gather(self, all_: Tensor, own: Tensor) -> None:
        pass

    def _reduce_scatter(self, own: Tensor, all_: Tensor) -> None:
        pass


def _flash(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, *_: Any) -> Tensor:
    """Attention as the kernels have it that never hold the scores; a device without entries has none of them."""
    return _Attention.apply(q_BHTC, k_BKTC, v_BKTC)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, its result and a logarithm for each query, (B, H, T) fp32 (Dao et al. 2022, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        y_BHTC = torch.empty_like(q_BHTC)  # of the same strides: heads lie within positions
        _move(q_BHTC, k_BKTC, v_BKTC, y_BHTC)
        ctx.save_for_backward(q_BHTC, k_BKTC, v_BKTC, y_BHTC, q_BHTC.new_empty(q_BHTC.shape[:3], dtype=torch.float32))
        return y_BHTC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        found = tuple(torch.empty_like(x) for x in saved[:3])
        _move(*saved, *grads, *found)
        return found


def _move(*tensors: Tensor | None) -> None:
    """These are read or written by one kernel, of which operations on shapes have no other trace."""
    if isinstance(mode := _get_current_dispatch_mode(), LiveBytes):
        mode.move(x for x in tensors if x is not None)


class _Fused(torch.autograd.Function):
    """One pass forward that makes its result and nothing else, one backward that reads the inputs again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        assert inputs[0] is not None
        found = torch.empty_like(inputs[0])
        _move(*inputs, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needed = zip(saved, ctx.needs_input_grad, strict=True)
        found = tuple(torch.empty_like(x) if need else None for x, need in needed)
        _move(*saved, *grads, *found)
        return found


def _fused(*inputs: Any) -> Tensor:
    return _Fused.apply(*(x for x in inputs if x is None or isinstance(x, Tensor)))


class _Gate(_Fused):
    """Triton's: where u and v are the halves of one tensor, so are their gradients, and the product before has them as
    one without a copy."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, v, *gains = ctx.saved_tensors
        both = joined((u, v), -1)
        halves = (torch.empty_like(u), torch.empty_like(v)) if both is None else torch.empty_like(both).chunk(2, -1)
        found = (*halves, *(None if gain is None else torch.empty_like(gain) for gain in gains))
        _move(u, v, *gains, *grads, *found)
        return found


def _gate(*inputs: Tensor | None) -> Tensor:
    return _Gate.apply(*inputs)


def _in_place(*_: Any) -> None:
    pass


def _losses_in_place(raw_NV: Tensor, *_: Any) -> Tensor:
    _move(raw_NV, raw_NV, raw_NV)  # read for its sums, read and written
    return raw_NV.new_empty(len(raw_NV), dtype=torch.float32)


UNFUSED = replace(EAGER, attention=_flash)
FUSED = Kernels(
    name="fused",
    lean=True,
    residual=_fused,
    rms_norm=_fused,
    rotate=_fused,
    rotate_unit=_fused,
    attention=_flash,
    gate=_gate,
    cross_entropy_=_losses_in_place,
    unit_rows_=_in_place,
)
# The head's loss is eager in torch.compile's form: what it makes is of the logits' size.
COMPILED = replace(FUSED, name="compiled", lean=False, gate=_fused, cross_entropy_=EAGER.cross_entropy_)
# By train.kernels. `auto` is Triton's form on GPUs that it was checked on, and eager takes more on any.
FORMS = {"auto": UNFUSED, "eager": UNFUSED, "compiled": COMPILED, "triton": FUSED}
