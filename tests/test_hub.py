"""Names of the hub, of models and tokenizers: what is fetched, what is a path, what is said where none is given."""

from __future__ import annotations

import json
import sys

import pytest
from huggingface_hub import errors
from huggingface_hub.errors import HTTPError

import megabus
from megabus.convert.convert import model_at
from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError
from megabus.hub import local_copy, of_hub

HTTP = sys.modules[HTTPError.__module__.partition(".")[0]]  # the library that the hub is asked by, whichever it is
ERRORS = {"it": OSError, "late": HTTP.ReadTimeout, "off": HTTP.ConnectError, "cut": HTTP.RemoteProtocolError}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """(name, patterns) of what the hub is asked for; it gives a directory, or nothing of the owner `gone`."""
    found = []

    def snapshot(name, allow_patterns):
        found.append((name, allow_patterns))
        if name.startswith("gone/"):
            raise ERRORS[name.partition("/")[2]]("no such\nthing")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_name_is_fetched_and_nothing_that_runs(tmp_path, asked):
    for index, weights in (
        (None, {"model.safetensors"}),
        ({"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "*", "d": 3}, {"m-1.safetensors", "m-2.safetensors"}),
    ):
        asked.clear()
        if index is not None:
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert model_at("owner/model-1.5B") == tmp_path
        (first, before), (second, patterns) = asked
        assert first == second == "owner/model-1.5B"
        assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"} <= {*before}
        assert {*patterns} - {*before} == weights | {"model.safetensors"}  # and no consolidated.safetensors beside them
        assert not any(pattern.endswith((".bin", ".py")) or "*" in pattern for pattern in patterns)


def test_a_path_is_no_name(tmp_path, asked):
    """One that is there, one with a slip in it, one of a file."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/link").symlink_to("nowhere")
    for path in (tmp_path, "no/such/folder", "runs/dem", "runs/link", "tok/my.model", "tok/mine.json", "plain"):
        assert not of_hub(path)
        assert model_at(path).parts == local_copy(path, []).parts
    assert asked == []
    with pytest.raises(UserError, match="tokenizer = runs/mine: the file does not exist"):
        Tokenizer("runs/mine")


def test_what_the_hub_does_not_give_is_told(asked):
    told = "is nothing on this machine, and the hub does not give it (no such); give a path, or fetch"
    for name in ERRORS:
        for call, key in ((megabus.load, "model"), (Tokenizer, "tokenizer")):
            with pytest.raises(UserError) as caught:
                call(f"gone/{name}")
            assert str(caught.value).startswith(f"{key} = gone/{name}: {told} it elsewhere (hf download gone/{name})")


def test_what_the_library_says_at_length_is_told_in_short(monkeypatch):
    """Its first line; and of a name that it does not know, and of a machine without a network by choice, our words."""
    response = HTTP.Response(401, request=HTTP.Request("GET", "https://hub"))
    ours = "it knows no such name, or one that needs a login: hf auth login"
    for error, told in (
        (
            errors.LocalEntryNotFoundError("Got: ConnectError: unknown name\nAn error happened, and we " * 9),
            "ConnectError: unknown name",
        ),
        (errors.RepositoryNotFoundError("401 Client Error.\nRepository Not Found", response=response), ours),
        (
            errors.OfflineModeIsEnabled("Cannot reach https://hub: offline mode is enabled. To disable"),
            "HF_HUB_OFFLINE is set",
        ),
        (OSError("x" * 999), "x" * 100),
        (OSError(), "OSError"),
    ):

        def snapshot(name, allow_patterns, error=error):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        with pytest.raises(UserError) as caught:
            local_copy("gone/it", [])
        assert f"the hub does not give it ({told}); give a path" in str(caught.value)
