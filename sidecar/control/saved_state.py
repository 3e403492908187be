"""Pure: the state that outlives the sidecar's own process, as JSON, and whether a file of it may be believed.

- Saved state belongs to one boot of one machine (its times are monotonic), one engine address and one set of
  coefficients. It expires after an hour.
- What was learned about silences, and the kills, hold for every process of that engine. What was true of one process (a
  token served, its canaries) holds only if the same process still listens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar, get_args

import msgspec

from sidecar.health.kill_policy import PRICE_MIN
from sidecar.health.latency_model import LatencyModel
from sidecar.health.monitor import SavedHealth
from sidecar.labels import OTHER
from sidecar.load.drift import DriftState

STATE_VERSION: Final = 4
MAX_STATE_AGE_S: Final = 3600.0

T = TypeVar("T")


class StateRejected(ValueError):
    """Saved state that must not be believed; the text is the reason, for the log."""


@dataclass(frozen=True, slots=True)
class StateOrigin:
    """What saved state belongs to."""

    boot: str
    engine: str
    coefficients: str
    listener: tuple[int, ...]  # inodes of the engine's listening sockets, which change with its process


@dataclass(frozen=True, slots=True)
class SavedState(SavedHealth):
    """The health of the engine, and how well the coefficients match."""

    drift: DriftState


def dump(saved: SavedState, now: float) -> dict[str, Any]:
    """Saved state as JSON values; `with_origin` adds what it belongs to."""
    return {"version": STATE_VERSION, "at": now, "kept": to_plain(saved)}


def with_origin(content: dict[str, Any], origin: StateOrigin) -> dict[str, Any]:
    """The content of the file."""
    return {**content, "place": to_plain(origin)}


def load(raw: Any, here: StateOrigin, now: float) -> tuple[SavedState, bool]:
    """The state in a file's content, and whether it is of the engine process that runs now. Raises StateRejected."""
    if not isinstance(raw, dict) or raw.get("version") not in (3, STATE_VERSION):
        raise StateRejected("it is of another version")
    try:
        origin, at = from_plain(StateOrigin, raw.get("place")), from_plain(float, raw.get("at"))
        saved = from_plain(SavedState, _upgraded(raw.get("kept")) if raw["version"] == 3 else raw.get("kept"))
    except (TypeError, ValueError, LookupError, OverflowError) as e:  # msgspec's ValidationError is a ValueError
        raise StateRejected(f"it is damaged ({e})") from None
    if origin.boot != here.boot:
        raise StateRejected("it is of an earlier boot of this machine")
    if (origin.engine, origin.coefficients) != (here.engine, here.coefficients):
        raise StateRejected("it is of another engine or other coefficients")
    if not 0 <= now - at <= MAX_STATE_AGE_S:
        raise StateRejected(f"it is {now - at:.0f} s old")
    return saved, bool(here.listener) and origin.listener == here.listener


def _upgraded(kept: Any) -> Any:
    """The content of a file of version 3 as that of version 4.

    It counted kills without their reasons, and knew nothing of routes, concurrency, starts, and canaries that pass.
    """
    learned = {**asdict(LatencyModel()), **kept["learned"]}
    learned |= {"answers": learned["first_tokens"], "fitted_at": -1}
    fleet = dict(kept["fleet"])
    total, restarted_at, useless = fleet.pop("kills_total"), fleet.pop("restarted_at"), fleet.pop("useless")
    del fleet["served_at"], fleet["counted"]
    new = {"kills": [[OTHER, total]] if total else [], "owed": PRICE_MIN * useless, "credited": 0}
    passes = bool(kept["canary_seconds"])
    return {
        **kept,
        "learned": to_plain(learned),
        "canaries_pass": passes,
        "fleet": {**fleet, **new, "restarted": restarted_at is not None},
    }


def to_plain(value: Any) -> Any:
    """Records, tuples and deques as JSON values."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=list))  # msgspec knows no deques


def from_plain(cls: type[T], raw: Any) -> T:
    """Inverse of to_plain. Raises ValueError unless `raw` has exactly the fields of `cls`, each of its type."""
    found = msgspec.convert(raw, cls, dec_hook=_deque_from_list)
    if to_plain(found) != raw:  # a field more or less, which msgspec would ignore or fill with its default
        raise ValueError("other fields")
    return found


def _deque_from_list(hint: Any, raw: Any) -> Any:
    return deque(msgspec.convert(raw, list[get_args(hint)[0]]))  # type: ignore[misc]  # the item's type, at run time
