"""Bundles taken when an engine is found stalled, before it is killed.

- A bundle is written in steps, each whole: at once what is known already, then what the engine's processes were doing.
  So a kill in between loses little.
- Bundles are bounded in number and size. They are files of the state directory.
- They hold numbers, names, stacks without their values, and the engine's own metrics page; never a prompt, an image or
  a header of a user.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from sidecar.control.state_dir import StateDir
from sidecar.events import DiagnosisSummary
from sidecar.health.hang_classes import hang_class
from sidecar.load.ledger import AdmissionHold
from sidecar.readings import HangSigns, Reading, Value
from sidecar.runtime import safe_files
from sidecar.signals.process_examiner import ProcessExaminer
from sidecar.snapshot import Snapshot

FOLDER: Final = "diagnoses"
MAX_BUNDLES: Final = 10
MAX_BUNDLE_BYTES: Final = 2 << 20
MAX_PAGE_BYTES: Final = 512 * 1024
MAX_REQUESTS: Final = 200
_ID = re.compile(r"\d{8}T\d{6}-[a-z_]{1,40}")

_log = logging.getLogger(__name__)


async def diagnose(store: Diagnoses, examiner: ProcessExaminer, content: dict[str, Any], id: str) -> None:
    """Write what is known now, then examine the engine's processes and write what that adds. Never raises OSError."""
    taken: DiagnosisSummary | None = None

    async def keep(part: dict[str, Any]) -> None:
        nonlocal taken
        taken = await asyncio.to_thread(store.take, content | part, id)

    try:
        await keep({"complete": False})
        await examiner.examine(keep)
    except OSError as e:
        _log.error("cannot write the diagnosis (%s)", e.strerror)
    if taken is not None:
        _log.warning("diagnosis %s taken (%d bytes): %s", taken.id, taken.bytes, taken.summary)


def bundle(
    snapshot: Snapshot, holds: list[AdmissionHold], page: tuple[float, str] | None, signs: Reading[HangSigns]
) -> dict[str, Any]:
    """A bundle before the engine's processes were examined.

    `page`: (age in seconds, text) of the engine's last metrics page; `signs`: what its processes did meanwhile.
    """
    verdict = snapshot.verdict
    return {
        "at": snapshot.at_wall,
        "verdict": verdict.state,
        "reason": verdict.cause,
        "detail": verdict.detail,
        "summary": "",  # what the engine's processes did, once they were examined
        "complete": False,
        "processes": [],
        "evidence": dict(verdict.evidence),
        "hang": _hang(signs),
        "engine_kind": snapshot.engine_kind,
        "engine": dataclasses.asdict(snapshot.engine),
        "gpus": dataclasses.asdict(snapshot.gpus),
        "relays": [dataclasses.asdict(relay) for relay in snapshot.relays],
        "own_lag": snapshot.own_lag,
        "load": dataclasses.asdict(snapshot.load),
        "outstanding": [_outstanding(hold, snapshot.at) for hold in holds[:MAX_REQUESTS]],
        "outstanding_left_out": max(0, len(holds) - MAX_REQUESTS),
        "changes": [
            {"state": v.state, "reason": v.reason, "detail": v.detail, "at": v.since_wall} for v in snapshot.changes
        ],
        "engine_metrics_age": round(page[0], 3) if page else None,
        "engine_metrics": page[1][:MAX_PAGE_BYTES] if page else None,
    }


def _hang(signs: Reading[HangSigns]) -> dict[str, Any]:
    """Which hang it is, in words, and by which signs."""
    if not isinstance(signs, Value):
        return {"class": None, "text": "", "signs": dataclasses.asdict(signs)}
    found = hang_class(signs.value)
    return {"class": found.name or None, "text": found.text, "signs": dataclasses.asdict(signs.value)}


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
        """Write one bundle, or write it again; the oldest beyond MAX_BUNDLES are removed. Raises OSError."""
        size = self._state.replace(f"{FOLDER}/{id}.json", fitting(content))
        summary = DiagnosisSummary(id, content["at"], content["reason"], size, content["summary"])
        self._kept = [*(kept for kept in self._kept if kept.id != id), summary]
        for old in self._kept[:-MAX_BUNDLES]:
            (self._folder / f"{old.id}.json").unlink(missing_ok=True)
        self._kept = self._kept[-MAX_BUNDLES:]
        return summary

    def read(self, id: str) -> bytes | None:
        """One bundle; None without one of that id."""
        if not _ID.fullmatch(id):
            return None
        try:
            return safe_files.read(self._folder / f"{id}.json", MAX_BUNDLE_BYTES)
        except (OSError, ValueError):
            return None


def fitting(content: dict[str, Any]) -> dict[str, Any]:
    """The bundle within MAX_BUNDLE_BYTES: the engine's page is dropped first, then the stacks, and both say so."""
    left_out = {"failed": "left out: the bundle would be too large"}
    for part in ("engine_metrics", "processes"):
        if len(json.dumps(content)) <= MAX_BUNDLE_BYTES:
            break
        content = content | {part: left_out}
    return content


def _outstanding(hold: AdmissionHold, now: float) -> dict[str, Any]:
    """An outstanding request in numbers."""
    admitted = hold.admitted
    return {
        "route": admitted.route,
        "stream": admitted.stream,
        "age": round(now - admitted.at, 3),
        "expected": structs.asdict(admitted.expected),
        "mu": admitted.mu,
        "first_token": hold.first_at is not None,
        "delivered_tokens": hold.delivered,
        "silent_for": round(now - hold.last_at, 3),
    }


def _summary(path: Path) -> DiagnosisSummary | None:
    """Read a bundle that an earlier run left."""
    try:
        data = safe_files.read(path, MAX_BUNDLE_BYTES)
        raw = json.loads(data)
        return DiagnosisSummary(path.stem, float(raw["at"]), str(raw["reason"]), len(data), str(raw.get("summary", "")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
