"""The rows of saving, converting and generating, on tiny sizes: what they measure is not looked at."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import conversion, generation, saving
from megabus.cli.convert import main as convert


def test_rows_of_saving():
    written, stall = saving.saves(1, small=True)
    assert (written.unit, stall.unit) == ("B/s", "s")
    assert min(*written.figures, *stall.figures) > 0


def test_rows_of_generating_and_their_control(monkeypatch):
    """Both write the same text, and a model that writes another is noticed."""
    assert all(min(row.figures) > 0 for row in generation.generation(1, small=True))
    monkeypatch.setattr(generation, "generate", lambda *_, **__: iter([0]))
    with pytest.raises(RuntimeError, match="write different text"):
        generation.generation(1, small=True)


def test_rows_of_converting(tmp_path, monkeypatch):
    """Every pair of forms is converted, here in this process: the arms' own would each import torch."""

    def run(command):
        _, _, _, *words = command
        if words:
            arm, source, out, *options = words
            shutil.rmtree(out, ignore_errors=True)
            if arm == "copy":
                shutil.copytree(source, out)
            else:
                convert([source, out, *options])
        return 2.0 if words[:1] == ["convert"] else 1.0, 1 << 20

    monkeypatch.setattr(conversion, "run", run)
    rows = conversion._compared(conversion.SMALL, tmp_path, 1)
    assert [row.ratio for row in rows] == [0.5] * 10
    assert not any(row.met for row in rows)
