"""What a GPU machine with PyTorch but without a network lacks for the check: wheels that travel with the repository.

python -m benchmarks.gpu_check.wheels collect build/gpu-check-wheels                          # make gpu-check-wheels
python -m benchmarks.gpu_check.wheels install build/gpu-check-wheels build/gpu-check-site     # part of make gpu-check

`collect` takes the versions of requirements.txt for Linux on x86-64 and the Python that is asked for. `install` takes
what is lacking or older, beside what is installed and without touching it. It needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What the check imports, and what that needs, without what torch brings.
BUILT = ("deepspeed",)  # there is no wheel of it: it is built, of Python alone
PACKAGES = (
    "annotated-types",
    "blake3",
    "einops",
    "hjson",
    "msgpack",
    "ninja",
    "numpy",
    "packaging",
    "psutil",
    "py-cpuinfo",
    "pydantic",
    "pydantic_core",
    "PyYAML",
    "safetensors",
    "tqdm",
    "typing-inspection",
    "typing_extensions",
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux_2_5", "manylinux1")
MOST = 60e6  # bytes of all wheels


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect", help="from pip's index")
    collect.add_argument("wheels", type=Path)
    collect.add_argument("--python", default="3.12", help="of the GPU machine (%(default)s)")
    install = commands.add_parser("install", help="what this machine lacks of them")
    install.add_argument("wheels", type=Path)
    install.add_argument("site", type=Path, help="folder for PYTHONPATH")
    install.add_argument("--dry-run", action="store_true", help="only say which")
    args = parser.parse_args()
    if args.command == "collect":
        return _collect(args.wheels, args.python)
    return _install(args.wheels, args.site, args.dry_run)


def _collect(wheels: Path, python: str) -> int:
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pinned = dict(_pins())
    versions = [f"{name}=={pinned[_plain(name)]}" for name in PACKAGES]
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    target += [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *target, "-d", str(wheels), *versions], check=True)
    built = [f"{name}=={pinned[_plain(name)]}" for name in BUILT]
    plain = os.environ | {"DS_BUILD_OPS": "0"}  # nothing of it is compiled
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", str(wheels), *built], check=True, env=plain)
    files = sorted(wheels.glob("*.whl"))
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} wheels, {size / 1e6:.1f} MB, in {wheels}")
    return int(size > MOST)


def _install(wheels: Path, site: Path, dry: bool) -> int:
    lacking = [file for file in sorted(wheels.glob("*.whl")) if _lacks(file)]
    print("lacking here: " + (", ".join(file.name.split("-")[0] for file in lacking) or "nothing"), flush=True)
    if not lacking or dry:
        return 0
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    where = ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    return subprocess.run([*pip, *where, *map(str, lacking)], check=False).returncode


def _lacks(wheel: Path) -> bool:
    name, wanted = wheel.name.split("-")[:2]
    try:
        return _numbers(version(name)) < _numbers(wanted)
    except PackageNotFoundError:
        return True


def _pins() -> list[tuple[str, str]]:
    """Of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pairs = (line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])
    return [(_plain(name), pinned) for name, pinned in pairs]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _numbers(text: str) -> list[int]:
    """The release of a version: 2.4.6 of 2.4.6.post1+cu130."""
    release = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        release.append(int(part))
    return release


if __name__ == "__main__":
    sys.exit(main())
