"""A page as a parser sees it, for tests of what is in it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page as a parser sees it: balanced tags, what it refers to, its text, its data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.labels: list[str] = []  # of horizontal axes
        self.data = ""
        self.feed(html)
        self.close()
        self.problems += [f"{tag} is not closed" for tag in self.open]
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.problems += [f"id {name} twice" for name in set(ids) if ids.count(name) > 1]
        for word in ("http://", "https://", "url(", "@import"):
            if word in html.replace("http://www.w3.org/2000/svg", "").replace("url(#", ""):
                self.problems.append(f"refers to {word}")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data") and not (value or "").startswith("data:"):
                self.problems.append(f"{tag} refers to {value}")
            if name.startswith("on"):
                self.problems.append(f"{tag} runs {name}")
            if name == "alt" and not value:
                self.problems.append(f"{tag} has no words")
        if dict(attrs).get("role") == "img" and not dict(attrs).get("aria-label"):
            self.problems.append(f"{tag} has no words")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data += data if dict(self.tags[-1][1]).get("id") == "data" else ""
        elif self.open and self.open[-1] != "style":
            self.text.append(data)
            if self.open[-1] == "text" and self.tags[-1][1].get("class") == "xlabel":
                self.labels.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)
