"""A journal next to the output file, one JSON line per measurement, from which an interrupted calibration resumes.

The first line is what a measurement depends on, the second the plan, each further one a measurement. A truncated line
is ignored. A journal of another engine, model or setting is started again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidecar.events import RequestSize
from sidecar.tools.calibrate.fit import Measured
from sidecar.tools.calibrate.shapes import GridShape


@dataclass(frozen=True, slots=True)
class SearchStep:
    """One step of the capacity search: open requests, their p95 in seconds, requests per second, their size."""

    open: int
    p95: float
    rate: float
    work: RequestSize


@dataclass(frozen=True, slots=True)
class GridPlan:
    """The plan before the grid: tokens of the longest shapes, open requests, the steps of the search.

    `decode`: steps with more and more requests that mostly generate and share the reading of the weights.
    """

    length: int
    concurrency: int
    steps: tuple[SearchStep, ...]
    decode: tuple[SearchStep, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One measurement, its duration in seconds, and the share in which the engine waited for a core."""

    measured: Measured
    seconds: float
    waited: float = 0.0


Done = dict[tuple[GridShape, int], CheckpointEntry]  # by shape and turn


class Checkpoint:
    """The journal of one calibration. `identity` is everything that a measurement depends on."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._path = out.with_name(out.name + ".partial")
        self._identity = identity

    def read(self) -> tuple[GridPlan | None, Done]:
        """The plan and the measurements of an earlier run."""
        try:
            first, *lines = list(_objects(self._path.read_text()))
            if first != self._identity:
                raise ValueError("another calibration")
            plan, done = read_plan(lines[0]) if lines else None, dict(map(read_entry, lines[1:]))
        except (OSError, ValueError, KeyError, TypeError):
            plan, done = None, {}
        if plan is None:
            self._write(json.dumps(self._identity), "w")
        else:
            self._write("", "a")  # ends a line that was cut off
        return plan, done

    def begin(self, plan: GridPlan) -> None:
        """Write the plan."""
        self._write(json.dumps(asdict(plan)), "a")

    def add(self, shape: GridShape, turn: int, entry: CheckpointEntry) -> None:
        """Write one measurement."""
        record = {"shape": asdict(shape), "turn": turn, "work": asdict(entry.measured.work), "ms": entry.measured.ms}
        self._write(json.dumps({**record, "seconds": round(entry.seconds, 3), "waited": round(entry.waited, 4)}), "a")

    def close(self, kept: Path | None = None) -> None:
        """Remove the journal once the output is written; copy it to `kept` first."""
        if kept is not None:
            kept.write_text(self._path.read_text())
        self._path.unlink(missing_ok=True)

    def _write(self, line: str, mode: str) -> None:
        with self._path.open(mode) as file:
            file.write(line + "\n")


def read(text: str) -> tuple[GridPlan, Done]:
    """Parse a complete file of measurements."""
    _, plan, *entries = _objects(text)
    return read_plan(plan), dict(map(read_entry, entries))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are complete."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def read_plan(raw: dict[str, Any]) -> GridPlan:
    """Parse the second line."""
    return GridPlan(raw["length"], raw["concurrency"], _steps(raw["steps"]), _steps(raw["decode"]))


def _steps(raw: list[dict[str, Any]]) -> tuple[SearchStep, ...]:
    return tuple(SearchStep(**step | {"work": RequestSize(**step["work"])}) for step in raw)


def read_entry(raw: dict[str, Any]) -> tuple[tuple[GridShape, int], CheckpointEntry]:
    """Parse a further line."""
    entry = CheckpointEntry(Measured(RequestSize(**raw["work"]), raw["ms"]), raw["seconds"], raw["waited"])
    return (GridShape(**raw["shape"]), raw["turn"]), entry
