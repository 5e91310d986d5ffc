"""Documents of a packed batch: the same numbers as of each alone, in fp64, from code that shares nothing with ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch._subclasses.fake_tensor import FakeTensorMode

from megabus.generate import generate
from megabus.kernels import packed
from megabus.kernels.eager import attention
from megabus.kernels.packed import packed_attention
from megabus.model.documents import Documents
from tests.support import reference
from tests.support.small_models import BASE, GQA, KINDS, config, lively_state, model_of

SEQ_LEN = 11
ROWS = [[11], [1, 4, 6], [5, 5, 1]]
LENGTHS = [length for row in ROWS for length in row]


def tokens_and_targets():
    draw = torch.Generator().manual_seed(5)
    return torch.randint(BASE["vocab_size"], (2, len(ROWS), SEQ_LEN), generator=draw)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def packed_loss(model, documents):
    """Of a model that has read the batch: (logits, gradients of the mean loss)."""
    inputs, targets = tokens_and_targets()
    loss, _ = model.loss(model.hidden(inputs, None, documents), targets)
    return model(inputs, None, documents).detach(), gradients(model, loss)


def alone(state, model_config):
    """The same of every document as a sequence of its own, by the reference."""
    p = {name: x.double().requires_grad_() for name, x in state.items()}
    inputs, targets = (x.flatten().split(LENGTHS) for x in tokens_and_targets())
    logits = torch.cat([reference.logits(p, model_config, document[None])[0] for document in inputs])
    torch.nn.functional.cross_entropy(logits, torch.cat(targets)).backward()
    return logits.detach().view(len(ROWS), SEQ_LEN, -1), {name: x.grad for name, x in p.items()}


def furthest(one, other):
    (logits, grads), (right, right_grads) = one, other
    return max(
        float((logits - right).abs().max()),
        *(float((grads[name] - grad).abs().max() / grad.abs().max()) for name, grad in right_grads.items()),
    )


@pytest.mark.parametrize("heads", [{}, GQA], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_those_of_each_alone(kind, heads):
    model_config = config(kind, heads)
    state = lively_state(model_config)
    model, right = model_of(model_config, state), alone(state, model_config)
    documents = Documents(LENGTHS, SEQ_LEN)
    assert furthest(packed_loss(model, documents), right) < 1e-9
    model.recompute = True
    assert furthest(packed_loss(model, documents), right) < 1e-9
    assert furthest(packed_loss(model, None), right) > 1e-2  # control: attention across documents


def test_positions_restart():
    """nGPT's gains on q act after RoPE, entry by entry: positions count, and not only how far apart they are."""
    model_config = config("ngpt")
    state = lively_state(model_config)
    right, documents = alone(state, model_config), Documents(LENGTHS, SEQ_LEN)
    documents.positions = torch.arange(SEQ_LEN).repeat(len(ROWS))
    assert furthest(packed_loss(model_of(model_config, state), documents), right) > 1e-2


def test_padding_is_documents_of_its_own():
    assert Documents([], SEQ_LEN).padded(2).lengths == (SEQ_LEN, SEQ_LEN)
    padded = Documents(LENGTHS, SEQ_LEN).padded(1)
    assert padded.lengths == (*LENGTHS, SEQ_LEN)
    assert padded.positions.tolist() == [*Documents(LENGTHS, SEQ_LEN).positions.tolist(), *range(SEQ_LEN)]


def test_one_document_a_sequence_is_no_mask():
    model = model_of(config("gpt", GQA), lively_state(config("gpt", GQA)))
    inputs, _ = tokens_and_targets()
    whole = model(inputs, None, Documents([SEQ_LEN] * len(ROWS), SEQ_LEN))
    assert torch.allclose(whole, model(inputs), rtol=0, atol=1e-12)


def test_text_is_generated_as_before():
    """A prompt is one document: what a model says after it is what it says after the document in a packed batch."""
    model = model_of(config("ngpt"), lively_state(config("ngpt")))
    inputs, _ = tokens_and_targets()
    packed_logits = model(inputs, None, Documents(LENGTHS, SEQ_LEN))
    (token,) = generate(model, inputs[1, 5:].tolist(), 1, temperature=0)
    assert token == int(packed_logits[1, -1].argmax())


# ---- which kernel


def as_varlen(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What PyTorch documents of its function, by an explicit mask over all tokens."""
    assert bounds is bounds_k
    assert bounds.dtype == torch.int32
    assert longest == longest_k == int(bounds.diff().max())
    assert (window_size, enable_gqa) == ((-1, 0), True)
    number = torch.bucketize(torch.arange(len(q)), bounds[1:], right=True)
    mask = (number[:, None] == number).tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attention(q, k, v, mask, False, scale)[0].transpose(0, 1)


def as_before_2_12(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size):
    """The function that need not be told of grouped heads."""
    return as_varlen(
        q, k, v, bounds, bounds_k, longest, longest_k, scale=scale, window_size=window_size, enable_gqa=True
    )


@pytest.fixture
def at_once(monkeypatch):
    """Calls of this make all that follow go to a function as on a GPU: all documents in one call."""

    def turn_to(function):
        monkeypatch.setattr(packed, "runs_varlen", lambda q: True)
        monkeypatch.setattr(varlen, "varlen_attn", function)

    packed._varlen.cache_clear()
    yield turn_to
    packed._varlen.cache_clear()


@pytest.mark.parametrize("function", [as_varlen, as_before_2_12])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_all_at_once_and_one_by_one_agree(kv_heads, function, at_once):
    draw, documents = torch.Generator().manual_seed(1), Documents(LENGTHS, SEQ_LEN)
    q, k, v = (torch.randn(33, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    one_by_one = packed_attention(q, k, v, LENGTHS, documents.bounds, 0.3)
    at_once(function)
    assert torch.allclose(packed_attention(q, k, v, LENGTHS, documents.bounds, 0.3), one_by_one, rtol=0, atol=1e-12)


def test_pytorch_takes_the_call(at_once):
    """Its own function, by shapes alone, forward and backward: there is no GPU here that could run it."""
    at_once(varlen.varlen_attn)
    with FakeTensorMode():
        q, k, v = (torch.empty(33, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        y = packed_attention(q, k, v, LENGTHS, torch.empty(len(LENGTHS) + 1, dtype=torch.int32), 0.3)
        y.sum().backward()
    assert y.shape == q.grad.shape == q.shape
    assert k.grad.shape == v.grad.shape == k.shape


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "runs"),
    [
        (torch.bfloat16, 64, (9, 0), True),
        (torch.bfloat16, 64, (7, 5), False),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 60, (9, 0), False),
        (torch.bfloat16, 320, (9, 0), False),
    ],
)
def test_which_gpus_and_heads_go_at_once(dtype, head_dim, capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(5, 2, head_dim), device="cuda")
    assert packed.runs_varlen(on_gpu) == runs
    assert not packed.runs_varlen(torch.empty(5, 2, head_dim, dtype=dtype))
