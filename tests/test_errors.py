"""A `UserError` is one line that a terminal can show, whatever a file or a path has put into it."""

from __future__ import annotations

import pickle

import pytest

from megabus.errors import UserError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb\t c", "a b c"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\0b", "a\\x00b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("name\udcff", "name\\udcff"),  # a byte of a path that is not UTF-8: it could not be printed at all
        ("κ é 漢", "κ é 漢"),
    ],
)
def test_a_message_is_printable(value, shown):
    error = UserError("key", value, "is odd", "mend it")
    assert str(error) == f"key = {shown}: is odd; mend it"
    assert str(error).isprintable()
    assert str(error).encode()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
