"""What reading a request's body costs, by the body's shape: the compiled scan next to `json.loads` and memory itself.

    python benchmarks/scan.py [--mib 4] [--rounds 7] [--write]

Milliseconds of CPU, median of interleaved rounds. Per MiB: the scan alone; all that the relay does with a body before
it is priced (scan, options, images, shape); `json.loads`; and `bytes.find` of a byte that is not there, which is as
fast as memory can be read. At a time: how long the event loop is held by the longest body that is read at once, and by
one of 15 MiB, which a thread reads and the loop waits for only while that thread holds the GIL. The bodies are those of
tests/relay/attack_shapes.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sidecar.load import body_scan
from sidecar.load.request_shape import describe
from sidecar.relay import request_body
from sidecar.relay.body_thread import MAX_INLINE_BYTES
from tests.relay.attack_shapes import SHAPES

LONG_BYTES: Final = 15 << 20


def read(body: bytes) -> None:
    """What the relay does."""
    describe(request_body.parse(body).scan, "chat", len(body))


def cpu_ms(work: Callable[[bytes], object], body: bytes) -> float:
    """CPU milliseconds of this thread, per MiB."""
    began = time.thread_time()
    work(body)
    return 1e3 * (time.thread_time() - began) / (len(body) / (1 << 20))


def held_ms(body: bytes) -> float:
    """CPU milliseconds of this thread with the GIL, in which it reads a body."""
    module, released = body_scan._fused, 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal released
            began = time.thread_time()
            found = work(*args)
            released += (time.thread_time() - began) * (len(args[-1]) > MAX_INLINE_BYTES)
            return found

        return run

    body_scan._fused = SimpleNamespace(scan_body=timed(module.scan_body), unescape=timed(module.unescape))
    try:
        began = time.thread_time()
        read(body)
        return 1e3 * (time.thread_time() - began - released)
    finally:
        body_scan._fused = module


def measure(mib: int, rounds: int) -> dict[str, list[float]]:
    """One row per shape; all of them take turns in every round."""
    works = (body_scan.find, read, json.loads, lambda body: body.find(b"\0"))
    bodies = {name: make(mib << 20) for name, make in SHAPES.items()}
    taken: dict[str, list[list[float]]] = {name: [[] for _ in range(len(works) + 2)] for name in SHAPES}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name, body in bodies.items():
            for column, work in zip(taken[name], works, strict=False):
                column.append(cpu_ms(work, body))
            for column, size in zip(taken[name][len(works) :], (MAX_INLINE_BYTES, LONG_BYTES), strict=True):
                column.append(held_ms(SHAPES[name](size)))
    return {name: [statistics.median(column) for column in columns] for name, columns in taken.items()}


def report(rows: dict[str, list[float]], mib: int, rounds: int) -> str:
    lines = [
        f"# Reading bodies, {time.strftime('%Y-%m-%d')}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"`python benchmarks/scan.py --mib {mib} --rounds {rounds}`; load {os.getloadavg()[0]:.1f}.",
        "",
        "| body | ms per MiB: scan | all | `json.loads` | memory | loop held, ms: 64 KiB | 15 MiB |",
        "|---|---|---|---|---|---|---|",
        *(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for name, row in rows.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    chosen = parser.parse_args()
    text = report(measure(chosen.mib, chosen.rounds), chosen.mib, chosen.rounds)
    print(text)
    if chosen.write:
        folder = Path(__file__).parent / "results"
        (folder / f"scan-{time.strftime('%Y-%m-%d')}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
