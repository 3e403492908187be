"""`sidecar calibrate` against a real engine on this machine's CPU: the accuracy of its coefficients on held-out shapes.

    python benchmarks/calibration.py [--kind text|vision] [--seconds N] [--write]    (environment: `make test-vllm`)
    python benchmarks/calibration.py --engine URL --kind llamacpp-text --name "llama.cpp b10434, SmolLM2 135M" ...

The first form starts vLLM with a tiny model of random weights, 8192 tokens of context, the prefix cache on and
reported; its worker runs in the core's process, as on one GPU; the CPU's default, a separate worker, polls and occupies
a core. The second form measures an engine that runs. `--write` puts the output of calibrate, and a plot of predicted
against measured costs of the held-out shapes, into benchmarks/results/. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import log10
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sidecar.load import cost_model
from sidecar.tools.calibrate import fit, hardware
from sidecar.tools.calibrate.checkpoint import read
from sidecar.tools.calibrate.fit import FitRow, Measured
from tests.vllm import environment, processes

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--max-model-len",
    "8192",
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
    "--distributed-executor-backend",
    "uni",
)
ENVIRON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # without this, vLLM refuses "uni" on a CPU
RESULTS = Path(__file__).parent / "results"
SIDE, EDGE = 420, 60  # of the plot, pixels


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", default="text", help="text or vision; with --engine, what the files are called")
    parser.add_argument("--engine", default="", help="URL of an engine that runs; none: a vLLM is started")
    parser.add_argument("--name", default="", help="what that engine and its model are")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    if not chosen.engine and not environment.complete():
        print("the real vLLM is not installed: `make test-vllm` makes its environment (12 GB of disk)")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began, busy = time.monotonic(), [os.getloadavg()[0]]
        if chosen.engine:
            said = calibrate(chosen.engine, chosen.seconds, folder)
        else:
            said = calibrate_vllm(chosen.kind, chosen.seconds, folder)
        took = time.monotonic() - began
        busy.append(os.getloadavg()[0])
        rows = measured(folder / "all.jsonl")
        co = cost_model.from_json((folder / "co.json").read_text())
    name = chosen.name or f"vLLM {environment.VERSION}, tiny {chosen.kind} model"
    title = f"{name}, {hardware.text('http://localhost', (0, ''))}"
    command = f"benchmarks/calibration.py --kind {chosen.kind} --seconds {chosen.seconds:g}"
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    load = f"load average {busy[0]:.1f} before, {busy[1]:.1f} after"
    text = f"# Calibration: {title}\n\n`{command}`, {today}; {took:.0f} s in all; {load}.\n\n```\n{said}```\n"
    print(text)
    if chosen.write:
        stem = RESULTS / f"calibration-{chosen.kind}-{today}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".svg").write_text(plot(rows, co, title))


def calibrate_vllm(kind: str, seconds: float, folder: Path) -> str:
    """Run `sidecar calibrate` against a new vLLM."""
    model = folder / "model"
    make = [str(environment.python()), str(ROOT / "tests/vllm/tiny_models.py"), kind, str(model)]
    subprocess.run(make, check=True, env=os.environ | processes.ENGINE_ENV, timeout=120)
    with processes.engine(model, folder / "engine.log", environ=ENVIRON, more=FLAGS) as engine:
        return calibrate(engine.url, seconds, folder, "--model", str(model))


def calibrate(url: str, seconds: float, folder: Path, *more: str) -> str:
    """Run `sidecar calibrate`. Returns its output; its files are in `folder`."""
    command = [
        *(sys.executable, "-m", "sidecar", "calibrate", "--engine", url, "--seconds", str(seconds), *more),
        *("--out", str(folder / "co.json"), "--measurements", str(folder / "all.jsonl")),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.rpartition("written: ")[0]


def measured(path: Path) -> list[FitRow]:
    """The shapes in a file of measurements, each over all turns."""
    _, done = read(path.read_text())
    return fit.merge_turns((entry.shape, entry) for entry in done.values())


def plot(rows: Sequence[FitRow], co: cost_model.Coefficients, title: str) -> str:
    """An SVG of measured (x) against predicted (y) costs of held-out shapes: dots; crosses for an alpha-beta line."""
    held = [row for row in rows if row.shape.held_out]
    line = fit.fit_line([row for row in rows if not row.shape.held_out])
    low, high = min(m.ms for m in held) / 2, max(m.ms for m in held) * 2

    def at(ms: float) -> float:
        return SIDE * log10(ms / low) / log10(high / low)

    def inside(ms: float) -> float:
        return at(min(max(ms, low), high))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE + 2 * EDGE + 20}" height="{SIDE + 2 * EDGE}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{EDGE}" y="20" font-weight="bold">{escape(title)}</text>',
        f'<text x="{EDGE}" y="36" fill="#555">held-out shapes: dots the cost model, crosses an alpha-beta line '
        "(outside: on the edge); band 25 %</text>",
        f'<clipPath id="frame"><path d="M0 0H{SIDE}V{SIDE}H0Z"/></clipPath>',
        f'<g transform="translate({EDGE},{EDGE + SIDE}) scale(1,-1)">',
        f'<polygon points="{_band(at, low, high)}" fill="#1b6ca8" fill-opacity="0.12" clip-path="url(#frame)"/>',
        f'<path d="M0 0H{SIDE}V{SIDE}H0ZL{SIDE} {SIDE}" fill="none" stroke="#999"/>',
    ]
    for m in held:
        x, y = at(m.ms), inside(_on(line, m))
        parts.append(f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m-8 0l8 -8" stroke="#888" fill="none"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{inside(fit.predicted_ms(m, co)):.1f}" r="4" fill="#1b6ca8"/>')
    parts.append("</g>")
    for ms in (d * 10**n for n in range(-1, 6) for d in (1, 2, 5) if low <= d * 10**n <= high):
        parts.append(f'<text x="{EDGE + at(ms):.0f}" y="{EDGE + SIDE + 16}" text-anchor="middle">{ms:g}</text>')
        parts.append(f'<text x="{EDGE - 6}" y="{EDGE + SIDE - at(ms) + 4:.0f}" text-anchor="end">{ms:g}</text>')
    parts.append(f'<text x="{EDGE + SIDE}" y="{EDGE + SIDE + 34}" text-anchor="end" fill="#555">measured ms</text>')
    return "\n".join([*parts, "</svg>", ""])


def _band(at: Callable[[float], float], low: float, high: float) -> str:
    corners = [(low, low * 1.25), (high, high * 1.25), (high, high * 0.75), (low, low * 0.75)]
    return " ".join(f"{at(x):.1f},{at(y):.1f}" for x, y in corners)


def _on(line: Sequence[float], m: Measured) -> float:
    return line[0] + line[1] * (m.work.uncached + m.work.cached) + line[2] * m.work.output


if __name__ == "__main__":
    main()
