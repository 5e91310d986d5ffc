"""For mkdocs: pages and files outside of docs/ that the documents link to become a part of the site.

The same Markdown is read on GitHub, where README.md stands at the top and a link may lead to any file. On the site
README.md is the first page, the other pages of the top stand beside those of docs/, and whatever else is linked lies
under files/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
TOP = {"README.md": "index.md"} | {name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the top, and every file outside of docs/ that a page links to."""
    from mkdocs.structure.files import File

    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for name, page in TOP.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, page, content=rewritten(text, name)))
        texts[f"../{name}"] = text
    for page, text in texts.items():
        for link in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
            target = where(link, posixpath.join("docs", page))
            if not target.startswith("docs/") and target not in TOP and (ROOT / target).is_file():
                uri = posixpath.join("files", target)
                if files.get_file_from_path(uri) is None:
                    files.append(File.generated(config, uri, content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The same links on the site; a page of the top has been rewritten already."""
    return markdown if page.file.src_uri in TOP.values() else rewritten(markdown, f"docs/{page.file.src_uri}")


def rewritten(text: str, page: str) -> str:
    """Links of a page, by its path in the repository, as they are between the site's sources."""

    def moved(match: re.Match[str]) -> str:
        target = where(match[1], page)
        if target.startswith("docs/"):
            return target.removeprefix("docs/")
        return TOP.get(target, posixpath.join("files", target))

    return LINK.sub(moved, text)


def where(link: str, page: str) -> str:
    """The path in the repository that a page's link leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
