"""A `UserError` is one line that a terminal can show, whatever a file or a path has put into it."""

from __future__ import annotations

import pickle

import pytest

from megabus.errors import LONGEST, UserError, warn


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


def test_a_message_has_a_length():
    """Whatever a file puts into it: what to do stands at its end."""
    text = str(UserError("key", "v" * 10**6, "p" * 10**6, "mend it"))
    assert len(text) < 2 * LONGEST + 30
    assert text.endswith("ppp...; mend it")


def test_a_warning_is_printable(capsys):
    warn("a\nb \x1b[2J \udcff")
    assert capsys.readouterr().err == "warning: a b \\x1b[2J \\udcff\n"
