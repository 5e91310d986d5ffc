"""Write the configuration reference, docs/configuration.md, from the types in megabus/config/schema.py, and the list in
megabus/config/free.py.

python tools/config_reference.py            # rewrites what lies below the page's mark
python tools/config_reference.py --check    # exits 1 if that is not what the types say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megabus.command import Parser, run
from megabus.config.free import FREE, FREE_KEYS
from megabus.config.schema import RunConfig
from megabus.errors import UserError

PAGE = Path(__file__).resolve().parents[1] / "docs/configuration.md"
MARK = "<!-- what follows is written by tools/config_reference.py: edit megabus/config/schema.py instead -->\n"
ANY = "N"  # stands in a key for the number of a list's entry
KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}
# As JSON schema names them and, where a type is narrowed that has a validator, as pydantic does; the narrowest last.
BOUNDS = {
    "exclusiveMinimum": "> ",
    "minimum": "≥ ",
    "ge": "≥ ",
    "exclusiveMaximum": "< ",
    "maximum": "≤ ",
    "le": "≤ ",
}

Json = dict[str, Any]


class Table(NamedTuple):
    """A section of the file. key: where it stands, empty for the file itself."""

    key: str
    text: str
    rows: list[str]


def reference(root: type[RunConfig] = RunConfig) -> str:
    """Every key of a section's type and of those in it, as Markdown: one table a section, in the types' order."""
    schema = root.model_json_schema()
    definitions = schema.get("$defs", {})
    parts = []
    for table in _tables("", schema, definitions):
        title = f"`{table.key}`" if table.key else "The file itself"
        parts.append("\n".join([f"## {title}\n", f"{table.text}\n", *table.rows]) + "\n")
    return "\n".join(parts)


def left_free() -> str:
    """What `resume: strict` lets a run change, as Markdown."""
    first, wherever = ([f"`{key}`" for key in sorted(keys)] for keys in (set(FREE) - set(FREE_KEYS), FREE_KEYS))
    text = f"{', '.join(first)}: these sections and keys of the file. Of `data` the contents count, not the paths.\n\n"
    text += f"Wherever they stand: {', '.join(wherever)}.\n"
    return f"## What strict leaves free\n\n{text}"


def _tables(key: str, section: Json, definitions: Json) -> Iterator[Table]:
    """The section's own table, then those of the sections in it."""
    below: list[tuple[str, Json]] = []
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section["properties"].items():
        path = f"{key}.{name}" if key else name
        inner, is_list = _section_in(field, definitions)
        needed = name in section.get("required", ())
        if inner is not None:
            below.append((f"{path}.{ANY}" if is_list else path, inner))
            kind = f"list of [sections](#{_anchor(below[-1][0])})" if is_list else f"[section](#{_anchor(path)})"
            own = _description(field) if is_list and "description" in field else _summary(inner)
        else:
            kind, own = _kind(field), _description(field)
        rows.append(f"| `{name}` | {kind} | {'**needed**' if needed else _default(field, inner)} | {own} |")
    yield Table(key, _description(section), rows)
    for path, inner in below:
        yield from _tables(path, inner, definitions)


def _section_in(field: Json, definitions: Json) -> tuple[Json | None, bool]:
    """The section that a key holds, if any, and whether it holds a list of them."""
    for choice in field.get("anyOf", [field]):
        if "$ref" in choice:
            return definitions[choice["$ref"].rpartition("/")[2]], False
        if "$ref" in choice.get("items", {}):
            return definitions[choice["items"]["$ref"].rpartition("/")[2]], True
    return None, False


def _kind(field: Json) -> str:
    """What values a key takes, with their range."""
    if "anyOf" in field:
        return ", or ".join(_kind(choice) for choice in field["anyOf"] if choice.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"[{', '.join(map(_kind, field['prefixItems']))}]"
        return f"list of {_kind(field['items'])}"
    given = {bound: f"{sign}{_number(field[bound])}" for bound, sign in BOUNDS.items() if bound in field}
    low_high = {text[0] in "<≤": text for text in given.values()}
    return " ".join([KINDS[field["type"]], ", ".join(low_high.values())]).strip()


def _default(field: Json, inner: Json | None) -> str:
    value = field.get("default")
    if inner is not None and value not in (None, []):
        return "its keys' own"
    if value is None or value == []:
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"`{_number(value)}`"


def _number(value: Any) -> str:
    """As YAML has it; large powers of two as such."""
    if isinstance(value, int) and value > 2**20 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) and value.is_integer() and value < 1e6 else json.dumps(value)


def _description(of: Json) -> str:
    if not of.get("description"):
        raise UserError("megabus/config/schema.py", of.get("title"), "has no description", "write it there")
    return str(of["description"]).replace("|", "&#124;")


def _summary(section: Json) -> str:
    """The first sentence of a section's docstring."""
    return _description(section).partition("\n")[0]


def _anchor(key: str) -> str:
    """GitHub's, of a heading that is a key in backquotes."""
    return key.lower().replace(".", "")


def parts_of(page: Path) -> tuple[str, str]:
    """What people wrote in the page, with the mark that ends it, and what lies below."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    above, mark, below = text.partition(MARK)
    if not mark:
        raise UserError("page", page, "has no line that marks where the reference begins", f"add: {MARK.strip()}")
    return above + mark, below


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    parser.add_argument("--page", type=Path, default=PAGE, help="(docs/configuration.md)")
    args = parser.parse_args()
    above, below = parts_of(args.page)
    wanted = f"\n{reference()}\n{left_free()}"
    if args.check:
        if below != wanted:
            print(f"{args.page} is stale: run python tools/config_reference.py", file=sys.stderr)
        return int(below != wanted)
    args.page.write_text(above + wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
