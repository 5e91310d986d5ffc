"""The script that runs the documents' commands: what it writes into a page, and when it finds one stale."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from megabus.errors import UserError
from tools import make_docs
from tools.make_docs import PAGES, ROOT, Scratch, blocks_of, inputs_of, made, shown, stale

PAGE = """# A page

<!-- file: mine.yaml -->
```yaml
a: 1
```

<!-- run: {cost: cheap} -->
```console
$ cat mine.yaml
$ echo one \\
    two   # said
old
```

<!-- run: {cost: long, show: "^b"} -->
```console
$ printf 'a\\nb\\nc\\nc\\n'
```

<!-- run: {cost: long} -->
```python
print(6 * 7)
```

<!-- output -->
```
41
```

<!-- output: {cost: long, command: cat mine.yaml} -->
```
```

```console
$ false     # not marked: not run
```
"""


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path)


def fresh_page(scratch):
    return made(PAGE, "page.md", scratch, cheap_only=False)


def test_every_block_shows_what_its_commands_print(scratch):
    bodies = [block.body for block in blocks_of(fresh_page(scratch), "page.md")]
    assert bodies == [
        "a: 1\n",
        "$ cat mine.yaml\na: 1\n$ echo one \\\n    two   # said\none two\n",
        "$ printf 'a\\nb\\nc\\nc\\n'\n...\nb\n...\n",
        "print(6 * 7)\n",
        "42\n",
        "a: 1\n",
    ]


def test_a_page_that_was_just_made_is_not_stale_and_made_again_is_the_same(scratch):
    page = fresh_page(scratch)
    assert stale(page, "page.md", scratch) == []
    assert made(page, "page.md", scratch, cheap_only=False) == page
    assert page.endswith("$ false     # not marked: not run\n```\n")


def test_another_output_of_a_cheap_command_is_found(scratch):
    found = stale(fresh_page(scratch).replace("one two", "one too"), "page.md", scratch)
    assert "-one too" in found
    assert "+one two" in found


@pytest.mark.parametrize(("old", "new"), [("a: 1", "a: 2"), ("6 * 7", "6 * 8"), ("^b", "^a")])
def test_a_long_block_is_stale_when_its_commands_or_files_have_changed(scratch, old, new):
    page = fresh_page(scratch)
    assert any(
        "is of another command, file or default" in line for line in stale(page.replace(old, new), "page.md", scratch)
    )


def test_a_long_block_is_stale_when_a_default_has_changed_and_not_for_prose(monkeypatch):
    (block,) = blocks_of("<!-- run: {cost: long} -->\n```console\n$ true\n```\n", "page.md")
    hashes = []
    for default, text in ((1, "rate"), (1, "the rate"), (2, "rate")):
        kind = type("Config", (BaseModel,), {"__annotations__": {"lr": int}, "lr": Field(default, description=text)})
        monkeypatch.setattr(make_docs, "RunConfig", kind)
        hashes.append(inputs_of(block, [block]))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_long_block_is_stale_when_a_configuration_that_it_names_has_changed(tmp_path):
    (block,) = blocks_of("<!-- run: {cost: long} -->\n```console\n$ true configs/a.yaml\n```\n", "page.md")
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs/a.yaml"
    file.write_text("a")
    before = inputs_of(block, [block], tmp_path)
    file.write_text("b")
    assert inputs_of(block, [block], tmp_path) != before


def test_a_command_that_fails_is_named_in_one_line(scratch):
    text = "<!-- run: {cost: cheap} -->\n```console\n$ echo no such thing >&2; exit 3\n```\n"
    with pytest.raises(UserError, match=r"page\.md = echo no .*: ended with 3: no such thing; mend the page"):
        made(text, "page.md", scratch, cheap_only=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- run: {cost: dear} -->\n```\n```\n", "is not understood"),
        ("<!-- run: {cost: cheap, shows: x} -->\n```\n```\n", "is not understood"),
        ("<!-- run: {cost -->\n```\n```\n", "is no YAML"),
        ("<!-- run: {cost: cheap} -->\n\n```\n```\n", "stand right before a fenced block"),
    ],
)
def test_a_comment_that_would_do_nothing_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        blocks_of(text, "page.md")


def test_what_is_left_out_and_long_lines_are_marked():
    assert shown("a\nb\n", None) == "a\nb\n"
    assert shown("x" * 300, None) == "x" * 197 + "...\n"
    assert shown("progress 1\rprogress 2\ndone\n", "^done") == "...\ndone\n"


def test_every_page_with_a_mark_is_among_the_pages():
    """Or its transcripts would never be looked at."""
    marked = {
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
        if blocks_of(path.read_text(), path.name)
    }
    assert marked == set(PAGES)
    assert all((ROOT / page).exists() for page in PAGES)
    assert all(Path(page).suffix == ".md" for page in PAGES)
