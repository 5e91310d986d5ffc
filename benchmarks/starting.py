"""How long a run takes from its command to its first step, anew and resumed, and how much of that are imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare
from benchmarks.growth_stall import demo_case, run_config, write_tokens
from megabus.train.task_runs import without_launcher

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
QUICK = 0.5  # seconds that a help text or a refusal may take
START, IMPORTS = 8.0, 5.0  # seconds that it may take until a step is made, and those of them that imports may take
IMPORT = "import megabus.engine.startup as s; s.preparewithout_launcher(); s.import_deepspeed()"


def starts(rounds: int, small: bool) -> list[Comparison]:
    """The demo's model on 4 ranks of this machine. Imports: of torch and DeepSpeed alone, in as many processes."""
    ranks, rounds = 1 if small else RANKS, min(rounds, 3)
    found: dict[str, list[float]] = {"imports": [], "anew": [], "resumed": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            found["imports"].append(_imports(ranks))
            config = _config(Path(folder), ranks)
            found["anew"].append(_first_step(config, ranks, 0))
            found["resumed"].append(_first_step(config, ranks, _steps(config)))
    timings = {name: Timing(seconds, 0) for name, seconds in found.items()}
    bars = {seconds: Timing([seconds] * rounds, 0) for seconds in (START, IMPORTS)}
    what = f"from command to first step, demo, {ranks} ranks"
    commands = {
        "megabus --help": ["--help"],
        "megabus train --help": ["train", "--help"],
        "a refused configuration": ["train", "--config", "configs/demo.yaml", "modle=1"],
    }
    half = Timing([QUICK] * rounds, 0)
    return [
        *(
            compare("from command to its end", name, f"{QUICK:g} s", _seconds_of(words, rounds), half, "<= 1")
            for name, words in commands.items()
        ),
        compare(what, "a new run", f"{START:g} s", timings["anew"], bars[START], "<= 1"),
        compare(what, "a resumed run", f"{START:g} s", timings["resumed"], bars[START], "<= 1"),
        compare(what, "imports of torch and DeepSpeed", f"{IMPORTS:g} s", timings["imports"], bars[IMPORTS], "<= 1"),
        compare(what, "a new run", "imports of torch and DeepSpeed", timings["anew"], timings["imports"]),
    ]


def _seconds_of(words: list[str], rounds: int) -> Timing:
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "megabus", *words],
            cwd=ROOT,
            capture_output=True,
            check=False,
            env=without_launcher(),
        )
        seconds.append(time.perf_counter() - begun)
    return Timing(seconds, 0)


def _config(folder: Path, ranks: int) -> dict[str, Any]:
    case = demo_case()
    if ranks != RANKS:
        case["layout"] = {"tp": 1, "pp": 1}
    write_tokens(folder / "tokens", case["model"]["vocab_size"])
    config = run_config(folder, "run", case, 10_000)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return config


def _imports(ranks: int) -> float:
    begun = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, "-c", IMPORT], cwd=ROOT, env=without_launcher()) for _ in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("torch and DeepSpeed cannot be imported")
    return time.perf_counter() - begun


def _first_step(config: dict[str, Any], ranks: int, after: int) -> float:
    """Seconds from the command to the first step beyond `after`; then the run is told to stop, which saves it."""
    path = Path(config["run_dir"]).with_suffix(".yaml")
    command = [sys.executable, "-m", "megabus", "train", "--nproc-per-node", str(ranks), "--config", str(path)]
    with path.with_suffix(".log").open("w") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=without_launcher() | {"DS_ACCELERATOR": "cpu"}
        )
        while process.poll() is None and _steps(config) <= after:
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        made = process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait()
    if not made:
        raise RuntimeError(f"{path} failed:\n{path.with_suffix('.log').read_text()[-2000:]}")
    return seconds


def _steps(config: dict[str, Any]) -> int:
    """The last step that the run's metrics tell of."""
    metrics = Path(config["run_dir"]) / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    rows = [json.loads(line) for line in lines if '"step"' in line]
    return max((row["step"] for row in rows if row["event"] == "step"), default=0)
