"""What `megabus preprocess` reads of what other people's data sets hold: names, folders, tables, damage."""

import gzip
import io
import json
import logging
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from megabus.data.documents import Meter, file_documents
from megabus.data.hub import only_retries
from megabus.data.indexed import IndexedTokens, read_meta
from megabus.data.inputs import expand_inputs
from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError
from tests.support.command import run_command

HTTP = sys.modules[HTTPError.__module__.partition(".")[0]]  # the library that the hub is asked by, whichever it is
LATER = 10 << 20  # bytes after which `datasets` has settled what a column holds


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("megabus.data.preprocess.PROGRESS_SECONDS", 3600.0)  # on a busy machine it would be told


def preprocess(model, *arguments):
    return run_command("preprocess", *arguments, "--tokenizer", model, "--out", "out/c", "--workers", 1)


def read(model, *arguments):
    """The documents of a corpus that must be made without complaint, or with the one in `stderr`."""
    done = preprocess(model, *arguments)
    assert done.returncode == 0, done.stderr
    tokenizer, corpus = Tokenizer(model), IndexedTokens("out/c")
    return [tokenizer.decode(corpus.sequence(i).tolist()[:-1]) for i in range(corpus.n_sequences)], done.stderr


def refused(model, *arguments):
    """The one line in which a corpus is refused; nothing is left behind."""
    done = preprocess(model, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(Path("out").iterdir())
    return done.stderr


def write(path, *rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


# ---- which files ------------------------------------------------------------------------------------------

STRANGE = [
    "[1].txt",
    "a*b?.txt",
    "~",
    "$HOME.txt",
    "sp ace\n.txt",
    "hf::x.txt",
    "file:#%20.txt",
    ".hidden.txt",
    "._fork.txt",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_file_named_in_full_is_read_as_named(model, name):
    name = name if name.endswith(".txt") else f"{name}.txt"
    write(name, "mine")
    write("ab.txt", "another that the name would match")
    write("1.txt", "another that the name would match")
    assert read(model, name) == (["mine"], "")


def test_names_that_are_not_utf8_or_that_a_terminal_would_obey(model):
    """They are read as any; what is told of them is printable, and what is written down is UTF-8."""
    odd = os.fsdecode(b"\xff")
    own = Path(f"{odd}\x1b]0;own\n.model")
    own.write_bytes(model.read_bytes())
    write(f"in/{odd}.txt", "mine")
    write("in/b.\x1b[31m", "no")
    texts, told = read(own, "in")
    assert texts == ["mine"]
    assert told == "warning: of in passed over: 1 of other endings (.\\x1b[31m 1)\n"
    meta = read_meta("out/c")
    assert meta["tokenizer"] == own.name.replace(odd, "\N{REPLACEMENT CHARACTER}")


def test_strange_names_of_tables_and_folders(model):
    write("[1]*::x.jsonl", {"text": "a"})
    write("fold[er]?/b.jsonl", {"text": "b"})
    assert read(model, "[1]*::x.jsonl", "fold[er]?") == (["a", "b"], "")


def test_each_file_is_read_once_however_often_it_is_matched(model):
    write("in/a.txt", "a")
    write("in/sub/b.txt", "b")
    Path("in/c.txt").symlink_to("a.txt")
    texts, told = read(
        model, "in/sub/b.txt", "./in/../in/sub/b.txt", "in", "in/*", "in/**/*.txt", str(Path("in").resolve())
    )
    assert texts == ["b", "a"]
    assert "of in passed over: 2 matched before" in told  # b.txt and the link


def test_endings_may_be_in_capitals(model):
    write("in/A.TXT", "a")
    write("in/b.JsonL", {"text": "b"})
    Path("in/C.TXT.GZ").write_bytes(gzip.compress(b"c\n"))
    assert read(model, "in") == (["a", "c", "b"], "")


def test_a_name_that_is_too_long_with_its_endings(model):
    write("a.txt", "a")
    Path("out").mkdir()
    done = run_command("preprocess", "a.txt", "--tokenizer", model, "--out", f"out/{'x' * 250}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out = out/xxx")
    assert "cannot be written ([Errno 36] File name too long" in done.stderr
    assert not list(Path("out").iterdir())


HIDDEN = [
    ".git/x.txt",
    ".x.txt",
    "._a.txt",
    "__MACOSX/a.txt",
    ".ipynb_checkpoints/a-checkpoint.txt",
    "sub/.cache/x.txt",
]


def test_what_a_folder_hides_is_passed_over_and_told(model):
    write("in/a.txt", "a")
    write("in/README.md", "no")
    write("in/data.csv", "no")
    write("in/load.py", "raise SystemExit")
    for name in HIDDEN:
        write(f"in/{name}", "no")
    write("elsewhere/b.txt", "b")
    Path("in/link").symlink_to("../elsewhere")
    Path("in/broken.txt").symlink_to("nowhere")
    os.mkfifo("in/pipe.txt")
    texts, told = read(model, "in")
    assert texts == ["a"]
    assert told.startswith("warning: of in passed over: ")
    assert told.count("\n") == 1
    for part in (
        "6 hidden",
        "2 no regular file",
        "3 of other endings (",
        ".md 1",
        ".csv 1",
        ".py 1",
        "1 links to folders (in/link)",
    ):
        assert part in told


def test_what_a_glob_matches_is_treated_alike(model):
    write("in/a.txt", "a")
    write("in/README.md", "no")
    write("in/__MACOSX/a.txt", "no")
    write("in/sub/b.txt", "b")
    texts, told = read(model, "in/*")
    assert texts == ["a", "b"]
    assert told == "warning: of in/* passed over: 1 hidden, 1 of other endings (.md 1)\n"
    assert read(model, "in/**/*.txt")[0] == ["a", "b"]
    write("in/.spelled.txt", "asked for")
    assert read(model, "in/.*.txt") == (["asked for"], "")


def test_what_a_glob_hides_is_told(model):
    """Every folder once, however much lies in it; a folder that is asked for is none."""
    for name in ("a.txt", ".b.txt", ".c/a.txt", ".c/.d.txt", "sub/.e.txt", "sub/.f.md", "__MACOSX/a.txt"):
        write(f"in/{name}", name)
    for pattern, texts, hidden in (
        ("in/*", ["a.txt"], 5),  # in, .b.txt .c __MACOSX; in sub, .e.txt and .f.md
        ("in/*.txt", ["a.txt"], 1),
        ("in/**/*.txt", ["a.txt"], 4),  # .b.txt .c sub/.e.txt __MACOSX
        ("in/.c/*", [".c/a.txt"], 1),
        ("in/.c/.*.txt", [".c/.d.txt"], 0),
        ("in/.*/*", [".c/a.txt"], 1),
    ):
        told = f"warning: of {pattern} passed over: {hidden} hidden\n" if hidden else ""
        assert read(model, pattern) == (texts, told)


def test_a_link_to_a_folder_is_followed_where_it_is_named(model):
    write("real/a.txt", "a")
    Path(".link").symlink_to("real")
    write("in/b.txt", "b")
    Path("in/link").symlink_to("../real")
    Path("in/loop").symlink_to(".")
    assert read(model, ".link") == (["a"], "")
    assert read(model, "in/link", "in/link/*", ".link/**/*.txt")[0] == ["a"]
    for pattern in ("in", "in/**/*.txt", "in/**"):
        texts, told = read(model, pattern)
        assert texts == ["b"]
        assert "2 links to folders (in/link, in/loop)" in told


def test_a_folder_of_nothing_that_is_read_says_what_it_holds(model):
    write("in/a.csv", "a")
    assert "no readable file is there (passed over: 1 of other endings (.csv 1))" in refused(model, "in")
    assert "input = '': names nothing" in refused(model, "")
    assert "input = in/a.csv: unknown kind of file" in refused(model, "in/a.csv")


def test_files_of_a_folder_are_sorted():
    for name in ("b/2.txt", "a.txt", "b/1.txt", "c.txt"):
        write(f"in/{name}", name)
    files, _ = expand_inputs(["in"])
    assert list(map(str, files)) == ["in/a.txt", "in/b/1.txt", "in/b/2.txt", "in/c.txt"]


# ---- tables -----------------------------------------------------------------------------------------------


def test_empty_tables_hold_no_documents(model):
    write("empty.jsonl")
    write("blank.jsonl", "", "  ")
    Path("mark.jsonl").write_bytes(b"\xef\xbb\xbf\n")
    Path("empty.jsonl.gz").write_bytes(gzip.compress(b""))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "empty.parquet")
    names = ["empty.jsonl", "blank.jsonl", "mark.jsonl", "empty.jsonl.gz", "empty.parquet"]
    for name in names:
        assert "gives 0 document(s), of which none goes to out/c; give more text" in refused(model, name)
    write("a.jsonl", "", {"text": "a"}, "", {"text": "b"})
    assert read(model, *names, "a.jsonl") == (["a", "b"], "")


OTHER_COLUMNS = {
    "null, then text": (None, "s"),
    "null, then an object": (None, {"a": [1]}),
    "a number, then text": (1, "one"),
    "a date, then no date": ("2020-01-01T00:00:00Z", "unknown"),
    "an integer, then one beyond 64 bits": (1, 1 << 70),
    "an integer, then more digits than Python reads": (1, "DIGITS"),
    "a list of numbers, then of texts": ([1], ["a"]),
}


@pytest.mark.parametrize("where", ["inputs", "dataset"])
@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_other_columns_may_hold_anything(model, case, where):
    first, then = OTHER_COLUMNS[case]
    lines = [json.dumps({"text": "first", "meta": first}), json.dumps({"text": " " * LATER, "meta": first})]
    lines.append(json.dumps({"text": "last", "meta": then}).replace('"DIGITS"', "9" * 5000))
    write("in/train.jsonl", *lines)
    assert read(model, *(["--dataset", "in"] if where == "dataset" else ["in"])) == (["first", "last"], "")


@pytest.mark.parametrize("deep", ["[" * 20_000 + "]" * 20_000, '{"a": [' * 3000 + '"]}"' + "]}" * 3000])
def test_other_columns_may_nest_as_deep_as_they_like(model, deep):
    """Further than Python's parser goes; with strings that hold brackets and quotes, before and after the text."""
    odd = json.dumps({"text": 'b]}"[{\\', "n": ["]", 1, {"x": '"['}]})
    write("in/train.jsonl", f'{{"n": {deep}, "text": "a"}}', odd.replace("1,", f"{deep}, [{deep}, {deep}],"))
    write(
        "in/train.jsonl",
        Path("in/train.jsonl").read_text().rstrip(),
        f'{{"doc": {{"text": "c", "n": {deep}}}, "text": "c"}}',
    )
    for where in (["in"], ["--dataset", "in"]):
        assert read(model, *where) == (["a", 'b]}"[{\\', "c"], "")
        Path("out").rename(f"out of {len(where)}")


def test_fifty_thousand_nulls_then_a_text(model):
    write("in.jsonl", *[{"meta": None, "text": "a"}] * 50_000, {"meta": "b", "text": "c"})
    assert preprocess(model, "in.jsonl").stdout.startswith("50001 documents, ")


def test_texts_that_look_like_something_else_stay_texts(model):
    texts = ["2020-01-01", "2020-01-01T00:00:00Z", "12:30", "1e5", "007", "null", "true", '{"a": 1}', "\\u0041"]
    write("in/train.jsonl", *({"text": text} for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "in.parquet")
    for arguments in (["in"], ["--dataset", "in"], ["in.parquet"]):
        assert read(model, *arguments)[0] == texts


def test_halves_of_surrogate_pairs_are_replaced_and_told(model):
    write("in.jsonl", '{"text": "a \\ud83d b"}', '{"text": "\\ud83d\\ude42"}', '{"text": "\\ude42\\ud83d"}')
    texts, told = read(model, "in.jsonl")
    assert texts == ["a � b", "🙂", "��"]
    assert told == "warning: 2 document(s) held halves of surrogate pairs, which are U+FFFD now\n"


def test_text_inside_of_other_columns(model):
    rows = [{"doc": {"text": "a", "n": 1}, "a.b": "x"}, {"doc": {"text": "b", "n": 2}, "a.b": "y"}]
    write("in.jsonl", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    for name in ("in.jsonl", "in.parquet"):
        assert read(model, name, "--text-key", "doc.text")[0] == ["a", "b"]
        assert read(model, name, "--text-key", "a.b")[0] == ["x", "y"]
        Path("out").rename(f"out of {name}")
        assert "no text under 'doc.body', its" in refused(model, name, "--text-key", "doc.body")
        assert refused(model, name).endswith("; set --text-key; what lies in another is named so: doc.text\n")


@pytest.mark.parametrize("kind", ["large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_parquet_writes_text_in_many_ways(model, kind):
    column = pyarrow.array(["a", "ü"])
    typed = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"text": typed}), "in.parquet")
    assert read(model, "in.parquet")[0] == ["a", "ü"]


def test_zstd(model):
    Path("in.txt").write_text("a\n\n\nb\n")
    write("in.jsonl", {"text": "c"})
    for name in ("in.txt", "in.jsonl"):
        with pyarrow.CompressedOutputStream(f"{name}.zst", "zstd") as file:
            file.write(Path(name).read_bytes())
    assert read(model, "in.txt.zst", "in.jsonl.zst")[0] == ["a", "b", "c"]
    Path("twice.jsonl.zst").write_bytes(2 * Path("in.jsonl.zst").read_bytes())  # frames, one after the other
    assert read(model, "twice.jsonl.zst")[0] == ["c", "c"]


def test_marks_of_joined_files_are_passed_over(model):
    """As `cat` joins them, and as members of one .gz."""
    lines = [f'\ufeff{{"text": "{text}"}}\n'.encode() for text in "abc"]
    Path("in.jsonl").write_bytes(b"".join(lines))
    Path("in.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert read(model, "in.jsonl")[0] == read(model, "in.jsonl.gz")[0] == ["a", "b", "c"]


# ---- damage -----------------------------------------------------------------------------------------------

WRONG = {
    "null": ({"text": None}, "line 1 has null under 'text', where text should be"),
    "number": ({"text": 5}, "line 1 has a number under 'text'"),
    "truth": ({"text": True}, "line 1 has a truth value under 'text'"),
    "list": ({"text": ["a"]}, "line 1 has a list under 'text'"),
    "object": ({"text": {"a": 1}}, "line 1 has an object under 'text'"),
    "other key": ({"body": "a"}, "line 1 has no text under 'text', its keys are body; set --text-key"),
    "no object": (["a"], "line 1 holds a list, not an object"),
    "only text": ("a", "line 1 is not JSON"),
    "half": ('{"text": "a', "line 1 is not JSON"),
    "brackets": ('{"text": ' + "[" * 100_000, "line 1 is not JSON"),
    "brackets of another kind": ('{"text": "a", "n": ' + "[" * 2000 + "]" * 1999 + "}", "line 1 is not JSON"),
    "nested": ('{"text": ' + "[" * 20_000 + "]" * 20_000 + "}", "line 1 has a list under 'text', where text should be"),
    "inside of another": (
        {"doc": {"id": 1, "text": "a"}},
        "line 1 has no text under 'text', its keys are doc; set --text-key; what lies in another is named so: doc.text",
    ),
    "latin": (b'{"text": "\xfc"}'.decode("latin-1"), "line 1 is not UTF-8 (invalid start byte: b'{"),
}


@pytest.mark.parametrize("name", WRONG)
def test_lines_that_hold_no_text_are_named(model, name):
    line, message = WRONG[name]
    line = line if isinstance(line, str) else json.dumps(line)
    Path("in.jsonl").write_text(f"{line}\n", encoding="latin-1" if name == "latin" else "utf-8")
    assert f"input = in.jsonl: {message}" in refused(model, "in.jsonl")
    write("good.jsonl", {"text": "a"})
    Path("in.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n', encoding="latin-1" if name == "latin" else "utf-8")
    assert message.replace("line 1", "line 3") in refused(model, "good.jsonl", "in.jsonl")


def test_columns_of_parquet_that_hold_no_text_are_named(model):
    columns = {"text": [None, "a"], "n": [1, 2], "day": pyarrow.array([1, 2], pyarrow.date32()), "list": [["a"], ["b"]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), "in.parquet")
    assert "row 0 has null under 'text', where text should be" in refused(model, "in.parquet")
    assert "has int64 under 'n', where text should be" in refused(model, "in.parquet", "--text-key", "n")
    assert "has date32[day] under 'day'" in refused(model, "in.parquet", "--text-key", "day")
    assert "has list<element: string> under 'list'" in refused(model, "in.parquet", "--text-key", "list")
    assert "its columns are text, n, day, list" in refused(model, "in.parquet", "--text-key", "body")


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.string(), pyarrow.large_string()], ids=str)
def test_rows_of_parquet_that_are_no_utf8_are_named(kind):
    raw = pyarrow.large_binary() if kind == pyarrow.large_string() else pyarrow.binary()
    bad = pyarrow.array([b"a"] * 300 + [b"ab\xfc"], raw)
    table = pyarrow.Table.from_arrays([bad if kind == raw else bad.view(kind)], ["text"])
    pyarrow.parquet.write_table(table, "latin.parquet")
    told = r"^input = latin.parquet: row 300 is not UTF-8 under 'text' \(.*'ab.xfc'\); convert it$"
    with pytest.raises(UserError, match=told):
        list(file_documents(Path("latin.parquet"), "text", "file", Meter(0)))


@pytest.mark.parametrize("name", ["latin.txt", "latin.txt.gz", "latin.txt.zst", "latin.jsonl", "latin.jsonl.gz"])
@pytest.mark.parametrize("line", [1, 5000])
def test_lines_that_are_no_utf8_are_named(name, line):
    good, bad = (b'{"text": "a"}\n', b'{"text": "\xe4"}\n') if "jsonl" in name else (b"good\r\n", b"gr\xe4ser\n")
    packed = {".gz": gzip.compress, ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True)}
    Path(name).write_bytes(packed.get(Path(name).suffix, bytes)(good * (line - 1) + bad + good))
    for split in ("blank-lines", "file", "line"):
        with pytest.raises(UserError, match=rf"^input = {name}: line {line} is not UTF-8 \(invalid .*xe4.*convert"):
            list(file_documents(Path(name), "text", split, Meter(0)))


@pytest.mark.parametrize("name", ["in.txt.gz", "in.jsonl.gz", "in.txt.zst", "in.jsonl.zst", "in.parquet"])
@pytest.mark.parametrize("damage", ["cut", "other bytes"])
def test_damaged_files_are_named(model, name, damage):
    text = (json.dumps({"text": "a"}) + "\n").encode() * 1000
    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(text))
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(name, "zstd") as file:
            file.write(text)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), name)
    assert len(read(model, name)[0]) >= 1  # control
    for file in Path("out").iterdir():
        file.unlink()
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[:-10] if damage == "cut" else b"no " + data)
    assert f"input = {name}: cannot be read (" in refused(model, name)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_packed_file_that_is_cut_anywhere_is_named(ending):
    """Before its first byte too, which libraries take for an empty one; and none of it is made up."""
    rows = b"".join(b'{"text": "%d"}\n' % i for i in range(100))
    whole = gzip.compress(rows) if ending == "gz" else pyarrow.compress(rows, "zstd", asbytes=True)
    path = Path(f"in.jsonl.{ending}")
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        read = []
        if size == len(whole):
            read += file_documents(path, "text", "file", Meter(0))
            assert read == [str(i) for i in range(100)]
            break
        with pytest.raises(UserError, match=f"^input = {path}: cannot be read "):
            read += file_documents(path, "text", "file", Meter(0))
    path.write_bytes(whole + b"no frame")
    with pytest.raises(UserError, match=f"^input = {path}: cannot be read "):
        list(file_documents(path, "text", "file", Meter(0)))


def test_a_line_tells_of_many_keys_and_columns_only_some(model):
    row = {f"k{i}": "x" for i in range(5000)}
    write("in.jsonl", row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "in.parquet")
    for name in ("in.jsonl", "in.parquet"):
        told = refused(model, name)
        assert "k18, k19, ...; set --text-key" in told
        assert len(told) < 400
    write("in.jsonl", {"k" * 100_000: "x"})
    assert len(refused(model, "in.jsonl")) < 2500


def test_columns_of_one_name_are_told(model):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    pyarrow.parquet.write_table(table, "in.parquet")
    assert "input = in.parquet: has 2 columns called 'text'; rename all but one" in refused(model, "in.parquet")


# ---- data sets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["in.py", "other.py"])
def test_a_loading_script_is_passed_over(model, script):
    write("in/train.jsonl", {"text": "a"})
    Path("in", script).write_text("open('was_run', 'w')")
    assert read(model, "in") == (["a"], "warning: of in passed over: 1 of other endings (.py 1)\n")
    Path("out").rename("old")
    told = f"warning: of in passed over: {script} (no code of a data set is run)\n"
    assert read(model, "--dataset", "in", "--valid-fraction", "0") == (["a"], told)
    assert not Path("was_run").exists()


def test_a_data_set_that_only_a_script_could_load_is_refused(model):
    Path("in").mkdir()
    Path("in/in.py").write_text("open('was_run', 'w')")
    told = preprocess(model, "--dataset", "in")
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1].startswith("error: dataset = in: cannot be read (")
    assert "Dataset scripts are no longer supported, but found in.py); give its files" in refused(
        model, "--dataset", "in/in.py"
    )
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    "rows", [[{"text": "a", "n": None}, {"text": "b", "n": "1"}], ["a", "b"]], ids=["objects", "texts"]
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_in_a_dataset(model, rows, mark):
    write("in/train.json", mark + json.dumps(rows, indent=1))
    assert read(model, "--dataset", "in")[0] == ["a", "b"]
    Path("out").rename("old")
    whole = json.dumps(rows).encode()
    for text, problem in {
        whole[:-1]: "is not JSON (",
        whole + b"]": "is not JSON (",
        b"[" * 100_000: "is not JSON (",
        b'["a",\n"\xfc"]': "line 2 is not UTF-8 (",
    }.items():
        Path("in/train.json").write_bytes(text)
        told = refused(model, "--dataset", "in")
        assert f"input = {Path('in/train.json').resolve()}: {problem}" in told
        assert ("; convert the file" in told) == ("UTF-8" in problem)


def test_what_is_not_utf8_in_a_dataset_is_named(model):
    """Not for the name of the data set to mend."""
    Path("in").mkdir()
    Path("in/train.jsonl").write_bytes(b'{"text": "\xfc"}\n')
    assert "in/train.jsonl: line 1 is not UTF-8 (" in refused(model, "--dataset", "in")
    Path("in/train.jsonl").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xfc"]}), "in/train.parquet")
    assert "in/train.parquet: row 0 is not UTF-8 under 'text' (" in refused(model, "--dataset", "in")


def test_json_lines_and_parquet_in_a_dataset(model):
    for name in ("train.json.gz", "train.jsonl.gz"):
        Path("in").mkdir(exist_ok=True)
        Path("in", name).write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
        assert read(model, "--dataset", "in")[0] == ["a", "b"]
        Path("in", name).unlink()
    pyarrow.parquet.write_table(pyarrow.table({"doc": [{"text": "a"}], "n": [1]}), "in/train.parquet")
    assert read(model, "--dataset", "in", "--text-key", "doc.text")[0] == ["a"]
    Path("in/train.parquet").unlink()
    write("in/train.csv", "text,n", "a,1")  # what is not read here is read by `datasets`
    assert read(model, "--dataset", "in")[0] == ["a"]


def card(files):
    return f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"


OUTSIDE = {
    "a folder above": "'../text/*.txt'",
    "deeper": "[{split: train, path: [a.txt, 'x/../../text/b.txt']}]",
    "an absolute path": "/etc/hostname",
    "an address": "'http://127.0.0.1:9/b.txt'",
    "another protocol": "'file:///etc/hostname'",
    "hops": "'zip://b.txt::../b.zip'",
}


@pytest.mark.parametrize("where", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("case", OUTSIDE)
def test_a_card_does_not_lead_out_of_its_data_set(model, case, where):
    write("text/b.txt", "b")
    write("in/a.txt", "a")
    text = card(OUTSIDE[case])
    Path("in", where).write_text(text if where == "README.md" else text.replace("---\n", ""))
    told = refused(model, "--dataset", "in")
    assert told.startswith(f"error: dataset = in/{where}: names ")
    assert ", which is outside of the folder; give what is meant as inputs, without --dataset\n" in told


def test_links_and_pipes_do_not_lead_out_of_a_data_set(model):
    """But for the hub's own cache, where all files are links to blobs."""
    write("text/train.jsonl", {"text": "b"})
    Path("in").mkdir()
    for name in ("train.jsonl", "README.md"):
        Path("in", name).symlink_to("../text/train.jsonl")
        assert refused(model, "--dataset", "in").endswith(
            f": is a link to {Path('text/train.jsonl').resolve()}, outside of the directory; "
            "give what is meant as inputs, without --dataset\n"
        )
        Path("in", name).unlink()
    Path("in/data").symlink_to("../text")
    write("in/README.md", card("'data/*.jsonl'"))
    assert f"leads to {Path('text/train.jsonl').resolve()}, outside of the directory" in refused(
        model, "--dataset", "in"
    )
    Path("in/README.md").unlink()
    os.mkfifo("in/README.md")
    assert refused(model, "--dataset", "in").startswith("error: dataset = in/README.md: is no regular file; ")
    write("hub/blobs/1234", {"text": "c"})
    Path("hub/snapshots/rev/data").mkdir(parents=True)
    Path("hub/snapshots/rev/data/train.jsonl").symlink_to("../../../blobs/1234")
    assert read(model, "--dataset", "hub/snapshots/rev") == (["c"], "")


@pytest.mark.parametrize(
    "head", ["configs: [", "configs: 3", "configs: [3]", "configs: [{data_files: {train: 3}}]", "- x"]
)
def test_a_card_that_says_nothing_is_told(model, head):
    write("in/a.txt", "a")
    write("in/README.md", "---", head, "---")
    assert refused(model, "--dataset", "in").startswith("error: dataset = in")


def test_what_a_data_set_passes_over_is_told(model):
    write("in/train.jsonl", {"text": "a"})
    write("in/test.jsonl", {"text": "b"})
    Path("in/train-2.jsonl").symlink_to("train.jsonl")
    for name in ("notes.md", ".hidden.jsonl", ".cache/x.jsonl"):
        write(f"in/{name}", {"text": "no"})
    told = "warning: of in passed over: 2 hidden, 1 matched before, 1 in no split of it (notes.md)\n"
    assert read(model, "--dataset", "in") == (["a"], told)


def test_options_of_inputs_and_of_data_sets_are_not_mixed(model):
    write("in/train.txt", "a", "", "", "b")
    told = "warning: of in each line is a document: --split-documents line says this is meant\n"
    assert read(model, "--dataset", "in") == (["a", "b"], told)
    assert read(model, "--dataset", "in", "--split-documents", "line") == (["a", "b"], "")
    Path("out").rename("old")
    Path("out").mkdir()
    assert "--split-documents = file: is of inputs, and --dataset reads a .txt line by line" in refused(
        model, "--dataset", "in", "--split-documents", "file"
    )
    for option in ("--split", "--subset"):
        assert f"error: {option} = x: is of a --dataset, and inputs are given" in refused(model, "in", option, "x")


def test_folders_of_the_names_of_builders_disturb_nothing(model):
    """`load_dataset("json", ...)` would take a folder of this name for what it is to load."""
    write("json/json.py", "raise SystemExit('was run')")
    write("in.jsonl", {"text": "a"})
    assert read(model, "in.jsonl") == (["a"], "")


@pytest.mark.parametrize("key", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_a_bad_cache_is_blamed_on_what_names_it(model, monkeypatch, key):
    import datasets

    write("in/train.jsonl", {"text": "a"})
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(key, "in/train.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("in/train.jsonl/datasets"))  # read when imported
    assert refused(model, "--dataset", "in").startswith(f"error: {key} = in/train.jsonl: is no place for a cache (")


@pytest.mark.parametrize("status", [None, 504])
def test_a_connection_that_is_tried_again_is_told(monkeypatch, status):
    """By the library itself, of which all else is silent."""
    import datasets
    import datasets.utils.file_utils as there

    only_retries(datasets)
    told = io.StringIO()
    for handler in logging.getLogger("datasets").handlers:  # bound to what stderr was when the library was imported
        monkeypatch.setattr(handler, "stream", told)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", 0)
    lost = HTTP.ConnectError("gone")
    if status:
        request = HTTP.Request("GET", "http://x")
        lost = HfHubHTTPError("busy", response=HTTP.Response(status, request=request))
    answers = [lost, lost, b"text"]

    class File:
        def read(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    file = File()
    there._add_retries_to_file_obj_read_method(file)
    assert file.read() == b"text"
    datasets.logging.get_logger("datasets.builder").error("what is raised too")
    assert told.getvalue().count("Got disconnected from remote data host. Retrying in 0sec") == 2
    assert "what is raised too" not in told.getvalue()


def test_what_is_called_json_is_read_as_jsonl_or_from_its_folder(model):
    Path("in").mkdir()
    Path("in/a.json").write_text(json.dumps([{"text": "a"}]))
    for name in ("in/a.json", "in", "in/*"):
        assert "; call it .jsonl if each line is an object, or give its folder as --dataset, which" in refused(
            model, name
        )
    assert read(model, "--dataset", "in") == (["a"], "")


def test_what_is_not_there_is_told_so(model):
    Path("in").mkdir()
    assert "input = nowhere: does not exist; check the path" in refused(model, "nowhere")
    assert "input = '': names nothing; " in refused(model, "")
    for name in ("in", "*.txt"):
        assert f"input = {name}: no readable file is there; check the path or quote the glob" in refused(model, name)


def test_inputs_need_no_cache(model, monkeypatch):
    write("in.jsonl", {"text": "a"})
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")
    assert read(model, "in.jsonl") == (["a"], "")
