"""Measurements as they come, one JSON line each beside the file that will be written: a calibration that was ended goes on there.

The first line is what a measurement depends on, the second the plan, each further one a measurement. A line that was cut off in
writing is left out; lines of another engine, model or setting are begun anew.
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
    """One step of the search for the capacity: requests open, their p95 in seconds, how many a second, and their size."""

    open: int
    p95: float
    rate: float
    work: RequestSize


@dataclass(frozen=True, slots=True)
class GridPlan:
    """What is decided before the grid: tokens of the longest shapes, requests open, the search that decided it.

    `decode`: requests that do little but generate, more and more of them open, which share the reading of the weights.
    """

    length: int
    concurrency: int
    steps: tuple[SearchStep, ...]
    decode: tuple[SearchStep, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One measurement, the seconds that it took, and the share of them in which the engine had no core."""

    measured: Measured
    seconds: float
    waited: float = 0.0


Done = dict[tuple[GridShape, int], CheckpointEntry]  # by shape and turn


class Checkpoint:
    """The journal of one calibration. `identity` is whatever a measurement depends on."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._path = out.with_name(out.name + ".partial")
        self._identity = identity

    def read(self) -> tuple[GridPlan | None, Done]:
        """What was decided and measured before."""
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
        """Keep the plan."""
        self._write(json.dumps(asdict(plan)), "a")

    def add(self, shape: GridShape, turn: int, entry: CheckpointEntry) -> None:
        """Keep one measurement."""
        record = {"shape": asdict(shape), "turn": turn, "work": asdict(entry.measured.work), "ms": entry.measured.ms}
        self._write(json.dumps({**record, "seconds": round(entry.seconds, 3), "waited": round(entry.waited, 4)}), "a")

    def close(self, kept: Path | None = None) -> None:
        """The file is written: the journal is not needed any more, unless it is to be `kept` somewhere."""
        if kept is not None:
            kept.write_text(self._path.read_text())
        self._path.unlink(missing_ok=True)

    def _write(self, line: str, mode: str) -> None:
        with self._path.open(mode) as file:
            file.write(line + "\n")


def read(text: str) -> tuple[GridPlan, Done]:
    """The text of a whole file of measurements."""
    _, plan, *entries = _objects(text)
    return read_plan(plan), dict(map(read_entry, entries))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The lines that were written whole."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def read_plan(raw: dict[str, Any]) -> GridPlan:
    """The second line."""
    return GridPlan(raw["length"], raw["concurrency"], _steps(raw["steps"]), _steps(raw["decode"]))


def _steps(raw: list[dict[str, Any]]) -> tuple[SearchStep, ...]:
    return tuple(SearchStep(**step | {"work": RequestSize(**step["work"])}) for step in raw)


def read_entry(raw: dict[str, Any]) -> tuple[tuple[GridShape, int], CheckpointEntry]:
    """A further line."""
    entry = CheckpointEntry(Measured(RequestSize(**raw["work"]), raw["ms"]), raw["seconds"], raw["waited"])
    return (GridShape(**raw["shape"]), raw["turn"]), entry
