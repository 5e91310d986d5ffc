"""Compile every Triton kernel for the GPU of argv[1] (90: H100) with no GPU in the machine; launch nothing.

The interpreter accepts code that the compiler does not, and has no registers to run out of, no offsets that overflow
and no maximum that drops NaNs: all that is read from what the compiler made. Prints the kernels' names. Run without
TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoGPU:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


# What holds an entry a row, or a row: 31 bits of offset reach. All other arguments hold N rows, or a share a program.
SMALL = {"lx_ptr", "lr_ptr", "scale_ptr", "alpha_ptr", "gain_ptr", "gain_u_ptr", "gain_v_ptr", "cos_ptr", "sin_ptr"}
SMALL |= {"row_ptr", "top_ptr", "total_ptr", "own_ptr"}
FP32 = {"_unit_rows", "_sums"}  # what these write is fp32
SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims"}


def narrow_offsets(ttir):
    """The arguments, not SMALL, with an offset of 32 bits, or one that was widened after a product of 32 bits."""
    made = {}  # by name: (operation, operands, the line); a name is made before it is used

    def argument(name):
        while name in made:
            name = made[name][1][0]
        return name

    def wide(pointer):
        """Whether an offset of 64 bits is in this chain of additions to an argument."""
        while pointer in made:
            operation, operands, line = made[pointer]
            if operation == "tt.addptr" and "i64" in line.split(", ")[-1]:
                return True
            pointer = operands[0]
        return False

    def multiplied(name):
        operation, operands, _ = made.get(name, ("", [], ""))
        constant = any(made.get(operand, ("",))[0] == "arith.constant" for operand in operands)
        if operation == "arith.muli" and not constant:  # a constant one is the number of rows of a tile
            return True
        return operation in {*SAME, "arith.addi", "arith.muli"} and any(multiplied(operand) for operand in operands)

    narrow = set()
    for line in ttir.splitlines():
        found = re.match(r"\s*(%\w+) = (\S+) ([^:{]*)(.*?)(?: loc\(.*)?$", line)
        if not found:
            continue
        name, operation, operands, types = found.groups()
        made[name] = operation, re.findall(r"%\w+", operands), types
        if operation == "arith.extsi" and multiplied(made[name][1][0]):
            narrow.add(name)
        if operation == "tt.addptr" and argument(name)[1:] not in SMALL and not wide(name):
            narrow.add(argument(name))
    return narrow


def stack(cubin):
    """Bytes of memory that each thread needs because registers did not suffice."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


launch = JITFunction.run


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert "cubin" in kernel.asm, self.__name__
    ptx, narrow, spilled = kernel.asm["ptx"], narrow_offsets(kernel.asm["ttir"]), stack(kernel.asm["cubin"])
    assert "cvt.rn.bf16" in ptx or self.__name__ in FP32  # round to nearest, once, at the end
    assert "max.f32" not in ptx, f"{self.__name__}: a maximum that drops NaNs"
    assert not narrow, f"{self.__name__}: offsets of 32 bits into {narrow}"
    assert not spilled, f"{self.__name__}: {spilled} bytes a thread are spilled"
    print(self.__module__.split("_")[-1], self.__name__)


driver.set_active(NoGPU())
JITFunction.run = compile_only

from megabus.kernels.eager import Targets  # noqa: E402
from megabus.kernels.triton_form import TRITON  # noqa: E402
from megabus.kernels.width import MAX_WIDTH  # noqa: E402


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def check(function, *args):
    y = function(*args)
    y.backward(y.detach())


for rows in (256, 8192):
    numbers = torch.zeros(8)
    targets = Targets(numbers.long(), numbers.bool(), numbers, numbers)
    for gain in (None, torch.ones(rows)):
        TRITON.cross_entropy_(half(8, rows).detach(), gain, targets, torch.clone, torch.clone, True)

for width, heads in ((256, 4), (MAX_WIDTH, MAX_WIDTH // 128)):  # the widest use the most registers
    gains = [torch.ones(width, requires_grad=True) for _ in "uv"]
    check(TRITON.residual, half(8, width), half(8, width), gains[0])
    check(TRITON.rms_norm, half(8, width), gains[0], 1e-5)
    check(TRITON.gate, half(8, width), half(8, width), None, None)
    check(TRITON.gate, half(8, width), half(8, width), *gains)
    check(TRITON.gate, *half(8, 2 * width).split(width, -1), *gains)
    TRITON.unit_rows_(torch.ones(8, width))
    C = width // heads
    tables = torch.ones(8, 1, C // 2), torch.zeros(8, 1, C // 2)
    check(TRITON.rotate, half(2, 8, heads, C), *tables)
    check(TRITON.rotate_unit, half(2, 8, heads, C), *tables, None)
    check(TRITON.rotate_unit, half(2, 8, heads, C), *tables, torch.ones(heads, C, requires_grad=True))
