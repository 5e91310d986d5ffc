"""Run the commands that the documents show, and write what they print into the pages.

python tools/make_docs.py               # all of them, trainings too: some minutes
python tools/make_docs.py quickstart    # those of one page (and of the pages before it that it builds on)
python tools/make_docs.py --check       # writes nothing: runs the cheap ones and compares; exits 1 if one is stale

A comment before a fenced block says what the block is. What stands in it is YAML:

    <!-- file: mine.yaml -->                   the block is a file that later commands read
    <!-- run: {cost: cheap} -->                its lines `$ ...` are run, what they print is written below them
    <!-- run: {cost: long, show: REGEX} -->    only `make docs` runs it; of its lines those that match are shown
    <!-- output -->                            what the python block before it printed
    <!-- output: {cost: long, command: ...} -->   what a command prints that the page names elsewhere

`at: top` runs it in the repository, not in the scratch folder; `reads: configs/x.yaml` names a configuration that the
command does not.

A long block carries a hash of what its output depends on: its commands, the page's files, the configurations that it
names, and every default of the configuration's types. `--check` says when that hash is no longer the present one. All
commands run in one empty folder, in the order of `PAGES`; `configs`, `launcher` and `tools` are linked into it. A cheap
command prints the same at any time: what tells a time, or trains, is long.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from megabus.command import Parser, run
from megabus.config.schema import RunConfig
from megabus.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("quickstart", "rates", "grow_your_model", "growth_derivations", "estimate", "cluster")
    ),
    *(f"docs/{name}.md" for name in ("commands", "preflight", "parity")),
)
READ_QUICKSTART = ("docs/rates.md", "docs/grow_your_model.md")
NEEDS = dict.fromkeys(READ_QUICKSTART, "docs/quickstart.md")  # a page, and the one whose commands make what it reads
LINKED = ("configs", "launcher", "tools")
FENCE = re.compile(r"^<!-- ((?:run|file|output)\b.*?) -->\n```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MACHINE = re.compile(r"(?<=^<!-- machine -->\n).*$", re.MULTILINE)
WIDTH = 200  # of a line that is shown: longer ones are cut


class Block(NamedTuple):
    """A marked block of a page. start, stop: where it stands in the page's text, its comment and fences included."""

    kind: str  # run, file or output
    says: dict[str, Any]
    language: str
    body: str
    start: int
    stop: int

    @property
    def long(self) -> bool:
        return self.says.get("cost") == "long"

    @property
    def commands(self) -> list[str]:
        """Its commands, each on one line."""
        joined = re.sub(r" *\\\n\s*", " ", self.body)
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def blocks_of(text: str, page: str) -> list[Block]:
    """The marked blocks of a page, in order. UserError where a comment is not understood."""
    found = []
    for match in FENCE.finditer(text):
        try:
            says = yaml.safe_load(match[1] if ":" in match[1] else f"{match[1]}: {{}}")
        except yaml.YAMLError as error:
            raise UserError(page, match[1], f"is no YAML ({error})", "see tools/make_docs.py") from None
        (kind,) = says
        given = {"name": says[kind]} if kind == "file" else dict(says[kind])
        unknown = set(given) - {"cost", "show", "command", "at", "reads", "inputs", "name"}
        if unknown or (kind == "run" and given.get("cost") not in ("cheap", "long")):
            raise UserError(page, match[1], "is not understood", "give run: {cost: cheap or long, show: REGEX}")
        found.append(Block(kind, given, match[2], match[3], match.start(), match.end()))
    marks = len(re.findall(r"^<!-- (?:run|file|output)\b", text, re.MULTILINE))
    if marks != len(found):
        raise UserError(page, f"{marks} comments", f"only {len(found)} stand right before a fenced block", "mend these")
    return found


def inputs_of(block: Block, blocks: Sequence[Block], root: Path = ROOT) -> str:
    """A hash of what a long block's output depends on."""
    files = [other.body for other in blocks if other.kind == "file"]
    asked = [*(block.commands or [block.body]), block.says.get("command", "")]
    if block.kind == "output":
        asked = [block.says["command"]]
    named = sorted(set(re.findall(r"configs/\w+\.yaml", " ".join([*asked, block.says.get("reads", "")]))))
    shipped = [(root / name).read_text() for name in named]
    text = json.dumps([asked, block.says.get("show"), files, shipped, _defaults(RunConfig)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _defaults(config: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The default of every key of every section's type."""
    schema = config.model_json_schema()
    sections = {"": schema, **schema.get("$defs", {})}
    return {
        name: {key: field.get("default") for key, field in section.get("properties", {}).items()}
        for name, section in sections.items()
    }


class Scratch:
    """The folder that commands run in, and what they see of the machine: CPUs only, this Python first in PATH."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder = folder
        for name in LINKED:
            if (root / name).exists():
                (folder / name).symlink_to(root / name)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "COLUMNS": str(WIDTH)}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "VENV": str(Path(sys.prefix))}

    def run(self, command: Sequence[str] | str, page: str, at: Path | None = None) -> str:
        """What a command prints on stdout; its folder reads $PWD, other temporary ones `...`. UserError if it fails."""
        where = at or self.folder
        done = subprocess.run(
            command, shell=isinstance(command, str), cwd=where, env=self.environment, text=True, capture_output=True
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            name = command if isinstance(command, str) else "its python block"
            raise UserError(
                page, name, f"ended with {done.returncode}: {said[-1][:300]}", "mend the page, or the command"
            )
        text = done.stdout.replace(str(where), "$PWD")
        text = re.sub(rf"{re.escape(str(Path(sys.executable).parent))}/(python)?[\d.]*", r"\1", text)  # python3.11 too
        return re.sub(rf"{tempfile.gettempdir()}/[\w.-]+", "...", text)

    def printed(self, block: Block, page: str) -> str:
        """A block's body as it should be."""
        if block.kind == "output":
            at = ROOT if block.says.get("at") == "top" else None
            return shown(self.run(block.says["command"], page, at), block.says.get("show"))
        if block.language == "python":
            return shown(self.run([sys.executable, "-c", block.body], page), block.says.get("show"))
        lines = re.split(r"(?<!\\)\n", block.body)
        asked = [line for line in lines if line.startswith("$ ")]
        results = [shown(self.run(one, page), block.says.get("show")) for one in block.commands]
        return "".join(f"{line}\n{result}" for line, result in zip(asked, results, strict=True))


def shown(output: str, pattern: str | None) -> str:
    """The lines that match, the others as one `...`; all of them without a pattern. Long lines are cut."""
    kept: list[str] = []
    for line in output.replace("\r", "\n").strip("\n").splitlines():
        if pattern is None or re.search(pattern, line):
            kept.append(line.rstrip() if len(line) <= WIDTH else line[: WIDTH - 3].rstrip() + "...")
        elif kept[-1:] != ["..."]:
            kept.append("...")
    return "".join(f"{line}\n" for line in kept)


def made(text: str, page: str, scratch: Scratch, cheap_only: bool) -> str:
    """The page with its blocks' output as it is now. cheap_only: leave long blocks as they are."""
    blocks, parts, at = blocks_of(text, page), [], 0
    printed = None  # by the python block before
    for block in blocks:
        comment, body = text[block.start :].split("\n", 1)[0], block.body
        if block.kind == "file":
            (scratch.folder / block.says["name"]).write_text(block.body)
        elif block.kind == "output" and not block.says:
            body, printed = (body if printed is None else printed), None
        elif not (block.long and cheap_only):
            print(f"{page}: {'; '.join(block.commands) or block.says.get('command') or 'python'}", flush=True)
            fresh = scratch.printed(block, page)
            if block.language == "python":
                printed = fresh
            else:
                body = fresh
            if block.long:
                says = block.says | {"inputs": inputs_of(block, blocks)}
                comment = f"<!-- {_flow({block.kind: says})} -->"
        parts += [text[at : block.start], f"{comment}\n```{block.language}\n{body}```"]
        at = block.stop
    return "".join([*parts, text[at:]])


def _flow(says: dict[str, Any]) -> str:
    """YAML on one line, as it stands in a comment."""
    return yaml.safe_dump(says, default_flow_style=None, width=10**6, allow_unicode=True).strip()


def stale(text: str, page: str, scratch: Scratch) -> list[str]:
    """What of a page is no longer what its commands print, a line each."""
    blocks = blocks_of(text, page)
    old = []
    for block in blocks:
        if block.long and block.says.get("inputs") != inputs_of(block, blocks):
            name = (block.commands or [block.says.get("command", "python")])[0]
            old.append(f"{page}: the output of `{name}` is of another command, file or default")
    fresh = made(text, page, scratch, cheap_only=True)
    changed = difflib.unified_diff(text.splitlines(), fresh.splitlines(), page, "what is printed now", "", "", 1, "")
    return old + list(changed)


def machine() -> str:
    """The line that says where and when a page's transcripts were made."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) or ["unknown"]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parts = f"Python {platform.python_version()}, torch {version('torch')}, DeepSpeed {version('deepspeed')}"
    return f"*Transcripts made by `make docs` on {today}: {os.cpu_count()} cores, {names[0].strip()}; {parts}.*"


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="pages, such as docs/rates.md or rates; all when left out")
    parser.add_argument("--check", action="store_true", help="write nothing, run the cheap commands, exit 1 if stale")
    args = parser.parse_args()
    chosen = [page for page in PAGES if not args.pages or {page, Path(page).stem} & {*args.pages}]
    if unknown := {*args.pages} - {*PAGES} - {Path(page).stem for page in PAGES}:
        raise UserError("pages", ", ".join(unknown), "has no transcripts", f"choose from {', '.join(PAGES)}")
    if shutil.which("megabus", path=str(Path(sys.executable).parent)) is None:
        raise UserError("megabus", sys.executable, "is not installed there", "pip install -e . (make does it)")
    last = max(PAGES.index(page) for page in chosen)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        for page in PAGES[: last + 1]:
            file = ROOT / page
            text = file.read_text()
            if args.check:
                found += stale(text, page, scratch) if page in chosen else []
            elif page in chosen or page in {NEEDS.get(other) for other in chosen}:
                fresh = made(text, page, scratch, cheap_only=False)
                if page in chosen and fresh != text:
                    file.write_text(MACHINE.sub(lambda _: machine(), fresh))
    if found:
        print("\n".join(found), "\nrun make docs", sep="\n", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(run(main))
