"""Files of others: only regular ones are opened, and JSON holds no surprises."""

from __future__ import annotations

import os

import pytest

from megabus import plain_file
from megabus.plain_file import (
    BULK,
    DEEPEST,
    VALUES,
    NotPlainError,
    check_regular,
    parse_bulk_json,
    parse_json,
    read_regular,
    shown,
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"a": {"b": [1, NaN]}}', r"'a\.b\.1' is nan"),
        (b'{"a": -Infinity}', "'a' is -inf"),
        (b'{"a": 1e999}', "'a' is inf"),
        (b'{"a": {"b": "x\\u0000"}}', r"'a\.b' holds a NUL"),
        (b'{"a": {"b\\u0000": 1}}', "holds a NUL"),
        (b'{"a": {"b": "x\\ud800"}}', r"'a\.b' holds a lone surrogate"),
        (b'{"a": {"\\udfff": 1}}', "holds a lone surrogate"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' stands twice"),
        (b"[" * 34 + b"]" * 34, f"nests deeper than {DEEPEST} levels"),
        (b"[" * 100_000, f"nests deeper than {DEEPEST} levels"),
        (b"9" * 5000, "digits"),
        (b"[" + b"0," * VALUES + b"0]", f"holds more than {VALUES} values"),
        (b"[" + b"{}," * VALUES + b"{}]", f"holds more than {VALUES} values"),
        (b"\xff", "decode"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_nobody_writes_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        parse_json(text)


def test_plain_json_is_read():
    assert parse_json('{"a": [1, -0.5, "é", null, true, {}]}'.encode()) == {"a": [1, -0.5, "é", None, True, {}]}
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"  # two halves of one
    parse_json(b"[" * 32 + b"]" * 32)


def test_files_of_millions_have_a_bound_of_their_own():
    assert parse_bulk_json(b"[" + b"0," * VALUES + b"0]")[-1] == 0
    with pytest.raises(ValueError, match=f"holds more than {BULK} values"):
        parse_bulk_json(b"[" + b"0," * BULK + b"0]")


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    assert (check_regular(tmp_path / "file"), read_regular(tmp_path / "file", 5)) == (5, b"12345")
    assert read_regular(tmp_path / "link", links=True) == b"12345"
    with pytest.raises(NotPlainError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", 4)
    for name, links in (("link", False), ("zeros", False), ("zeros", True), ("pipe", True), (".", False)):
        with pytest.raises(NotPlainError):
            read_regular(tmp_path / name, links=links)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")


def test_a_file_that_is_exchanged_after_the_check_is_not_read(tmp_path, monkeypatch):
    """It is checked as it was opened, whatever its name meant before."""
    (tmp_path / "link").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(plain_file, "check_regular", lambda path, links: 5)
    before = len(os.listdir("/proc/self/fd"))
    for name, links, error in (("pipe", False, NotPlainError), ("link", True, NotPlainError), ("link", False, OSError)):
        with pytest.raises(error):
            read_regular(tmp_path / name, links=links)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_shown_is_short_and_printable():
    assert shown("a\x1b[2J\n") == "'a\\x1b[2J\\n'"
    assert len(shown("x" * 1000)) == 60
    assert shown(10**5000) == "a huge int"
