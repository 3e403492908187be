"""Bundles taken when an engine is found stalled, before anybody kills it.

Bounded in number and size, on the state directory; numbers, names and the engine's own metrics page: never a prompt, an image
or a header of a user.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Final

from sidecar.facts import DiagnosisSummary
from sidecar.ledger import Hold
from sidecar.snapshot import Snapshot
from sidecar.statefile import StateDir

FOLDER: Final = "diagnoses"
KEPT: Final = 10
MAX_PAGE: Final = 512 * 1024  # characters of the engine's metrics page
MAX_REQUESTS: Final = 200
_ID = re.compile(r"\d{8}T\d{6}-[a-z_]{1,40}")


def bundle(snapshot: Snapshot, holds: list[Hold], page: str | None) -> dict[str, Any]:
    """What a bundle says."""
    verdict = snapshot.verdict
    return {
        "at": snapshot.at_wall,
        "verdict": verdict.state,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "evidence": dict(verdict.evidence),
        "engine_kind": snapshot.engine_kind,
        "engine": dataclasses.asdict(snapshot.engine),
        "gpus": dataclasses.asdict(snapshot.gpus),
        "relays": [dataclasses.asdict(relay) for relay in snapshot.relays],
        "own_lag": snapshot.own_lag,
        "load": dataclasses.asdict(snapshot.load),
        "outstanding": [_shape(hold, snapshot.at) for hold in holds[:MAX_REQUESTS]],
        "outstanding_left_out": max(0, len(holds) - MAX_REQUESTS),
        "changes": [
            {"state": c.state, "reason": c.reason, "detail": c.detail, "at": c.since_wall} for c in snapshot.changes
        ],
        "engine_metrics": page[:MAX_PAGE] if page else None,
    }


class Diagnoses:
    """The bundles of a state directory. `take` and `read` touch the disk: call them off the event loop."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._folder = state.path / FOLDER
        self._kept = [s for path in sorted(self._folder.glob("*.json")) if (s := _summary(path)) is not None]

    def summaries(self) -> tuple[DiagnosisSummary, ...]:
        """Newest first."""
        return tuple(reversed(self._kept))

    def take(self, content: dict[str, Any], id: str) -> DiagnosisSummary:
        """Write one bundle; the oldest past KEPT go. Raises OSError."""
        size = self._state.replace(f"{FOLDER}/{id}.json", content)
        summary = DiagnosisSummary(id, content["at"], content["reason"], size)
        self._kept.append(summary)
        for old in self._kept[:-KEPT]:
            (self._folder / f"{old.id}.json").unlink(missing_ok=True)
        self._kept = self._kept[-KEPT:]
        return summary

    def read(self, id: str) -> bytes | None:
        """One bundle; None where there is none of that id."""
        if not _ID.fullmatch(id):
            return None
        try:
            return (self._folder / f"{id}.json").read_bytes()
        except FileNotFoundError:
            return None


def _shape(hold: Hold, now: float) -> dict[str, Any]:
    """An outstanding request in numbers."""
    a = hold.admitted
    return {
        "route": a.route,
        "stream": a.stream,
        "age": round(now - a.at, 3),
        "expected": dataclasses.asdict(a.expected),
        "mu": a.mu,
        "first_token": hold.first_at is not None,
        "delivered_tokens": hold.delivered,
        "silent_for": round(now - hold.last_at, 3),
    }


def _summary(path: Path) -> DiagnosisSummary | None:
    """Read a bundle that an earlier run left."""
    try:
        raw = json.loads(path.read_bytes())
        return DiagnosisSummary(path.stem, float(raw["at"]), str(raw["reason"]), path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return None
