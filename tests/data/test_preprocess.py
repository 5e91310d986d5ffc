"""`megabus preprocess` and tools/demo_text.py, offline."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tokenizers

from tests.support.small_tokenizer import SENTENCE

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from megabus.cli import main
from megabus.data import encoding
from megabus.data import preprocess as preprocessing
from megabus.data.indexed import IndexedTokens, read_meta
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from tools import demo_text

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["First line.\n\n  Second, indented.", "Ünïcode 漢字 🙂\nend", "a third"]


def run(model, output, *arguments):
    options = ["--tokenizer", str(model), "--out", str(output), "--workers", "1"]
    return main(["preprocess", *map(str, arguments), *options])


def documents(model, prefix):
    """The corpus decoded, each document checked to end with the eod."""
    tokenizer, corpus = Tokenizer(model), IndexedTokens(prefix)
    sequences = [corpus.sequence(i).tolist() for i in range(corpus.n_sequences)]
    assert all(ids[-1] == tokenizer.eod for ids in sequences)
    return [tokenizer.decode(ids[:-1]) for ids in sequences]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("blank-lines", ["a\n\nb", "c", "d"]),
        ("file", ["\n\na\n\nb\n\n\nc\n \n\n\nd\n"]),
        ("line", ["a", "b", "c", "d"]),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_is_split_in_documents(tmp_path, model, how, expected, suffix):
    text = b"\n\na\n\nb\n\n\nc\n \n\n\nd\n"
    (tmp_path / f"in{suffix}").write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    assert run(model, tmp_path / "out", tmp_path / f"in{suffix}", "--split-documents", how) == 0
    assert documents(model, tmp_path / "out") == expected


def write_tables(folder):
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(DOCUMENTS))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS}), folder / "c.parquet")


def test_jsonl_parquet_and_directories(tmp_path, model, capsys):
    write_tables(tmp_path / "in")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert run(model, tmp_path / name, tmp_path / "in" / name, "--text-key", "body") == 0
        assert documents(model, tmp_path / name) == DOCUMENTS
    assert capsys.readouterr().out.startswith("3 documents, ")
    for number, inputs in enumerate((tmp_path / "in", tmp_path / "in" / "*")):  # a directory, a glob
        assert run(model, tmp_path / f"all{number}", inputs, "--text-key", "body") == 0
        assert documents(model, tmp_path / f"all{number}") == 3 * DOCUMENTS


def test_dataset_by_name(tmp_path, model):
    """A hub name goes the same way through load_dataset; a local dataset stands in for it."""
    (tmp_path / "stories").mkdir()
    for split, texts in (("train", DOCUMENTS), ("validation", DOCUMENTS[:1])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "stories" / f"{split}.jsonl").write_text(lines)
    arguments = ("--dataset", tmp_path / "stories", "--split")
    assert run(model, tmp_path / "train", *arguments, "train") == 0
    assert run(model, tmp_path / "valid", *arguments, "validation") == 0
    assert documents(model, tmp_path / "train") == DOCUMENTS
    assert documents(model, tmp_path / "valid") == DOCUMENTS[:1]


# ---- outputs ----------------------------------------------------------------------------------------------


def test_sidecar_and_eod(tmp_path, model):
    (tmp_path / "in.txt").write_text("one\n\n\ntwo\n")
    assert run(model, tmp_path / "with", tmp_path / "in.txt") == 0
    assert run(model, tmp_path / "without", tmp_path / "in.txt", "--no-append-eod") == 0
    assert IndexedTokens(tmp_path / "with").n_tokens == IndexedTokens(tmp_path / "without").n_tokens + 2
    tokenizer = Tokenizer(model)
    assert read_meta(tmp_path / "with") == {
        "vocab_size": 300,
        "tokenizer": "t.model",
        "tokenizer_sha256": tokenizer.sha256,
        "eod": tokenizer.eod,
        "document_prefix": [],
        "document_suffix": [tokenizer.eod],
        "n_documents": 2,
        "n_tokens": IndexedTokens(tmp_path / "with").n_tokens,
        "n_bytes": len("onetwo"),
        "dtype": "uint16",
        "bin_sha256": hashlib.sha256((tmp_path / "with.bin").read_bytes()).hexdigest(),
    }


def test_bytes_of_text_are_counted_on_both_sides(tmp_path, model):
    """In UTF-8, of each document where it went."""
    texts = [f"{word} {n}" for n in range(40) for word in ("漢字", "Ünïcode", "plain")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert run(model, tmp_path / "out", tmp_path / "in.jsonl", "--valid-fraction", "0.3") == 0
    found = [documents(model, tmp_path / f"out-{side}") for side in ("train", "valid")]
    told = [read_meta(tmp_path / f"out-{side}")["n_bytes"] for side in ("train", "valid")]
    assert told == [sum(len(text.encode()) for text in side) for side in found]
    assert sum(told) == sum(len(text.encode()) for text in texts)


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A directory whose post-processor puts BOS before a text, and nothing after it."""
    folder = tmp_path_factory.mktemp("llama")
    backend = tokenizers.Tokenizer.from_file(str(train_tokenizer([SENTENCE], 260, folder / "t")))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 260)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


MARKS = [
    ((), [260], [261], ", each preceded by <s> (260) and followed by </s> (261)"),
    (("--no-append-eod",), [260], [], ", each preceded by <s> (260)"),
    (("--bos", "none"), [], [261], ", each followed by </s> (261)"),
    (("--bos", "none", "--eos", "none"), [], [], ""),
    (("--bos", "</s>", "--eos", "0"), [261], [0], ", each preceded by </s> (261) and followed by <|endoftext|> (0)"),
]


@pytest.mark.parametrize(("options", "before", "after", "told"), MARKS)
def test_what_stands_around_a_document(tmp_path, llama_like, capsys, options, before, after, told):
    (tmp_path / "in.txt").write_text("the fox\n\n\nthe dog\n")
    assert run(llama_like, tmp_path / "out", tmp_path / "in.txt", *options) == 0
    assert capsys.readouterr().out.startswith(f"2 documents{told}, ")
    corpus, tokenizer = IndexedTokens(tmp_path / "out"), Tokenizer(llama_like)
    found = [corpus.sequence(i).tolist() for i in range(2)]
    assert found == [[*before, *tokenizer.encode(text), *after] for text in ("the fox", "the dog")]
    meta = read_meta(tmp_path / "out")
    assert (meta["document_prefix"], meta["document_suffix"]) == (before, after)
    assert (meta["vocab_size"], meta["tokenizer_sha256"]) == (262, tokenizer.sha256)


def test_marks_that_there_are_not_are_refused(tmp_path, llama_like, capsys):
    (tmp_path / "in.txt").write_text("the fox\n")
    backend = tokenizers.Tokenizer.from_file(str(llama_like / "tokenizer.json"))
    (tmp_path / "endless.json").write_text(tokenizers.Tokenizer(backend.model).to_str())
    for name, options, told in (
        (llama_like, ("--eos", "<none>"), f"--eos = <none>: is neither a token of {llama_like} nor an id below 262"),
        (llama_like, ("--bos", "262"), "--bos = 262: is neither a token"),
        (llama_like, ("--no-append-eod", "--eos", "0"), "--eos = 0: says what --no-append-eod forbids"),
        (tmp_path / "endless.json", (), f"tokenizer = {tmp_path}/endless.json: names no end-of-text token"),
    ):
        assert run(name, tmp_path / "out", tmp_path / "in.txt", *options) == 2
        assert capsys.readouterr().err.startswith(f"error: {told}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endless.json", "in.txt"]


def test_while_a_library_is_silent_the_time_is_told(capsys, monkeypatch):
    monkeypatch.setattr(preprocessing, "PROGRESS_SECONDS", 0.001)
    asked = threading.Event()

    def line():
        asked.set()
        return "so far"

    with preprocessing.ticking(line):
        assert asked.wait(60)
    assert capsys.readouterr().err.startswith("so far\n")


def test_a_byte_level_bpe_is_trained_by_default(tmp_path, capsys):
    texts = [f"document {i}: {SENTENCE}" for i in range(30)]
    (tmp_path / "in.txt").write_text("\n\n\n".join(texts))
    command = ["preprocess", str(tmp_path / "in.txt"), "--train-tokenizer", "300", "--out", str(tmp_path / "c")]
    assert main([*command, "--workers", "1"]) == 0
    tokenizer, corpus = Tokenizer(tmp_path / "c-tokenizer.json"), IndexedTokens(tmp_path / "c")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("tokenizers", 300)
    assert tokenizer.decode(corpus.sequence(3).tolist()) == texts[3].strip()
    assert corpus.sequence(3)[-1] == tokenizer.eod
    assert "tokenizer: 300 pieces in " in capsys.readouterr().err


def test_validation_split(tmp_path, model):
    texts = [f"document {i}" for i in range(1000)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    (tmp_path / "reversed.txt").write_text("\n".join(texts[::-1]))
    options = ("--split-documents", "line", "--valid-fraction", "0.1")
    assert run(model, tmp_path / "a", tmp_path / "in.txt", *options) == 0
    assert run(model, tmp_path / "b", tmp_path / "reversed.txt", *options) == 0
    train, valid = (documents(model, tmp_path / f"a-{part}") for part in ("train", "valid"))
    assert sorted(train + valid) == sorted(texts)
    assert 60 < len(valid) < 140
    assert documents(model, tmp_path / "b-valid") == valid[::-1]


def test_bytes_do_not_depend_on_workers(tmp_path):
    """As a user runs it: a subprocess, outside the repository."""
    words, random_words = SENTENCE.split(), random.Random(0)
    lines = (" ".join(random_words.choices(words, k=200)) for _ in range(2800))
    (tmp_path / "in.txt").write_text("\n\n\n".join(lines))
    assert (tmp_path / "in.txt").stat().st_size > 2 * encoding.BATCH_CHARACTERS  # three batches
    command = [sys.executable, str(ROOT / "tools/preprocess.py"), "in.txt", "--train-tokenizer", "300"]
    command += ["--model-type", "bpe", "--tokenizer-sample-mb", "0.1", "--valid-fraction", "0.1"]
    for workers in ("1", "2"):
        output = ["--out", f"with{workers}/c", "--workers", workers]
        done = subprocess.run([*command, *output], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("2800 documents, ")
    assert contents(tmp_path / "with1") == contents(tmp_path / "with2")
    expected = [f"c-{part}.{kind}" for part in ("train", "valid") for kind in ("bin", "idx", "meta.json")]
    assert sorted(contents(tmp_path / "with1")) == sorted([*expected, "c-tokenizer.model"])


# ---- errors -----------------------------------------------------------------------------------------------

ERRORS = {
    "missing file": (["nothing.txt"], "nothing.txt"),
    "empty glob": (["*.nothing"], "*.nothing"),
    "unknown kind": (["in.csv"], "unknown kind of file"),
    "missing key": (["in.jsonl", "--text-key", "body"], "no text under 'body', its keys are text"),
    "key without text": (["null.jsonl"], "line 2 has null under 'text'"),
    "not json": (["bad.jsonl"], "bad.jsonl"),
    "not parquet": (["bad.parquet"], "bad.parquet"),
    "not utf-8": (["latin.txt"], "line 1 is not UTF-8"),
    "cut gzip": (["cut.txt.gz"], "cannot be read"),
    "empty corpus": (["empty.txt"], "gives 0 document(s), of which none goes to out/c; give more text"),
    "empty validation": (
        ["in.txt", "--valid-fraction", "1e-9"],
        "out/c-valid; give more files, make documents smaller (--split-documents line)",
    ),
    "fraction": (["in.txt", "--valid-fraction", "1.5"], "--valid-fraction = 1.5"),
    "unknown dataset": (["--dataset", "no-one/nothing"], "no-one/nothing"),
    "unknown split": (["--dataset", "folder", "--split", "test"], "test"),
    "unwritable output": (["in.txt", "--out", "in.txt/c"], "in.txt/c"),
    "no tokenizer": (["in.txt", "--tokenizer", "nothing.model"], "nothing.model"),
}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("one\n")
    Path("in.csv").write_text("one\n")
    Path("in.jsonl").write_text('{"text": "one"}\n')
    Path("null.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    Path("bad.jsonl").write_text('{"text": "one"}\n{"text"\n')
    Path("bad.parquet").write_bytes(b"PAR1 no")
    Path("latin.txt").write_bytes("ü\n".encode("latin-1"))
    Path("cut.txt.gz").write_bytes(gzip.compress(b"one\n" * 1000)[:-10])
    Path("empty.txt").write_text("\n \n")
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text('{"text": "one"}\n')
    Path("out").mkdir()


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_change_nothing(model, capsys, name):
    arguments, message = ERRORS[name]
    options = ["--tokenizer", str(model), "--out", "out/c", "--workers", "1"]
    assert main(["preprocess", "in.txt", *options]) == 0  # control, and a good corpus that must survive
    before = contents(Path("out"))
    capsys.readouterr()
    assert main(["preprocess", *options, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert contents(Path("out")) == before


# ---- the demo's text --------------------------------------------------------------------------------------


def test_scenes():
    title = "PLAY\n\nby X\n\n\n\nSCENE: Rome \n\n\n@@@\nACT I.\n\nSCENE 1. Wood\n\n\nA.\nOh.\n\nScene II.\nB.\n"
    expected = ["PLAY\n\nby X\n\nSCENE: Rome", "ACT I.\n\nSCENE 1. Wood\n\nA.\nOh.", "Scene II.\nB."]
    assert demo_text.scenes(title) == expected


def test_demo_text_is_idempotent(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("done")
    monkeypatch.setattr(demo_text, "TEXT_SHA256", demo_text.sha256(b"done"))
    monkeypatch.setattr(demo_text, "download", lambda *_: pytest.fail("downloaded again"))
    assert demo_text.main(["--out", str(tmp_path / "text.txt")]) == 0
    assert "is there already" in capsys.readouterr().out
