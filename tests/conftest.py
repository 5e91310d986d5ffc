"""Imports torch and DeepSpeed once: ranks are forked from here (see megabus.testing.ranks)."""

import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub; unknown names are refused at once
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; read when triton is imported, below

from megabus.testing.ranks import preload

preload()
