"""A start imports no compiler and no distributed checkpoint before its first step: they were half of its time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import sys
from megabus.engine.startup import import_deepspeed, prepare_environment
prepare_environment()
import_deepspeed()
import torch
import megabus.train.loop
from megabus.engine.adam import LightAdamW
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
adam = LightAdamW([weight], fused=True)
adam.step()
adam.zero_grad()
print([name for name in ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "matplotlib", "jinja2")
       if name in sys.modules])
"""


def test_a_start_imports_nothing_that_it_does_not_use():
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
