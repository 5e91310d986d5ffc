"""Token files at their edges: when they appear, and the first id that is none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megabus.data.batches import TokenSource
from megabus.data.indexed import IndexedWriter
from megabus.errors import UserError


def write(prefix, tokens):
    with IndexedWriter(prefix, np.int32) as writer:
        writer.append(tokens)
    return str(prefix)


def test_both_files_are_on_the_disk_before_they_appear(tmp_path, monkeypatch):
    """And their names after that: a power cut leaves no pair whose tokens are not there."""
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def appears(path, target):
        events.append(("appears", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", appears)
    write(tmp_path / "a", np.arange(5))
    last = max(place for place, (what, _) in enumerate(events) if what == "appears")
    first = min(place for place, (what, _) in enumerate(events) if what == "appears")
    before = [name for what, name in events[:first] if what == "synced"]
    assert {name.split(".")[2] for name in before} == {"bin", "idx"}
    assert events[last + 1 :] == [("synced", tmp_path.name)]


def test_the_first_id_outside_the_vocabulary(tmp_path):
    """One token, one too large: the last of a sample's."""
    for vocab_size, outside in ((4999 + 66, False), (4999 + 65, True)):
        tokens = TokenSource([(write(tmp_path / f"a{vocab_size}", np.arange(4999, 4999 + 66)), 1.0)], 65, 0, vocab_size)
        if outside:
            with pytest.raises(UserError, match=rf"token 65 has id {vocab_size}, outside \[0, {vocab_size}\)"):
                tokens.batch(0, 65, range(1))
        else:
            tokens.batch(0, 65, range(1))
