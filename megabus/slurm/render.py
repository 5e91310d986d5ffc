"""The job script, filled in: every value is quoted for whoever reads it, bash or sbatch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megabus.errors import UserError

TEMPLATE = Path(__file__).with_name("job.sh")
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?|(?P<parts>\d+(?::\d+){0,2}))")


@dataclass(frozen=True)
class Member:
    """One run of the job: its directory, and the overrides that it alone has."""

    run_dir: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """All that the script depends on. Paths are absolute, but for a `run_dir`, which is relative to `directory`.

    options: sbatch's options that the user has given, such as {"time": "24:00:00"}; extra: such options as they are
    written (`--exclusive`). grace: seconds before the time limit at which the run is told to save. at_once: most
    members that run at the same time.
    """

    name: str
    directory: Path
    logs: Path
    python: str
    launcher: str
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    cpus_per_node: int
    arguments: tuple[str, ...]
    members: tuple[Member, ...]
    is_array: bool
    grace: int
    requeue: bool
    max_restarts: int
    options: Mapping[str, str]
    extra: tuple[str, ...] = ()
    at_once: int | None = None
    setup: tuple[str, ...] = ()


def render(job: Job) -> str:
    """The bash script to give to sbatch. Raises `UserError` for what cannot be written into one."""
    values = {
        "directives": "\n".join(f"#SBATCH {_directive(option)}" for option in _options(job)),
        "directory": shlex.quote(str(job.directory)),
        "launcher": job.launcher,
        "python": shlex.quote(job.python),
        "ranks_per_node": str(job.ranks_per_node),
        "cpus_per_node": str(job.cpus_per_node),
        "arguments": shlex.join(job.arguments),
        "members": "\n".join(_case(number, member) for number, member in enumerate(job.members)),
        "requeue": str(int(job.requeue)),
        "max_restarts": str(job.max_restarts),
        "logs": shlex.quote(str(job.logs)),
        "setup": "\n".join([*(["export DS_ACCELERATOR=cpu"] if job.gpus_per_node == 0 else []), *job.setup]),
    }
    return fill(TEMPLATE.read_text(encoding="utf-8"), values)


def fill(template: str, values: Mapping[str, str]) -> str:
    """`@{name}` replaced by its value. Raises KeyError for a name without one, ValueError for a value without place."""
    names = set(re.findall(r"@\{(\w+)\}", template))
    if unused := values.keys() - names:
        raise ValueError(f"the template has no place for {sorted(unused)}")
    return re.sub(r"@\{(\w+)\}", lambda found: values[found[1]], template)


def seconds(time: str) -> int:
    """Of one of slurm's forms: minutes, m:s, h:m:s, days-h, days-h:m, days-h:m:s."""
    found = TIME.fullmatch(time)
    if found is None:
        raise UserError("--time", time, "is no time limit", "write minutes, hours:minutes:seconds or days-hours")
    if found["days"]:
        days, hours, minutes, rest = (int(found[name] or 0) for name in ("days", "dh", "dm", "ds"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    parts = [int(part) for part in found["parts"].split(":")]
    if len(parts) < 3:  # without hours: minutes, and perhaps seconds
        parts = [0, *parts, 0][:3]
    return (parts[0] * 60 + parts[1]) * 60 + parts[2]


def _options(job: Job) -> list[str]:
    if "\\" in str(job.logs):
        raise UserError("run_dir", job.logs.parent, "has a backslash, which slurm takes for its own", "rename it")
    logs = str(job.logs).replace("%", "%%")
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_node}",
        *([f"--gres=gpu:{job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--output={logs}/{'%A_%a' if job.is_array else '%j'}.log",
        "--open-mode=append",
        f"--signal=B:USR1@{job.grace}",
        "--requeue" if job.requeue else "--no-requeue",
    ]
    if job.is_array:
        limit = f"%{job.at_once}" if job.at_once else ""
        options.append(f"--array=0-{len(job.members) - 1}{limit}")
    return [*options, *(f"--{name}={value}" for name, value in job.options.items()), *job.extra]


def _directive(option: str) -> str:
    """As sbatch reads a #SBATCH line: a backslash escapes, also in quotes; white space and # end an option."""
    if not option.isprintable():
        raise UserError("sbatch option", repr(option), "has a line break or a control character", "leave it out")
    if re.fullmatch(r"[\w@%+=:,./-]+", option, flags=re.ASCII):
        return option
    return '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'


def _case(number: int, member: Member) -> str:
    # Overrides are read as YAML, which JSON's strings are: not every path is plain in it.
    overrides = [*member.overrides, f"run_dir={json.dumps(member.run_dir, ensure_ascii=False)}"]
    return f"{number}) run_dir={shlex.quote(member.run_dir)}; arguments+=({shlex.join(overrides)}) ;;"
