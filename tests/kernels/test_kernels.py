"""Every form of the functions between matrix products, against the eager definition in fp64.

Triton runs under its interpreter (see conftest.py), which is no proof of what its compiler makes: the last test
compiles for a GPU, and `python -m benchmarks --gpu --only kernels` checks the values on one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megabus.errors import UserError
from megabus.kernels import checked, eager
from megabus.kernels import choice as kernel_choice
from megabus.kernels.adjacent import joined
from megabus.kernels.choice import select
from megabus.kernels.compiled import _compile
from megabus.kernels.form import EAGER, FUNCTIONS
from megabus.model.decoder import Decoder
from tests.support.forms import HAS, SMALL, TRITON_ONLY, form_of, interpreter_rounds_to_nearest  # noqa: F401
from tests.support.later import Later
from tests.support.small_models import config, lively_state, loss_of, model_of

dynamo = Later("torch._dynamo.testing")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


# ---- inputs, and what a form must come to


class Inputs:
    """Random tensors, the same for every form."""

    def __init__(self, dtype, rows=11, width=37, heads=3):
        self.dtype, self.rows, self.width, self.heads = dtype, rows, width, heads
        self.random = torch.Generator().manual_seed(rows * 1000 + width)

    def matrix(self, dtype=None):
        return torch.randn(self.rows, self.width, generator=self.random).to(dtype or self.dtype)

    def gain(self, *shape):
        return 0.5 + torch.rand(shape or (self.width,), generator=self.random)

    def heads_of(self):
        """(2, T, H, C), a view of (2, H, T, C): as attention's gradients come."""
        shape = 2, self.heads, self.rows, self.width
        return torch.randn(shape, generator=self.random).to(self.dtype).transpose(1, 2)

    def tables(self):
        angle = torch.rand(self.rows, 1, self.width // 2, generator=self.random) * 6
        return angle.cos(), angle.sin()


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) else x


CASES = {  # by name: (function, its arguments); those that require a gradient come first
    "residual": lambda at: ("residual", [at.matrix(), at.matrix(), at.gain()], []),
    "rms_norm": lambda at: ("rms_norm", [at.matrix(), at.gain()], [1e-5]),
    "rotate": lambda at: ("rotate", [at.heads_of()], [*at.tables()]),
    "rotate_unit": lambda at: ("rotate_unit", [at.heads_of()], [*at.tables(), None]),
    "rotate_unit gain": lambda at: ("rotate_unit", [at.heads_of(), at.gain(at.heads, at.width)], [*at.tables()]),
    "gate": lambda at: ("gate", [at.matrix(), at.matrix()], [None, None]),
    "gate gain": lambda at: ("gate", [at.matrix(), at.matrix(), at.gain(), at.gain()], []),
}
TURNS = [name for name in CASES if name.startswith("rotate")]


def call(kernels, name, given, rest):
    """In the order of the arguments: cos and sin come before the gain."""
    order = [given[0], *rest, *given[1:]] if name == "rotate_unit" else [*given, *rest]
    return getattr(kernels, name)(*order)


def results(kernels, case, upstream=None, to=lambda x: x):
    """The value, and the gradient of every tensor that has one."""
    name, given, rest = case
    given = [to(x).detach().requires_grad_() for x in given]
    y = call(kernels, name, given, [to(x) if isinstance(x, torch.Tensor) else x for x in rest])
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case[1][0].dtype)
    return [y.detach(), *torch.autograd.grad(y, given, to(upstream))]


def check(found, wanted, given):
    """One rounding to the dtype that is asked for, of what fp32 gives: 1e-6 of the row's largest entry."""
    for got, want, like in zip(found, wanted, [given[0], *given], strict=True):
        assert got.dtype == like.dtype
        assert got.shape == want.shape
        ulp = 2**-8 if got.dtype == torch.bfloat16 else 0  # half of bf16's largest relative step
        largest = want.abs().amax(-1, keepdim=True) if want.numel() else 0
        assert ((got.double() - want).abs() <= ulp * want.abs() + 1e-6 * largest).all()


def compare(kernels, case, upstream=None):
    check(results(kernels, case, upstream), results(EAGER, case, upstream, wide), case[1])


# ---- values and gradients


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("width", [37, 48, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(form, name, dtype, width):
    width = {37: 6, 48: 48, 130: 130}[width] if name in TURNS else width  # RoPE turns pairs
    compare(form_of(form), CASES[name](Inputs(dtype, width=width)))


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_no_row_and_one_row(form, name, rows):
    found = results(form_of(form), CASES[name](Inputs(torch.bfloat16, rows, 10)))
    assert all(x.isfinite().all() for x in found)
    compare(form_of(form), CASES[name](Inputs(torch.float32, rows, 10)))


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_zero_vectors_stay_zero(form, name, dtype):
    """As F.normalize has it, gradients included: they are those of a division by 1e-12, and finite."""
    function, given, rest = CASES[name](Inputs(dtype, 6, 10))
    given[0][..., 0, :] = 0
    given[0][..., 1, :] *= 1e-14  # shorter than 1e-12, and not zero: the division alone has a gradient
    if function in ("residual", "gate"):
        given[1][:2] = 0  # the first row is zero in both
        given[1][2] *= 1e-14
    found = results(form_of(form), (function, given, rest))
    assert not found[0][..., 0, :].any()
    assert all(x.isfinite().all() for x in found)
    compare(form_of(form), (function, given, rest))


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("name", CASES)
def test_a_nan_turns_its_row_to_nans(form, name):
    """Else a run that went wrong goes on unnoticed. (`maximum` drops NaNs on a GPU: compile_triton.py looks for it.)"""
    function, given, rest = CASES[name](Inputs(torch.float32, 6, 10))
    given[0][..., 0, 3] = torch.nan
    found, wanted = (results(kernels, (function, given, rest)) for kernels in (form_of(form), EAGER))
    assert wanted[0].isnan().any()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, wanted, strict=True))


LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "part": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "every other": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_inputs_that_are_not_contiguous(form, name, layout):
    function, given, rest = CASES[name](Inputs(torch.float32, 5, 10))
    case = (function, [LAYOUTS[layout](x) if x.dim() > 1 else x for x in given], rest)
    upstream = LAYOUTS[layout](torch.randn(given[0].shape))
    assert not upstream.is_contiguous()
    compare(form_of(form), case, upstream)
    compare(form_of(form), case, torch.ones(()).expand(given[0].shape))  # what a sum sends back


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("gains", [True, False], ids=["gains", "no gains"])
def test_gate_of_the_halves_of_one_product(form, gains):
    """They are read where they lie; Triton's gradients lie side by side again."""
    at = Inputs(torch.bfloat16, 6, 22)
    halves, given = at.matrix().view(2, 3, 22), [at.gain(11), at.gain(11)] if gains else []
    case = ("gate", [*halves.split(11, -1), *given], [] if gains else [None, None])
    compare(form_of(form), case)
    u, v = (x.requires_grad_() for x in halves.detach().split(11, -1))
    y = call(form_of(form), "gate", [u, v, *given], case[2])
    grads = torch.autograd.grad(y, [u, v], torch.ones_like(y))
    assert (joined(grads, -1) is not None) == (form == "triton")


@pytest.mark.parametrize("form", SMALL)
def test_three_axes_and_two_dtypes(form):
    at = Inputs(torch.bfloat16, 6, 10)
    h, x = at.matrix().view(2, 3, 10), at.matrix(torch.float32).view(2, 3, 10)
    compare(form_of(form), ("residual", [h, x, at.gain()], []))
    compare(form_of(form), ("gate", [h, x, at.gain(), at.gain()], []))


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("shape", [(5, 37), (40, 48), (1, 130), (0, 8), (3, 1)])
def test_unit_rows(form, shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = torch.cat((rows.new_full((1,), 7.0), rows.flatten(), rows.new_full((1,), 7.0)))
    wanted = rows.double() / rows.double().norm(dim=1, keepdim=True)
    form_of(form).unit_rows_(flat[1:-1].view(shape))  # as the engine calls it, at any offset
    torch.testing.assert_close(flat[1:-1].view(shape), wanted.float(), rtol=3e-7, atol=1e-9)
    assert flat[0] == flat[-1] == 7


@pytest.mark.parametrize("name", CASES)
@TRITON_ONLY
def test_two_calls_give_the_same_bits(name):
    """With more tiles than programs: the gains' gradients are sums of several programs' shares."""
    case = CASES[name](Inputs(torch.bfloat16, 40, 48 if name in TURNS else 130))
    first, second = (results(form_of("triton"), case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    compare(form_of("triton"), case)


@pytest.mark.parametrize("name", CASES)
@TRITON_ONLY
def test_triton_leaves_fp64_to_the_eager_form(name):
    case = CASES[name](Inputs(torch.float32, 4, 10))
    pairs = zip(results(form_of("triton"), case, to=wide), results(EAGER, case, to=wide), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@TRITON_ONLY
def test_triton_refuses_what_it_cannot_hold():
    kernels, wide_row = form_of("triton"), torch.ones(1, 8193)
    with pytest.raises(UserError, match=r"rows of 8193, padded to 16384, exceed 8192; use compiled or eager"):
        kernels.rms_norm(wide_row, wide_row[0], 1e-5)
    with pytest.raises(UserError, match=r"rows of 72 x 160, padded to 32768, exceed 8192; use compiled or eager"):
        kernels.rotate(torch.ones(1, 1, 72, 160), torch.ones(1, 1, 80), torch.ones(1, 1, 80))
    assert kernels.gate(wide_row, wide_row, None, None).shape == wide_row.shape  # no row is summed here
    with pytest.raises(ValueError, match=r"x: shape \(2, 4\), expected \(3, 4\)"):
        kernels.residual(torch.ones(3, 4), torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="head_dim is 5"):
        kernels.rotate(torch.ones(1, 1, 1, 5), torch.ones(1, 1, 2), torch.ones(1, 1, 2))


@TRITON_ONLY
def test_offsets_beyond_31_bits():
    """Two rows 2^31 entries apart, of memory that is never touched in between."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((2, 1, 1, 8), (2**31, 8, 8, 1))
    far.copy_(torch.randn(2, 1, 1, 8))
    tables = torch.full((1, 1, 4), 0.6), torch.full((1, 1, 4), 0.8)
    compare(form_of("triton"), ("rotate_unit", [far, torch.ones(1, 8)], [*tables]))


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
@TRITON_ONLY
def test_a_model_with_triton_is_the_model(kind):
    model_config = config(kind)
    plain = model_of(model_config, lively_state(model_config), torch.float32)
    fused = Decoder(model_config, kernels=form_of("triton"))
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        loss_of(model).backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


# ---- would mistakes be noticed?


WRONG = {
    "alpha's sign": ("residual", lambda h, x, alpha: eager.residual(h, x, alpha.abs() * (1 + 1e-5))),
    "the mean instead of the sum": ("rms_norm", lambda h, g, eps: eager.rms_norm(h, g, eps * h.shape[-1])),
    "turned backwards": ("rotate", lambda x, cos, sin: eager.rotate(x, cos, -sin)),
    "gain before the norm": ("rotate_unit gain", lambda x, c, s, g: eager.rotate_unit(x * g, c, s, None)),
    "a gain left out": ("gate gain", lambda u, v, gu, gv: eager.gate(u, v, gu, torch.ones_like(gv) * gv.detach())),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_noticed(mistake):
    name, wrong = WRONG[mistake]
    case = CASES[name](Inputs(torch.float32, width=10))
    with pytest.raises((AssertionError, RuntimeError)):  # of a gradient that is missing, too
        compare(replace(EAGER, **{case[0]: wrong}), case)


@pytest.mark.parametrize("name", ["residual", "rms_norm", "rotate_unit", "gate"])
def test_arithmetic_in_bf16_is_noticed(monkeypatch, name):
    case = CASES[name](Inputs(torch.bfloat16, width=48))
    wanted = results(EAGER, case, to=wide)
    monkeypatch.setattr(eager, "wide", lambda x: x)
    narrow = [x.to(torch.bfloat16) for x in case[1]]
    rest = [x.to(torch.bfloat16) if isinstance(x, torch.Tensor) else x for x in case[2]]
    with pytest.raises(AssertionError):
        check(results(EAGER, (case[0], narrow, rest)), wanted, narrow)


# ---- torch.compile


@pytest.mark.parametrize("name", ["residual", "rms_norm", "rotate", "rotate_unit gain", "gate gain"])
@needs_compiler
def test_compiled(name):
    torch._inductor.config.compile_threads = 1  # no pool of processes beside the tests' ranks
    compare(form_of("compiled"), CASES[name](Inputs(torch.bfloat16, 5, 48)))


COINCIDE = [(6, 6, 6), (6, 12, 3), (12, 6, 5), (9, 18, 9), (8, 16, 16), (5, 22, 3)]  # rows (T), width (C), heads


@pytest.mark.parametrize("name", [*CASES, "unit_rows_"])
def test_sizes_that_coincide_are_compiled_once(name):
    """A growth that parts two sizes which were equal must not change the code: a resumed run would compile other."""
    counter = dynamo.CompileCounterWithBackend("aot_eager")
    function = name.split()[0]
    kernels = replace(EAGER, **{function: _compile(getattr(eager, function), counter)})
    for rows, width, heads in COINCIDE:
        at = Inputs(torch.float32, rows, width, heads)
        if name == "unit_rows_":
            kernels.unit_rows_(at.matrix())
        else:
            compare(kernels, CASES[name](at))
    assert counter.frame_count == 1


@needs_compiler
def test_compiled_unit_rows(monkeypatch):
    """What a GPU gets: on a CPU the compiled form leaves it to PyTorch."""
    torch._inductor.config.compile_threads = 1
    from megabus.kernels import compiled

    monkeypatch.setattr(eager, "unit_rows_", compiled._unit_rows_)
    test_unit_rows("compiled", (5, 37))


# ---- which form runs


def test_forms_have_every_function():
    for form in ("eager", *(["triton"] if HAS["triton"] else [])):
        assert form_of(form).name == form
        assert all(callable(getattr(form_of(form), name)) for name in FUNCTIONS)
        assert form_of(form).attention is eager.attention


def packages(monkeypatch, *there):
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: name if name in there else None)


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A GPU's name, and an empty file of records."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(checked, "RECORDS", tmp_path / "checked.json")
    checked.RECORDS.write_text("[]")


def test_auto_is_eager_on_a_cpu():
    assert kernel_choice.automatic(CPU) == ("eager", None)
    assert select("auto", CPU) is EAGER


@TRITON_ONLY
def test_auto_is_triton_where_a_check_is_recorded(a_gpu, monkeypatch):
    chosen, why = kernel_choice.automatic(CUDA)
    assert chosen == "eager"
    assert "have not been checked on NVIDIA X1 with torch" in why
    assert why.endswith("`make gpu-check` does that")
    assert select("auto", CUDA) is EAGER
    mine = checked.this_device(CUDA)
    checked.record(mine, "2026-01-01", checked.RECORDS)
    checked.record(mine | {"device": "other"}, "2026-01-02", checked.RECORDS)
    checked.record(mine, "2026-01-03", checked.RECORDS)
    assert [entry["date"] for entry in json.loads(checked.RECORDS.read_text())] == ["2026-01-02", "2026-01-03"]
    assert kernel_choice.automatic(CUDA, [(1024,), (16, 64)]) == ("triton", None)
    assert select("auto", CUDA).name == "triton"
    assert kernel_choice.automatic(CUDA, [(16, 64), (8193,)]) == ("eager", "rows of 8193, padded to 16384, exceed 8192")
    for key in mine:  # another GPU, other versions, other kernels: not checked
        monkeypatch.setattr(checked, "this_device", lambda device, key=key: mine | {key: "new"})
        assert kernel_choice.automatic(CUDA)[0] == "eager"
    checked.record(mine | {"kernels": "new"}, "2026-01-04", checked.RECORDS)
    assert [entry["date"] for entry in json.loads(checked.RECORDS.read_text())] == ["2026-01-04"]


def test_records_of_the_repository_are_whole():
    keys = {"device", "torch", "triton", "kernels", "date"}
    assert all(entry.keys() == keys for entry in json.loads(checked.RECORDS.read_text()))


@TRITON_ONLY
def test_triton_on_a_gpu(a_gpu, monkeypatch):
    monkeypatch.setattr(kernel_choice.shutil, "which", lambda name: name)
    assert select("triton", CUDA).name == "triton"


def test_the_last_axis_has_a_known_length_on_a_gpu():
    """On any device but the CPU; a wider model is compiled anew, and more tokens are not."""
    shapes: list[tuple[bool, ...]] = []

    def see(graph, inputs):
        found = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        shapes.extend(tuple(isinstance(n, int) for n in x.shape) for x in found if isinstance(x, torch.Tensor))
        return graph.forward

    unit_rows_ = _compile(lambda h_ND: eager.unit(h_ND), see)
    for rows, width, known in ((6, 6, 1), (9, 6, 1), (9, 37, 2), (6, 37, 2), (5, 6, 2)):
        unit_rows_(torch.empty(rows, width, device="meta"))
        assert shapes == [(False, True)] * known
    shapes.clear()
    unit_rows_(torch.ones(6, 6))
    assert shapes == [(False, False)]


def test_key_heads_are_only_shared_where_flash_runs(monkeypatch):
    """PyTorch's other kernel would hold all scores; on a CPU it stays as it was."""
    on_gpu = SimpleNamespace(type="cuda")
    for dtype, head_dim, mask, capability, runs in (
        (torch.bfloat16, 64, None, (8, 0), True),
        (torch.float32, 64, None, (9, 0), False),
        (torch.bfloat16, 264, None, (9, 0), False),
        (torch.bfloat16, 64, torch.ones(1), (9, 0), False),
        (torch.float16, 64, None, (7, 5), False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        assert eager._flash_runs(SimpleNamespace(dtype=dtype, shape=(1, 6, 5, head_dim), device=on_gpu), mask) == runs
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    shared = eager.attention(q, k, v, None, True, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "_flash_runs", lambda *_: False)
        torch.testing.assert_close(eager.attention(q, k, v, None, True, 0.3), shared)


REFUSED = [
    ("triton", CPU, ["triton"], "train.kernels = triton: needs an NVIDIA GPU, and this run is on the cpu; "),
    ("triton", CUDA, [], "train.kernels = triton: needs the package triton, which comes with torch for CUDA; "),
    ("compiled", CUDA, [], "train.kernels = compiled: torch.compile needs the package triton on a GPU; "),
    ("compiled", CPU, [], "train.kernels = compiled: torch.compile needs a C++ compiler, and there is no none-such; "),
]


@pytest.mark.parametrize("choice", ["triton", "compiled"])
def test_a_gpu_needs_what_compiles_for_it(a_gpu, monkeypatch, tmp_path, choice):
    who = {"triton": "Triton", "compiled": "torch.compile"}[choice]
    packages(monkeypatch, "triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_choice.shutil, "which", lambda name: None)
    assert kernel_choice.why_not(choice, CUDA) == f"{who} needs a C compiler, and there is no gcc or clang"
    monkeypatch.setenv("CC", "own-cc")
    assert kernel_choice.why_not(choice, CUDA) == f"{who} needs a C compiler, and there is no own-cc"
    monkeypatch.setattr(kernel_choice.shutil, "which", lambda name: name)
    monkeypatch.setattr(kernel_choice.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "compiles against Python.h, and there is no " in kernel_choice.why_not(choice, CUDA)
    (tmp_path / "Python.h").touch()
    assert kernel_choice.why_not(choice, CUDA) is None
    assert kernel_choice.why_not("eager", CUDA) is None


@pytest.mark.parametrize(
    ("choice", "has", "problem"),
    [
        ("triton", (7, 5), "needs a GPU of compute capability 8.0 or newer, and NVIDIA X1 has 7.5"),
        ("triton", (8, 0), None),
        ("compiled", (6, 1), "needs a GPU of compute capability 7.0 or newer, and NVIDIA X1 has 6.1"),
        ("compiled", (7, 5), None),
        ("eager", (6, 1), None),
    ],
)
def test_a_gpu_may_be_too_old(a_gpu, monkeypatch, choice, has, problem):
    packages(monkeypatch, "triton")
    monkeypatch.setattr(kernel_choice, "_no_compiler", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    assert kernel_choice.why_not(choice, CUDA) == problem
    if choice == "triton":
        assert kernel_choice.automatic(CUDA)[0] == "eager"


@pytest.mark.parametrize(("choice", "device", "there", "message"), REFUSED)
def test_what_cannot_run_is_refused(monkeypatch, choice, device, there, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CXX", "none-such")
    packages(monkeypatch, *there)
    with pytest.raises(UserError, match=re.escape(message + "use auto or eager")):
        select(choice, device)


# ---- for a GPU, without one


@TRITON_ONLY
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env.update(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    command = [sys.executable, str(Path(__file__).parents[1] / "support/compile_triton.py"), "90"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    compiled = set(done.stdout.splitlines())
    launched = re.compile(r"^ +(_\w+)\[.*\]\(", re.M)  # kernel[grid](...)
    sources = Path(eager.__file__).parent.glob("triton_*.py")
    kernels = {f"{path.stem.split('_')[-1]} {name}" for path in sources for name in launched.findall(path.read_text())}
    assert compiled == kernels
    assert len(kernels) == 11
