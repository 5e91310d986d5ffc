"""Whether all ranks run the same software with the same configuration: what all that follows rests on."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import megabus
from megabus.config import RunConfig
from megabus.engine.startup import on_gpu
from megabus.errors import UserError
from megabus.parallel.topology import ranks_text
from megabus.preflight.findings import Finding, odd_ones, refused

PACKAGE = Path(megabus.__file__).parent
SHOWN = 100  # characters of a value; with it a rank's identity stays below 1 KB


@dataclass(frozen=True)
class Identity:
    """A rank's software and configuration, in less than 1 KB."""

    host: str
    versions: tuple[tuple[str, str], ...]
    code: str
    config: str
    difference: tuple[str, str, str] | None  # the first key that is another than on rank 0, its value here and there


def read_identity(config: RunConfig, host: str, of_rank_0: dict[str, Any]) -> Identity:
    """host: what this rank's machine is called; of_rank_0: the configuration that rank 0 has, as JSON has it."""
    mine = config.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    difference = next(_differences(of_rank_0, mine), None)
    return Identity(host, tuple(_versions().items()), code_digest(PACKAGE), digest, difference)


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "megabus": megabus.__version__,
    }
    if on_gpu():
        versions["CUDA"] = str(torch.version.cuda)
        if dist.is_nccl_available():
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def code_digest(package: Path) -> str:
    """Of the names and bytes of a package's Python files."""
    digest = hashlib.sha256()
    for name in sorted(glob("**/*.py", root_dir=package, recursive=True)):  # each rank does it at every start
        text = (package / name).read_bytes()
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, value here, value there) of every leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in there | here:
            yield from _differences(there.get(name), here.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, pair in enumerate(zip(there, here, strict=True)):
            yield from _differences(*pair, f"{key}.{number}")
    elif there != here:
        yield key, str(here)[:SHOWN], str(there)[:SHOWN]


def pinned(package: str) -> str | None:
    """The version that requirements.txt, or the metadata of the installed megabus, asks for."""
    file = PACKAGE.parent / "requirements.txt"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
    else:
        try:
            lines = metadata.requires("megabus") or []
        except metadata.PackageNotFoundError:
            lines = []
    found = (re.match(rf"{re.escape(package)}\s*==\s*([^\s;,]+)", line) for line in lines)
    return next((match[1] for match in found if match), None)


def identity_rows(ranks: Sequence[Identity]) -> list[Finding]:
    hosts = {identity.host for identity in ranks}
    here = Finding("ranks", f"{len(ranks)} on {len(hosts)} machine(s)")
    return [here, _versions_row(ranks), _code_row(ranks), _config_row(ranks)]


def _versions_row(ranks: Sequence[Identity]) -> Finding:
    common, odd = odd_ones([identity.versions for identity in ranks])
    if odd:
        usual, first = dict(common), dict(ranks[odd[0]].versions)
        name = next(name for name in usual | first if usual.get(name) != first.get(name))
        alike = [rank for rank in odd if dict(ranks[rank].versions).get(name) == first.get(name)]
        problem = f"on {ranks_text(alike)} is not the {usual.get(name)} of the other ranks"
        remedy = "install the same requirements.txt on every machine"
        return refused("versions", UserError(name, first.get(name), problem, remedy))
    versions, pin = dict(common), pinned("deepspeed")
    if pin is not None and versions["deepspeed"].partition("+")[0] != pin:
        problem = f"is not the {pin} that requirements.txt pins: megabus uses DeepSpeed down to its fragments"
        return refused("versions", UserError("deepspeed", versions["deepspeed"], problem, f"install {pin}"))
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("versions", text + (" (as pinned)" if pin else " (deepspeed's pin was not found)"))


def _code_row(ranks: Sequence[Identity]) -> Finding:
    common, odd = odd_ones([identity.code for identity in ranks])
    if odd:
        other = ranks[odd[0]]
        problem = f"on {ranks_text(odd)} ({other.host}) is not the {common[:12]} of the other ranks"
        remedy = "put the same files on every machine"
        return refused("code", UserError("megabus's files", other.code[:12], problem, remedy))
    return Finding("code", f"megabus's files have the same SHA-256 everywhere, {common[:12]}...")


def _config_row(ranks: Sequence[Identity]) -> Finding:
    common, odd = odd_ones([identity.config for identity in ranks])
    if not odd:
        return Finding("configuration", f"the same everywhere, SHA-256 {common[:12]}...")
    remedy = "give all ranks the same file and the same overrides"
    if 0 in odd:  # the others were compared with it
        key, usual, value = next(i.difference for i in ranks if i.config == common and i.difference is not None)
    else:
        key, value, usual = ranks[odd[0]].difference or ("configuration", ranks[odd[0]].config[:12], common[:12])
    alike = [rank for rank in odd if ranks[rank].config == ranks[odd[0]].config]
    problem = f"on {ranks_text(alike)} is {usual} on most ranks"
    return refused("configuration", UserError(key, value, problem, remedy))
