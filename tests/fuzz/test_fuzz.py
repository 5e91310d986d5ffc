"""Files are mutated, and vouched for anew: each loads as what it says, or is refused in one line, within 10 s and 2 GB.

50 mutations a kind of file in the suite; `make fuzz` makes 1,000.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import megabus
from megabus.checkpoint.contents import look
from megabus.checkpoint.manifest import MANIFEST
from megabus.checkpoint.state import STATE, write_state
from megabus.config.schema import KappaConfig, ModelConfig
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.data.indexed import IndexedTokens, IndexedWriter
from megabus.data.tokenizer import Tokenizer, tiktoken, train_tokenizer
from megabus.data.tokenizer.byte_bpe import CL100K
from megabus.errors import UserError
from megabus.kappa.monitor import KappaMonitor
from megabus.model.decoder import param_specs
from tests.support import altered
from tests.support.sources import MemorySource, model_config

SECONDS, BYTES = 10, 2 << 30
TRIES = int(os.environ.get("FUZZ", "50"))
fuzz = settings(
    max_examples=TRIES,
    deadline=None,
    database=None,
    derandomize=TRIES == 50,  # the suite tries the same each time
    suppress_health_check=list(HealthCheck),
)

# ---- mutations: applied to JSON trees, to texts, and to bytes

SCALARS = [None, True, False, 0, 1, -1, 2, 3, 7, 36, 2**31, 2**31 - 1, 2**63, -(2**63), 10**9, 10**30, 10**100]
SCALARS += [0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, float("nan"), float("inf"), "", "0", "none", "../../x", "a\0b"]
SCALARS += ["weight", "é" * 300, [], {}, [[]], [1, 2, 3], {"a": 1}, ["weight", "exp_avg", "exp_avg_sq"]]
VALUES = st.one_of(
    st.sampled_from(SCALARS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.recursive(st.integers(0, 3), lambda inner: st.lists(inner, max_size=2), max_leaves=60),
)
ACTIONS = ("set", "set", "set", "near", "near", "delete", "add", "exchange", "nest")
EDITS = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**20), st.integers(0, 2**20), VALUES)
CUTS = st.tuples(st.sampled_from(["byte", "cut", "insert", "repeat"]), st.integers(0, 2**20), st.binary(max_size=4))
OF_JSON = st.one_of(
    st.tuples(st.just("tree"), st.lists(EDITS, min_size=1, max_size=2)),
    st.tuples(st.just("text"), st.lists(CUTS, min_size=1, max_size=2)),
)


def places(tree):
    """Every (container, key) in a tree."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        left += [node[key] for key in keys]
    return found


def edit(tree, edits):
    for action, at, to, value in edits:
        spots = places(tree)
        if not spots:
            return
        (node, key), (other, other_key) = spots[at % len(spots)], spots[to % len(spots)]
        match action:
            case "set":
                node[key] = value
            case "near" if isinstance(node[key], int | float):
                number = node[key]
                node[key] = [number + 1, number - 1, number * 2, -number, str(number), float(number)][to % 6]
            case "delete":
                del node[key]
            case "add" if isinstance(node, dict):
                node[f"{key}x"] = node[key]
            case "add":
                node.insert(key, node[key])
            case "exchange":
                # A section that is put into itself would have no end.
                if not isinstance(node[key], dict | list) and not isinstance(other[other_key], dict | list):
                    node[key], other[other_key] = other[other_key], node[key]
            case "nest":
                for _ in range(1 + to % 40):
                    node[key] = [node[key]]


def cut(data, cuts):
    for action, at, extra in cuts:
        at %= max(1, len(data))
        match action:
            case "byte":
                data = data[:at] + extra[:1] + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + extra + data[at:]
            case "repeat":
                data = data[:at] + data[max(0, at - 9) :]
    return data


def mutated(text, mutation):
    """A JSON text, changed as a tree or as a text."""
    how, changes = mutation
    if how == "text":
        return cut(text, changes)
    tree = json.loads(text)
    edit(tree, changes)
    return json.dumps(tree).encode()


# ---- what may happen then


class HangError(Exception):
    pass


@contextlib.contextmanager
def limits():
    def late(*_):
        raise HangError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def attempt(tally, load):
    """What `load` gives; None where it refuses as it should."""
    loaded = refusal = None
    try:
        with limits():
            loaded = load()
    except UserError as error:
        refusal = str(error)
    except HangError:
        tally["hang"] += 1
        raise
    except BaseException:
        tally["traceback"] += 1
        raise
    tally["loaded" if refusal is None else "refused"] += 1
    if refusal is not None:
        assert refusal.isprintable(), ascii(refusal)  # so it is one line
        assert len(refusal) < 1000
    return loaded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return altered.write_run(tmp_path_factory.mktemp("run"), layout=(1, 1, 1))


@contextlib.contextmanager
def spoilt(folder, *names):
    """Files that are put back afterwards; nothing else may have been touched."""
    good = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    try:
        yield
        assert {path for path in folder.iterdir() if path.is_file()} == set(good)
        assert all(path.read_bytes() == data for path, data in good.items() if path.name not in names)
    finally:
        for name in names:
            (folder / name).write_bytes(good[folder / name])


def weights_in(folder):
    """What the shards of a layout of one rank say, without the code under test."""
    tensors = load_file(next(folder.glob("shard-00001-model-00001-*")))
    return {key.removeprefix("weight/"): values for key, values in tensors.items()}


def same_weights(model, folder):
    wanted = weights_in(folder)
    return all(
        torch.equal(values.reshape(-1).view(torch.int32), wanted[name].view(torch.int32))
        for name, values in model.state_dict().items()
    )


def test_state(checkpoint, tally, tmp_path):
    text = (checkpoint / STATE).read_bytes()

    def load():
        found = look(checkpoint)
        monitor = KappaMonitor(KappaConfig())
        if found.state.monitor:
            monitor.load_state_dict(found.state.monitor)
        return found.state, megabus.load(checkpoint)

    @fuzz
    @given(OF_JSON)
    def run(mutation):
        with spoilt(checkpoint, STATE, MANIFEST):
            raw = mutated(text, mutation)
            altered.put_state(checkpoint, raw)
            loaded = attempt(tally, load)
            if loaded is not None:
                state, model = loaded
                said = json.loads(raw)
                said["model"] = ModelConfig.model_validate(said["model"]).model_dump()  # keys of later versions
                assert json.loads(write_state(tmp_path, state).read_text()) == said
                assert model.config == state.model
                assert same_weights(model, checkpoint)

    run()


def test_manifest(checkpoint, tally):
    text = (checkpoint / MANIFEST).read_bytes()

    @fuzz
    @given(OF_JSON)
    def run(mutation):
        with spoilt(checkpoint, MANIFEST):
            raw = mutated(text, mutation)
            with contextlib.suppress(ValueError, AttributeError):  # what is no JSON object cannot be sealed
                altered.seal(checkpoint, json.loads(raw))
                raw = (checkpoint / MANIFEST).read_bytes()
            (checkpoint / MANIFEST).write_bytes(raw)
            model = attempt(tally, lambda: megabus.load(checkpoint))
            assert model is None or same_weights(model, checkpoint)

    run()


def test_shard_headers(checkpoint, tally):
    shards = sorted(path.name for path in checkpoint.glob("shard-*"))

    @fuzz
    @given(OF_JSON, st.sampled_from(shards), st.sampled_from([0, 0, 0, 0, 1, -1, 8, 2**40, 2**63]))
    def run(mutation, name, more):
        with spoilt(checkpoint, name, MANIFEST):
            header, rest = altered.header_of(checkpoint / name)
            text = mutated(json.dumps(header).encode(), mutation)
            length = struct.pack("<Q", (len(text) + more) % 2**64)
            (checkpoint / name).write_bytes(length + text + rest)
            altered.attest(checkpoint, name)
            model = attempt(tally, lambda: megabus.load(checkpoint))
            assert model is None or same_weights(model, checkpoint)

    run()


def test_token_index(tally, tmp_path):
    prefix = tmp_path / "corpus"
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for length in (3, 0, 5, 1, 40):
            writer.append(range(length))
    path = Path(f"{prefix}.idx")
    good = path.read_bytes()
    numbers = [0, 1, 2, 3, 4, 5, 6, 7, 9, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
    fields = st.tuples(st.integers(9, len(good) - 8), st.sampled_from(numbers), st.sampled_from(["<B", "<I", "<Q"]))

    def load():
        tokens = IndexedTokens(prefix)
        return tokens, [tokens.sequence(i) for i in range(tokens.n_sequences)]

    @fuzz
    @given(st.one_of(st.lists(CUTS, min_size=1, max_size=2), st.lists(fields, min_size=1, max_size=2)))
    def run(changes):
        data = bytearray(good)
        if isinstance(changes[0][0], str):
            data = cut(good, changes)
        else:
            for at, number, form in changes:
                struct.pack_into(form, data, at, number % 256 ** struct.calcsize(form))
        path.write_bytes(data)
        loaded = attempt(tally, load)
        if loaded is not None:
            tokens, sequences = loaded
            raw = np.fromfile(f"{prefix}.bin", dtype=tokens.dtype)
            assert np.issubdtype(tokens.dtype, np.integer)
            assert np.array_equal(tokens.tokens(0, tokens.n_tokens), raw)
            assert np.array_equal(np.concatenate(sequences), raw)
            bounds = tokens.document_indices
            assert (bounds[0], bounds[-1]) == (0, tokens.n_sequences)
            assert (np.diff(bounds) >= 0).all()

    run()


YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 16}
EXPORTS = {
    "ngpt": ("ngpt", {}),
    "gpt": ("gpt", {}),
    "smollm3": ("gpt", {"nope_interval": 2, "tie_embeddings": True, "rope_scaling": YARN}),
}


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "out"
    kind, parts = EXPORTS[request.param]
    source = MemorySource(model_config(kind, **parts))
    convert(source, folder, "hf")
    if parts:  # as transformers' own are
        path = folder / "config.json"
        tree = json.loads(path.read_text())
        del tree["megabus"]
        path.write_text(json.dumps(tree))
    return folder, source


def test_hugging_face_config(exported, tally):
    folder, original = exported
    text = (folder / "config.json").read_bytes()

    def load():
        with OpenFiles() as files:
            source = open_source(folder, files)
            names = param_specs(source.state.model)
            sizes = {name: original.tensors["weight", name].numel() for name in names}
            return source.state.model, {name: source.read("weight", name, 0, n) for name, n in sizes.items()}

    @fuzz
    @given(OF_JSON)
    def run(mutation):
        with spoilt(folder, "config.json"):
            raw = mutated(text, mutation)
            (folder / "config.json").write_bytes(raw)
            loaded = attempt(tally, load)
            if loaded is not None:
                model, weights = loaded
                said = json.loads(raw)
                assert said["hidden_size"] == model.d_model
                assert said["num_hidden_layers"] == model.n_layers
                assert said["vocab_size"] == model.vocab_size
                assert weights.keys() == original.weights().keys()
                assert all(torch.equal(values.reshape(-1), weights[key]) for key, values in original.weights().items())

    run()


TEXTS = ["the cat sees the dog", " Zürich 漢字\n\n", "\u0301a <|endoftext|> 🙂"]


@pytest.mark.parametrize("kind", ["tokenizer.json", "ranks", "SentencePiece"])
def test_tokenizer(kind, tally, tmp_path, monkeypatch):
    """A tokenizer whose file is changed is refused, or gives ids below its size for any text."""
    if kind == "ranks":
        encoding = tiktoken.Encoding("small", CL100K, {"<|end|>": 261, "<|begin|>": 262}, "<|end|>", "<|begin|>")
        monkeypatch.setitem(tiktoken.ENCODINGS, 260, encoding)
        tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"at"]
        path = tmp_path / "own.model"
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    else:
        size, model_type = (275, "byte-bpe") if kind == "tokenizer.json" else (290, "bpe")
        path = train_tokenizer(TEXTS * 9, size, tmp_path / "own", model_type)
    good = path.read_bytes()

    def load():
        tokenizer = Tokenizer(path)
        return tokenizer, tokenizer.files.known_as, tokenizer.encode_batch(TEXTS)

    def run(mutation):
        path.write_bytes(mutated(good, mutation) if kind == "tokenizer.json" else cut(good, mutation))
        loaded = attempt(tally, load)
        if loaded is not None:
            tokenizer, known_as, ids = loaded
            assert tokenizer.sha256 in known_as
            assert all(0 <= number < tokenizer.vocab_size for found in ids for number in found)
            assert all(isinstance(tokenizer.decode(found), str) for found in ids)

    fuzz(given(OF_JSON if kind == "tokenizer.json" else st.lists(CUTS, min_size=1, max_size=2))(run))()
