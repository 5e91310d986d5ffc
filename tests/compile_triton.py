"""Compile every Triton kernel for the GPU of argv[1] (90: H100) with no GPU in the machine; launch nothing.

The interpreter accepts code that the compiler does not. Prints the kernels' names. Run without TRITON_INTERPRET.
"""

import sys

import torch
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


launch = JITFunction.run


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert "cubin" in kernel.asm, self.__name__
    assert "cvt.rn.bf16" in kernel.asm["ptx"] or self.__name__ == "_unit_rows"  # round to nearest, once, at the end
    print(self.__module__.split("_")[-1], self.__name__)


driver.set_active(NoGPU())
JITFunction.run = compile_only

from megabus.kernels.triton_table import TRITON  # noqa: E402


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def check(function, *args):
    y = function(*args)
    y.backward(y.detach())


check(TRITON.residual, half(8, 256), half(8, 256), torch.ones(256, requires_grad=True))
check(TRITON.rms_norm, half(8, 256), torch.ones(256, requires_grad=True), 1e-5)
tables = torch.ones(8, 1, 16), torch.zeros(8, 1, 16)
check(TRITON.rotate, half(2, 8, 4, 32), *tables)
check(TRITON.rotate_unit, half(2, 8, 4, 32), *tables, None)
check(TRITON.rotate_unit, half(2, 8, 4, 32), *tables, torch.ones(4, 32, requires_grad=True))
check(TRITON.gate, half(8, 256), half(8, 256), None, None)
gains = (torch.ones(256, requires_grad=True) for _ in "uv")
check(TRITON.gate, half(8, 256), half(8, 256), *gains)
TRITON.unit_rows_(torch.ones(8, 256))
