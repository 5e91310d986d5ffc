"""The documents: no placeholder, no dead link, no file, flag, key or message that is not there."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from megabus.cli import COMMANDS, OF_RANKS
from megabus.command import NPROC
from megabus.config import load_config, resolve_stages
from megabus.errors import UserError
from megabus.nli.settings import Settings
from tools import site_hooks

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "launcher", "tools", "configs", "benchmarks", "megabus", "tests")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
PROGRAMS = {  # the words that call a program: the file that reads its arguments
    **{f"megabus {name}": ROOT / f"megabus/cli/{name.replace('-', '_')}.py" for name in COMMANDS},
    **{f"tools/{name}.py": ROOT / f"megabus/cli/{name}.py" for name in ("convert", "evaluate_nli", "preprocess")},
    **{f"launcher/{name}.py": ROOT / f"megabus/cli/{name}.py" for name in ("submit", "train")},
    **{f"tools/{name}.py": ROOT / f"tools/{name}.py" for name in ("config_reference", "demo_text")},
}
MESSAGES = ROOT / "docs/troubleshooting.md"


def dead_links(document: Path, text: str) -> list[str]:
    """Relative links of a document that lead to no file, or to no heading of it."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (heading and heading not in headings(text if not path else target.read_text())):
            dead.append(link)
    return dead


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in found}


def named_files(text: str) -> set[str]:
    """Files of the repository that a text names by their path."""
    return set(re.findall(r"(?<![\w/.-])((?:configs|tools|launcher|docs|tests)/[\w/]+\.(?:yaml|py|md))", text))


@functools.cache
def flags_of(name: str) -> set[str]:
    """Every flag that a program takes, read from its source: --help would import torch."""
    program = PROGRAMS[name]
    found = {"-h", "--help", *(NPROC if program.stem.replace("_", "-") in OF_RANKS else ())}
    if program.stem == "evaluate_nli":  # its parser is made of these
        found |= {f"--{field.replace('_', '-')}" for field in Settings.model_fields}
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = {arg.value for arg in node.args if isinstance(arg, ast.Constant) and str(arg.value).startswith("-")}
            negatable = any("BooleanOptionalAction" in ast.unparse(keyword.value) for keyword in node.keywords)
            found |= names | ({name.replace("--", "--no-", 1) for name in names} if negatable else set())
    return found


def wrong_flags(text: str) -> list[str]:
    """Flags that a text gives to a program of ours which does not take them."""
    wrong = []
    for line in commands(text):
        words = shlex.split(line, comments=True)
        for at, word in enumerate(words):
            name = " ".join(words[at : at + 2]) if word == "megabus" else word
            if name in PROGRAMS:
                given = [w.partition("=")[0] for w in words[at + 1 :] if re.match(r"--?[a-z]", w)]
                wrong += [f"{name} {flag}" for flag in given if flag not in flags_of(name)]
                break
            if at == 0 and re.fullmatch("megabus [a-z][a-z-]*", name):
                wrong.append(name)
    return wrong


def commands(text: str) -> list[str]:
    """Code of one line that calls a program of ours: of shell sessions and of spans."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    sessions = [code for language, code in fenced.findall(joined) if language in ("", "console", "bash", "sh")]
    lines = [line for session in sessions for line in session.splitlines()]
    lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or not line.startswith("megabus ")]
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", fenced.sub("", joined))
    ours = re.compile(r"python|deepspeed|torchrun|tools/|launcher/|megabus ")
    return [line for line in [*lines, *spans] if ours.match(line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_files_and_flags_are_there(document):
    text = document.read_text()
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", text)
    assert dead_links(document, text) == []
    assert [name for name in named_files(text) if not (ROOT / name).exists()] == []
    assert wrong_flags(text) == []


def test_what_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A heading: `x.y`\n")
    text = "[a](other.md) [b](other.md#a-heading-xy) [c](#here) [d](gone.md) [e](other.md#gone) [f](#there)\n# Here\n"
    page.write_text(text)
    assert dead_links(page, text) == ["gone.md", "other.md#gone", "#there"]
    assert named_files("see `configs/gone.yaml`, other/configs/x.yaml, and tools/convert.py.") == {
        "configs/gone.yaml",
        "tools/convert.py",
    }
    text = "```console\n$ megabus plot a --x flops \\\n      --gone 3   # --not-this\n```\n"
    assert wrong_flags(text) == ["megabus plot --gone"]
    assert wrong_flags("`megabus polt a`") == ["megabus polt"]
    assert wrong_flags("`torchrun --nproc-per-node 2 launcher/train.py --config a --lost`") == [
        "launcher/train.py --lost"
    ]
    assert wrong_flags("`python tools/preprocess.py a --no-append-eod --out b --valid-fraction=0.1`") == []


def test_every_program_has_its_flags_read():
    """So that no flag passes because a program's were not found."""
    assert len(commands((ROOT / "docs/commands.md").read_text())) > 10
    assert {"--x", "--out", "--log-x"} <= flags_of("megabus plot")
    assert {"--config", "--nproc-per-node"} <= flags_of("launcher/train.py") == flags_of("megabus train")


def test_every_page_stands_in_the_sites_navigation():
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(named) == sorted(pages | set(site_hooks.TOP.values()))


def test_links_lead_to_the_same_files_on_the_site_as_in_the_repository():
    text = (
        "[a](docs/growth.md#depth) [b](LICENSE) [c](CONTRIBUTING.md) [d](docs/demo.png) [e](https://x.y/z.md) [f](#g)"
    )
    there = "[a](growth.md#depth) [b](files/LICENSE) [c](CONTRIBUTING.md) [d](demo.png) [e](https://x.y/z.md) [f](#g)"
    assert site_hooks.rewritten(text, "README.md") == there
    text = "[a](../configs/demo.yaml) [b](../README.md) [c](growth.md)"
    assert site_hooks.rewritten(text, "docs/scale.md") == "[a](files/configs/demo.yaml) [b](index.md) [c](growth.md)"


def test_the_architecture_names_real_places():
    """Every `folder/file.py` in the text exists, and every folder of the package is in its table."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)", text))
    assert named
    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "megabus" / name).exists())]
    assert not missing
    folders = {path.name for path in (ROOT / "megabus").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(re.findall(r"^\| `(\w+)/`", text, re.MULTILINE))


def upward(folders: list[str], imports: dict[str, set[str]]) -> list[str]:
    """Imports from a folder that stands below the importing one in the table."""
    return [
        f"{folder} imports {other}"
        for at, folder in enumerate(folders)
        for other in sorted(imports[folder] & set(folders[at + 1 :]))
    ]


def imports_of(folder: str) -> set[str]:
    text = "\n".join(file.read_text() for file in (ROOT / "megabus" / folder).rglob("*.py"))
    return set(re.findall(r"^\s*(?:from|import) megabus\.(\w+)", text, re.MULTILINE)) - {folder}


def test_arrows_only_run_downwards():
    """No folder of the table imports one that stands below it, and what it is said not to know it does not."""
    rows = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE))
    folders, imports = list(rows), {name: imports_of(name) for name in rows}
    assert upward(folders, imports) == []
    assert [name for name, knows in rows.items() if knows == "–" and imports[name] & set(folders)] == []
    assert upward(folders, imports | {"model": {"kernels", "engine"}}) == ["model imports engine"]


def test_the_citation_is_whole():
    """What the form CFF 1.2.0 requires of a file and of its references."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert [reference["url"][-10:] for reference in citation["references"]] == ["2410.01131", "2409.12903"]
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:100]


# ---- whole files that a page tells to write ------------------------------------------------------------------


@pytest.mark.parametrize(("page", "world"), [("quickstart.md", 2), ("grow_your_model.md", 1)])
def test_the_guides_configurations_are_valid(page, world, tmp_path):
    """The YAML as it stands, and with the overrides of every command of the page that trains."""
    text = (ROOT / "docs" / page).read_text()
    ((name, block),) = re.findall(r"^<!-- file: (.*) -->\n```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    file = tmp_path / "config.yaml"
    file.write_text(block)
    assert len(resolve_stages(load_config(file), world)) == 2
    runs = [shlex.split(line) for line in commands(text) if line.startswith("megabus train") and name in line]
    for words in runs:
        ranks = int(words[words.index("--nproc-per-node") + 1])
        assert (
            len(resolve_stages(load_config(file, [word for word in words if re.match(r"\w[\w.]*=", word)]), ranks)) == 2
        )
    assert runs


def test_commands_that_train_a_file_of_ours_are_accepted():
    """With their overrides, in whatever document."""
    seen = 0
    for document in DOCUMENTS:
        for line in commands(document.read_text()):
            file = re.search(r"(?:launcher/train\.py|megabus train).* --config (configs/\S+)(.*)", line)
            if file is not None and "key=value" not in line:
                overrides = [word for word in shlex.split(file[2], comments=True) if "=" in word]
                config = load_config(ROOT / file[1], overrides)
                if ranks := re.search(r"--nproc-per-node (\d+)", line):
                    assert resolve_stages(config, int(ranks[1]))
                seen += 1
    assert seen >= 3


def test_the_llama_guide_speaks_of_one_model():
    """The sizes that it makes, imports, and grows to are the same wherever they stand."""
    text = (ROOT / "docs/grow_your_model.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (printed,) = re.findall(r"^(model:\n(?:  .*\n)+)left behind", text, re.MULTILINE)
    config = yaml.safe_load(block)
    assert yaml.safe_load(printed)["model"] == config["model"]
    (made,) = re.findall(r"LlamaConfig\((.*?)\)", text, re.DOTALL)
    (sizes,) = re.findall(r"config\.grown\((.*?)\)", text)
    names = {"vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "d_ff"} | {
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "head_dim",
    }
    given = dict(re.findall(r"(\w+)=(\d+)", made))
    assert {ours: int(given[theirs]) for theirs, ours in names.items()}.items() <= config["model"].items()
    assert {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", sizes)} == config["growth"]["stages"][0]


def test_the_guide_quotes_what_is_refused_from_the_file_alone():
    """Each row of its table: an override of configs/grow_smollm2.yaml, and what it is refused with."""
    text = (ROOT / "docs/grow_your_model.md").read_text()
    section = text.partition("## What is refused, and when")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+=.*?)` \| `(.*)` \|$", section, re.MULTILINE)
    assert len(rows) >= 6
    for override, told in rows:
        with pytest.raises(UserError) as caught:
            resolve_stages(load_config(ROOT / "configs/grow_smollm2.yaml", [override]), 2)
        assert str(caught.value).startswith(told)


# ---- messages that a page quotes -----------------------------------------------------------------------------


@functools.cache
def said() -> tuple[str, ...]:
    """Every text in the code: literals that Python puts together, with `...` where they are filled in."""
    texts = []
    for folder in ("megabus", "launcher", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    texts += [
                        "...".join(str(part.value) if isinstance(part, ast.Constant) else "" for part in node.values)
                    ]
    return tuple(" ".join(text.split()) for text in texts)


def not_said(message: str) -> list[str]:
    """Which of a message's problem and remedy no text in the code says: `...` stands for what is filled in."""
    wrong = []
    for half in message.split("; "):
        fixed = [re.escape(part.strip(" ():")) for part in half.split("...")]
        if not any(re.search(".*".join(fixed), text) for text in said()):
            wrong.append(half)
    return wrong


def test_quoted_messages_are_the_codes():
    rows = re.findall(r"^\| (.+?) \| .+ \| .* \|$", MESSAGES.read_text(), re.MULTILINE)
    quoted = [message for cell in rows for message in re.findall(r"`([^`]+)`", cell) if " " in message]
    assert len(quoted) > 50
    assert {message: wrong for message in quoted if (wrong := not_said(message))} == {}


def test_a_message_that_nobody_says_is_found():
    assert not_said("is in use by another run; wait for it, or choose another") == []
    assert not_said("is in use by another ship; wait for it, or choose another") == ["is in use by another ship"]
    assert not_said("no progress for ... s (faults.hang_timeout, less ... s to say so):") == []
    assert not_said("no progress for ... hours") == ["no progress for ... hours"]
    swapped = "... s (faults.hang_timeout, less no progress for"
    assert not_said(swapped) == [swapped]


def test_keys_in_the_troubleshooting_page_exist():
    """`section.key` in the first column of the configuration's tables."""
    reference = (ROOT / "docs/configuration.md").read_text()
    sections = dict(re.findall(r"^## `(.*?)`\n(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL))
    named = set(
        re.findall(
            r"`((?:train|growth|faults|checkpoint|eval|log|optimizer|model)(?:\.\w+)+)(?![\w*])", MESSAGES.read_text()
        )
    )
    assert len(named) > 20
    for key in named:
        section, _, name = key.rpartition(".")
        assert key in sections or f"| `{name}` |" in sections.get(section, ""), key
