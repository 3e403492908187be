"""A journal next to the output file, one JSON line per measurement, from which an interrupted calibration resumes.

The first line is what a measurement depends on, the second the plan, each further one a measurement. A truncated line
is ignored. A journal of another engine, model or setting is started again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

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


# Why the search ended: the engine was full, or the time was up, no more are opened, or the engine refuses more.
SearchEnd = Literal["full", "time", "limit", "refused"]


@dataclass(frozen=True, slots=True)
class GridPlan:
    """The plan before the grid: tokens of the longest shapes, open requests, the steps of the search.

    `decode`: steps with more and more requests that mostly generate and share the reading of the weights.
    """

    length: int
    concurrency: int
    steps: tuple[SearchStep, ...]
    decode: tuple[SearchStep, ...] = ()
    ended: SearchEnd = "full"


@dataclass(frozen=True, slots=True)
class CheckpointEntry(Measured):
    """One measurement of a shape, its duration in seconds, and the share in which the engine waited for a core."""

    shape: GridShape
    turn: int
    seconds: float
    waited: float = 0.0


Done = dict[tuple[GridShape, int], CheckpointEntry]  # by shape and turn


class Checkpoint:
    """The journal of one calibration. `identity`: what it depends on; `plan` and `done`: what an earlier run left."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.plan: GridPlan | None = None
        self.done: Done = {}
        self._path = out.with_name(out.name + ".partial")
        with contextlib.suppress(OSError, ValueError):
            text = self._path.read_text()
            if msgspec.json.decode(text.partition("\n")[0]) == identity:
                self.plan, self.done = read(text)
        if self.plan is None:
            self._write(msgspec.json.encode(identity), "wb")
        else:
            self._write(b"")  # ends a line that was cut off

    def begin(self, plan: GridPlan) -> None:
        """Write the plan."""
        self._write(msgspec.json.encode(plan))

    def add(self, entry: CheckpointEntry) -> None:
        """Write one measurement."""
        self.done[entry.shape, entry.turn] = entry
        self._write(msgspec.json.encode(entry))

    def close(self, kept: Path | None = None) -> None:
        """Remove the journal once the output is written; copy it to `kept` first."""
        if kept is not None:
            kept.write_text(self._path.read_text())
        self._path.unlink(missing_ok=True)

    def _write(self, line: bytes, mode: Literal["ab", "wb"] = "ab") -> None:
        with self._path.open(mode) as file:
            file.write(line + b"\n")


def read(text: str) -> tuple[GridPlan, Done]:
    """The plan and the measurements of a file. Raises ValueError if it has no plan."""
    _, plan, *lines = text.splitlines()
    done: Done = {}
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):
            entry = msgspec.json.decode(line, type=CheckpointEntry)
            done[entry.shape, entry.turn] = entry
    return msgspec.json.decode(plan, type=GridPlan), done
