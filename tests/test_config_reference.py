"""The configuration reference is what the types say, names every key, and is missed when it is stale."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from megabus.config import RunConfig
from megabus.config.free import FREE, FREE_KEYS
from megabus.config.section import Section
from megabus.errors import UserError

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools/config_reference.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("config_reference", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*args):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True)


def test_the_page_is_what_the_types_say():
    done = run("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stale_page_is_found_and_mended(tool, tmp_path):
    """And what people wrote above the mark stays."""
    page = tmp_path / "page.md"
    wanted = f"\n{tool.reference()}\n{tool.left_free()}"
    page.write_text("# Ours\n" + tool.MARK + wanted.replace("| `50` |", "| `51` |", 1))
    assert run("--check", "--page", page).returncode == 1
    assert "51" in page.read_text()  # it only looks
    assert run("--page", page).returncode == 0
    assert run("--check", "--page", page).returncode == 0
    assert page.read_text() == "# Ours\n" + tool.MARK + wanted
    page.write_text("no mark\n")
    done = run("--page", page)
    assert done.returncode == 2
    assert re.fullmatch(r"error: page = .*: has no line that marks .*\n", done.stderr)
    assert page.read_text() == "no mark\n"


def test_every_key_is_named_once_in_its_section(tool):
    sections = dict(re.findall(r"^## `?(.*?)`?\n(.*?)(?=^## |\Z)", tool.reference(), re.MULTILINE | re.DOTALL))

    def compare(section: type[BaseModel], key: str) -> int:
        title = key or "The file itself"
        assert re.findall(r"^\| `(\w+)` \|", sections[title], re.MULTILINE) == list(section.model_fields)
        below = 0
        for name, field in section.model_fields.items():
            for inner, number in sections_in(field.annotation):
                below += compare(inner, f"{key}.{name}".lstrip(".") + number)
        return 1 + below

    assert compare(RunConfig, "") == len(sections)
    links = set(re.findall(r"\(#(\w+)\)", tool.reference()))
    assert links == {title.replace(".", "").lower() for title in sections} - {"the file itself"}


def test_what_strict_leaves_free_is_listed(tool):
    """All of it, and nothing that no section has."""
    assert set(re.findall(r"`(\w+)`", tool.left_free())) == {*FREE, *FREE_KEYS}
    assert set(FREE) <= RunConfig.model_fields.keys()
    assert all(f"\n| `{key}` |" in tool.reference() for key in FREE_KEYS)


def sections_in(annotation):
    """Of an annotation: (section, what its place adds to the key)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    found = [pair for part in getattr(annotation, "__args__", ()) for pair in sections_in(part)]
    return [(section, ".N") for section, _ in found] if getattr(annotation, "__origin__", None) is list else found


class Inner(Section):
    """Whatever is inside.

    Second paragraph.
    """

    share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="of a | b")


class Whole(Section):
    """A file."""

    inner: Inner | None = None
    many: list[Inner] = Field(default_factory=list, description="several")
    mapping: dict[str, int] = Field(default_factory=dict, description="names")
    seed: Annotated[int, Field(lt=2**63)] = Field(3, description="a seed")


def test_tables_tell_ranges_defaults_and_lists(tool):
    text = tool.reference(Whole)
    assert "| `inner` | [section](#inner) | none | Whatever is inside. |" in text
    assert "| `many` | list of [sections](#manyn) | none | several |" in text
    assert "| `seed` | whole number < 2^63 | `3` | a seed |" in text
    assert text.count("| `share` | number ≥ 0, ≤ 1 | `0.5` | of a &#124; b |") == 2
    assert "## `many.N`\n\nWhatever is inside.\n\nSecond paragraph.\n" in text


@pytest.mark.parametrize("lacking", ["key", "section"])
def test_a_key_or_section_without_a_description_is_refused(tool, lacking):
    if lacking == "key":

        class Bare(Section):
            """Told."""

            untold: int = 1
    else:

        class Bare(Section):
            told: int = Field(1, description="of this, but not of the section")

    with pytest.raises(UserError, match="has no description"):
        tool.reference(Bare)
