"""Every open figure of the GPU path in one call of eight minutes on a borrowed machine.

    python benchmarks/gpu_all.py --out DIR [--budget 430] [--only STAGE]

Each stage (gpu_stages.py) is a process of its own with a limit of its own, and adds JSON lines to DIR/results.jsonl as
it measures; one that fails or hangs does not stop the next. The last thing printed, and DIR/table.md, is one table: two
files in all. What needs a library that is not there (torch, torchvision's nvJPEG, compute-sanitizer) is left out, with
the reason. With tests/cuda_stub's folder in LD_LIBRARY_PATH all but the stand-ins for an engine runs without a GPU:
docs/gpu-day.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Seconds of each, in the order in which they tell most if time runs out.
STAGES = {
    "versions": 10,
    "bits": 50,
    "kernel": 35,
    "jpeg": 30,
    "nvml": 65,
    "service": 80,
    "interference": 70,
    "nvjpeg": 30,
    "memory": 15,
    "ceilings": 10,
    "sanitizer": 35,
}
RESULTS = "results.jsonl"


def run_stage(name: str, folder: Path, seconds: float, *more: str) -> tuple[str, list[dict[str, Any]]]:
    """How a stage ended, and its lines."""
    path = folder / RESULTS
    before = path.stat().st_size if path.exists() else 0
    command = [sys.executable, "-W", "ignore", str(HERE / "gpu_stages.py"), name, "--out", str(path)]
    command += ["--seconds", f"{0.8 * seconds:.0f}", *more]
    # A group of its own: a stage that is cut off leaves no process that disturbs the next.
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        _, errors = child.communicate(timeout=seconds)
        last = (errors.strip().splitlines() or ["no message"])[-1]
        outcome = "ok" if child.returncode == 0 else f"failed: {last[:200]}"
    except subprocess.TimeoutExpired:
        outcome = f"cut off after {seconds:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    lines: list[str] = []
    if path.exists():
        with path.open("rb") as file:
            file.seek(before)
            lines = file.read().decode("utf-8", "replace").splitlines()
    return outcome, [json.loads(line) for line in lines if line.endswith("}")]


def table(results: dict[str, tuple[str, list[dict[str, Any]]]]) -> str:
    """All lines of all stages as Markdown."""
    rows = ["| stage | what | value |", "|---|---|---|"]
    for name, (outcome, lines) in results.items():
        rows.append(f"| {name} | | {outcome} |")
        rows += [f"| | {line['what']} | {line['value']} |" for line in lines]
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for results; made if need be")
    parser.add_argument("--budget", type=float, default=430.0, help="seconds for all stages")
    parser.add_argument("--only", choices=STAGES, action="append", help="these stages only")
    parser.add_argument("--small", action="store_true", help="small images only, to try it without a GPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / RESULTS).unlink(missing_ok=True)
    until = time.monotonic() + chosen.budget
    results: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for name in chosen.only or STAGES:
        left = until - time.monotonic()
        if left < 5:
            results[name] = ("not begun: the budget is spent", [])
            continue
        results[name] = run_stage(name, chosen.out, min(STAGES[name], left), *["--small"] * chosen.small)
        print(f"{name}: {results[name][0]}", flush=True)
        (chosen.out / "table.md").write_text(table(results))
    print("\n" + table(results))
    return 0 if all(outcome == "ok" for outcome, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
