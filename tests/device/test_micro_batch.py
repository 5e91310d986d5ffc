"""A micro batch of a shipped size in Triton's kernels, by what it launches and moves; `--sizes` tells whole models."""

from __future__ import annotations

from tests.device.micro_batch import PRODUCTS, Size, counted

LAYERS, CHUNKS = 2, 2  # of the model that is counted, and in which its head takes the tokens
KERNELS, GB = 211, 18.9  # at most, as bounds.yaml has it of whole steps in eager kernels


def test_products_are_joint_and_little_runs_between_them():
    """Four products a layer (q, k and v; their output; up and gate; down) and one a chunk of the head, each with two of
    its gradients."""
    (found,) = counted([Size("ngpt_0.5b.yaml", "triton", layers=LAYERS)])
    assert sum(found.launches.get(name, 0) for name in PRODUCTS) == 3 * (4 * LAYERS + CHUNKS)
    assert found.launches["attention"] == 2 * LAYERS
    assert sum(found.launches.values()) <= KERNELS
    assert sum(found.bytes.values()) <= GB * 1e9
