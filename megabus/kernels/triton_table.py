"""The functions of `megabus.kernels.eager` in Triton. Import it only where Triton runs (see `table.why_not`)."""

from __future__ import annotations

from megabus.kernels.table import Kernels
from megabus.kernels.triton_gate import gate
from megabus.kernels.triton_norms import residual, rms_norm, unit_rows_
from megabus.kernels.triton_qk import rotate, rotate_unit

TRITON = Kernels("triton", residual, rms_norm, rotate, rotate_unit, gate, unit_rows_)
