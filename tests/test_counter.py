"""Exact arithmetic: hashes, normals and sums whose bits depend on nothing else."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from megabus import counter

torch.set_num_threads(1)


def splitmix64(index, key):
    """Steele, Lea & Flood 2014, in Python's integers."""
    z = (index * 0x9E3779B97F4A7C15 + key) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


KEYS = [0, 1, -1, 2**63 - 1, -(2**63), counter.key(3, "layers.0.attn.q", "init")]
INDICES = [0, 1, 2, 77, 2**31, 2**40 + 12345, 2**62]


def hashed(key):
    return [x % 2**64 for x in counter.hash64(torch.tensor(INDICES), key).tolist()]


@pytest.mark.parametrize("key", KEYS)
def test_hash64_is_splitmix64(key, monkeypatch):
    wanted = [splitmix64(i, key) for i in INDICES]
    assert hashed(key) == wanted
    monkeypatch.setattr(counter, "_shift", lambda x, bits, out: x >> bits)  # arithmetic: sign bits come in
    assert hashed(key) != wanted


def test_hash64_known_answers():
    """The first outputs of the published generator seeded with 1234567."""
    first = counter.hash64(torch.arange(1, 4), 1234567).tolist()
    assert [x % 2**64 for x in first] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_normals_by_hand():
    key, columns = counter.key("x"), 5
    found = counter.normals(key, torch.tensor([3, 8]), columns)
    for i, row in enumerate((3, 8)):
        for column in range(columns):
            words = [splitmix64(3 * (row * columns + column) + draw, key % 2**64) for draw in range(3)]
            total = sum(word >> bits & 0xFFFF for word in words for bits in (0, 16, 32, 48))
            assert found[i, column].item() == float(Fraction(total) - 12 * Fraction(65535, 2)) / 65536


def test_normals_are_nearly_normal():
    x = counter.normals(counter.key(1), torch.arange(2000), 100)
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert x.var() == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert (x**4).mean() == pytest.approx(2.9, abs=0.1)
    assert (x**3).mean() == pytest.approx(0, abs=4 * (15 / n) ** 0.5)
    assert x.abs().max() < 6


@pytest.mark.parametrize("n", [1, 2, 3, 36, 131, 1001])
def test_row_sum_is_a_sum(n):
    x = torch.randn(50, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    kept = x.clone()
    found = counter.row_sum(x)
    assert found.shape == (50, 1)
    for row, total in zip(x, found[:, 0], strict=True):
        assert abs(math.fsum(row.tolist()) - total) <= 1e-15 * row.abs().sum()
    assert torch.equal(x, kept)


def same_bits(summed):
    """Whether a row's sum is the same alone, among others, three-dimensional and transposed in memory."""
    x = torch.randn(33, 1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = summed(x)
    views = [
        torch.cat([summed(x[i : i + 1]) for i in range(33)]),
        torch.cat([summed(x[:7]), summed(x[7:])]),
        summed(x.view(3, 11, 1001)).view(33, 1),
        summed(x.t().contiguous().t()),
    ]
    return all(torch.equal(whole, view) for view in views)


def test_row_sum_does_not_depend_on_its_surroundings():
    assert same_bits(counter.row_sum)
    assert not same_bits(lambda x: x.sum(-1, keepdim=True))


def test_unit_rows():
    x = counter.normals(7, torch.arange(9), 131)
    assert (counter.unit_rows(x).norm(dim=-1) - 1).abs().max() < 1e-15
