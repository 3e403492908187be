"""Measurements as they come, one JSON line each beside the file that will be written: a calibration that was ended goes on there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sidecar.calibrate.fit import Measured
from sidecar.calibrate.shapes import Shape
from sidecar.facts import Work

Done = dict[tuple[Shape, int], Measured]  # by shape and pass


class Journal:
    """The journal of one plan. `identity` is whatever a measurement depends on: a journal of another plan is begun anew."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._path = out.with_name(out.name + ".partial")
        self._identity = identity

    def read(self) -> Done:
        """What was measured before."""
        try:
            first, *lines = self._path.read_text().splitlines()
            if json.loads(first) != self._identity:
                raise ValueError("another plan")
            return dict(_entry(line) for line in lines if line.endswith("}"))
        except (OSError, ValueError, KeyError, TypeError):
            self._path.write_text(json.dumps(self._identity) + "\n")
            return {}

    def add(self, shape: Shape, turn: int, measured: Measured) -> None:
        """Keep one measurement."""
        record = {"shape": asdict(shape), "turn": turn, "work": asdict(measured.work), "ms": measured.ms}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """The file is written: the journal is not needed any more."""
        self._path.unlink(missing_ok=True)


def _entry(line: str) -> tuple[tuple[Shape, int], Measured]:
    raw = json.loads(line)
    return (Shape(**raw["shape"]), raw["turn"]), Measured(Work(**raw["work"]), raw["ms"])
