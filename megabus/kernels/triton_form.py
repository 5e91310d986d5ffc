"""The functions of `megabus.kernels.eager` in Triton. Import it only where Triton runs (see `choice.why_not`)."""

from __future__ import annotations

from megabus.kernels.eager import attention
from megabus.kernels.form import Kernels
from megabus.kernels.triton_gate import gate
from megabus.kernels.triton_head import cross_entropy_
from megabus.kernels.triton_norms import residual, rms_norm, unit_rows_
from megabus.kernels.triton_qk import rotate, rotate_unit

TRITON = Kernels(
    name="triton",
    lean=True,
    residual=residual,
    rms_norm=rms_norm,
    rotate=rotate,
    rotate_unit=rotate_unit,
    attention=attention,  # PyTorch's own are flash kernels already
    gate=gate,
    cross_entropy_=cross_entropy_,
    unit_rows_=unit_rows_,
)
