"""The list of planted faults is alive: each text stands once, and the tests that are to notice it exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.faults import FAULTS
from tests.mutations.plant import place_of, runs_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file} {fault.old[:30]}".strip())
def test_a_fault_can_be_planted(fault):
    assert fault.new != fault.old
    assert place_of(fault, ROOT).is_file()
    assert len(runs_of(fault, ROOT)) == len(fault.tests)


def test_there_are_enough_over_all_rooms():
    assert len(set(FAULTS)) == len(FAULTS) >= 60
