"""An index is checked as a whole when it is opened: nothing in its middle is believed."""

from __future__ import annotations

import errno
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megabus.data import indexed
from megabus.data.indexed import HEADER, IndexedTokens, IndexedWriter, meta_path, pair_paths, read_meta
from megabus.errors import UserError
from megabus.plain_file import read_regular

LENGTHS = (3, 0, 5, 1, 40)


@pytest.fixture
def prefix(tmp_path):
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        for length in LENGTHS:
            writer.append(range(length))
    return tmp_path / "corpus"


def put(prefix, at, number, kind):
    """Write a number into the index, `at` bytes behind its header."""
    with pair_paths(prefix)[1].open("r+b") as file:
        file.seek(HEADER.size + at)
        file.write(np.array([number], dtype=kind).tobytes())


@pytest.mark.parametrize("checked", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("at", "number", "kind"),
    [
        (4, 4, "<i4"),  # a length
        (4, -1, "<i4"),
        (20 + 8, 4, "<i8"),  # a sequence's place
        (20 + 16, -6, "<i8"),
        (60 + 16, 9, "<i8"),  # a document's first sequence
        (60 + 16, -1, "<i8"),
        (60, 1, "<i8"),
        (60 + 40, 4, "<i8"),
    ],
)
def test_an_index_that_disagrees_with_itself_is_refused(prefix, monkeypatch, checked, at, number, kind):
    monkeypatch.setattr(indexed, "CHECKED", checked)  # entries at once
    tokens = IndexedTokens(prefix)  # the control
    assert [tokens.sequence(n).tolist() for n in range(5)] == [list(range(length)) for length in LENGTHS]
    put(prefix, at, number, kind)
    with pytest.raises(UserError, match=r"damaged: offsets, lengths and documents disagree|\.bin: holds"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("code", [6, 7])
def test_floats_are_no_tokens(prefix, code):
    with pair_paths(prefix)[1].open("r+b") as file:
        file.seek(9 + 8)
        file.write(bytes([code]))
    with pytest.raises(UserError, match="holds numbers of type float"):
        IndexedTokens(prefix)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5", "holds no keys"),
        ("[]", "holds no keys"),
        ("{", "is not JSON"),
        ("[" * 10_000, "is not JSON"),
        ('{"vocab_size": 3}', "lacks n_tokens"),
        ('{"vocab_size": "3", "tokenizer_sha256": "a", "n_tokens": 49}', "has vocab_size = '3', which is no int"),
        ('{"vocab_size": true, "tokenizer_sha256": "a", "n_tokens": 49}', "has vocab_size = True, which is no int"),
        ('{"vocab_size": 3, "tokenizer_sha256": null, "n_tokens": 49}', "has tokenizer_sha256 = None, which is no str"),
        ('{"vocab_size": 3, "tokenizer_sha256": "a", "n_tokens": 49.0}', "has n_tokens = 49.0, which is no int"),
    ],
)
def test_a_sidecar_that_says_nonsense_is_refused(prefix, text, told):
    meta_path(prefix).write_text(text)
    with pytest.raises(UserError, match=told):
        read_meta(prefix)
    meta_path(prefix).write_text('{"vocab_size": 3, "tokenizer_sha256": "a", "n_tokens": 49}')  # the control
    assert read_meta(prefix)["n_tokens"] == 49


def test_a_sidecar_that_cannot_be_read_is_named(prefix, monkeypatch):
    path = meta_path(prefix)
    assert read_meta(prefix) is None  # the control
    path.symlink_to("/proc/self/mem")  # as from a broken disk
    told = f"data = {path}: cannot be read (Input/output error); check its permissions and the disk"
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        read_meta(prefix)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"meta.json: is no regular file; run megabus preprocess again"):
        read_meta(prefix)
    path.unlink()
    path.write_text(" " * 100)
    monkeypatch.setattr(indexed, "read_regular", partial(read_regular, limit=10))
    with pytest.raises(UserError, match=r"meta.json: has more than 10 bytes"):
        read_meta(prefix)


@pytest.mark.parametrize(("call", "file"), [("open", "idx"), ("memmap", "idx"), ("memmap", "bin"), ("is_file", "bin")])
def test_a_pair_that_cannot_be_read_is_named(prefix, monkeypatch, call, file):
    def denied(path, *args, **options):
        if Path(path).suffix == f".{file}":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return kept(path, *args, **options)

    owner = np if call == "memmap" else Path
    kept = getattr(owner, call)
    monkeypatch.setattr(owner, call, denied)
    told = f"data = {prefix}.{file}: cannot be read (Permission denied); check its permissions and the disk"
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_named_and_not_waited_for(prefix, make, ending):
    Path(f"{prefix}{ending}").unlink()
    make(f"{prefix}{ending}")
    with pytest.raises(UserError, match=rf"^data = .*\{ending}: is no regular file; check the prefix"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_the_name_of_one_of_the_files_is_no_prefix(prefix, ending):
    with pytest.raises(UserError) as caught:
        IndexedTokens(f"{prefix}{ending}")
    assert str(caught.value) == (
        f"data = {prefix}{ending}: is the name of one of two files, and both begin with the prefix that is asked for; "
        f"give {prefix}"
    )
    with pytest.raises(UserError, match=r"other\.bin\.bin: the file does not exist; check the prefix"):
        IndexedTokens(prefix.with_name("other.bin"))  # the control
