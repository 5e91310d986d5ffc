"""Of `make fuzz`: the table of what was tried."""

from __future__ import annotations

from collections import Counter

import pytest

from megabus.table import aligned

TRIED: dict[str, Counter[str]] = {}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """How the mutations of a test's files ended."""
    return TRIED.setdefault(request.node.name.removeprefix("test_"), Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ends = ("refused", "loaded", "traceback", "hang")
    rows = [[name, str(sum(n.values())), *(str(n[end]) for end in ends)] for name, n in TRIED.items()]
    if rows:
        terminalreporter.write_line("\n" + aligned(["mutated", "tried", *ends], rows, left={0}))
