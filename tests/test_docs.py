"""The documents: no placeholder, no dead link, no file that names a folder which is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text()
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]


def test_the_architecture_names_real_places():
    """Every `folder/file.py` in the text exists, and every folder of the package is in its table."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)", text))
    assert named
    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "megabus" / name).exists())]
    assert not missing
    folders = {path.name for path in (ROOT / "megabus").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(re.findall(r"^\| `(\w+)/`", text, re.MULTILINE))
