"""Pure: what outlives the sidecar's own process, as JSON, and whether a file of it may be believed.

Rules: a memory belongs to one boot of one machine (its times are monotonic), one engine address and one set of coefficients, and is
forgotten after an hour. What was learned of silences, and the kills, hold for every process of that engine, as they do while the sidecar
watches a restart; what was true of one process (a token served, its canaries) holds only where the same process still listens.
Whatever is not exactly as it should be makes the whole file worthless: nothing is guessed.
"""

from __future__ import annotations

import math
import types
from collections import deque
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from sidecar.health import kill_policy as fleet
from sidecar.health.latency_model import LatencyModel
from sidecar.load import drift

STATE_VERSION: Final = 3
MAX_STATE_AGE_S: Final = 3600.0  # seconds; an older memory says too little of now
MAX_TEXT: Final = 200  # characters of a text
MAX_ITEMS: Final = 10_000  # of a list


class StateRejected(ValueError):
    """A memory that must not be believed; the text says why, for the log."""


@dataclass(frozen=True, slots=True)
class StateOrigin:
    """What a memory belongs to. `listener` are the inodes of the engine's listening sockets: they change with its process."""

    boot: str
    engine: str
    coefficients: str
    listener: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedState:
    """What is kept. `allowed` is the silence that was allowed last, seconds; `stalled`: it was suspect or stalled.

    `orders`: those that stop the engine on purpose, by code, and since when.
    """

    learned: LatencyModel
    canary_seconds: tuple[float, ...]
    served: bool
    rejected: int
    stalled: bool
    allowed: float
    orders: dict[str, float]
    fleet: fleet.KillState
    drift: drift.DriftState


def dump(kept: SavedState, now: float) -> dict[str, Any]:
    """JSON values of a memory; `signed` adds where it belongs to."""
    return {"version": STATE_VERSION, "at": now, "kept": to_plain(kept)}


def with_origin(content: dict[str, Any], place: StateOrigin) -> dict[str, Any]:
    """The content of the file."""
    return {**content, "place": to_plain(place)}


def load(raw: Any, here: StateOrigin, now: float) -> tuple[SavedState, bool]:
    """The memory in a file's content, and whether it is of the engine process that runs now. Raises Unfit."""
    if not isinstance(raw, dict) or raw.get("version") != STATE_VERSION:
        raise StateRejected("of another version")
    try:
        place, at = from_plain(StateOrigin, raw.get("place")), from_plain(float, raw.get("at"))
        if place.boot != here.boot:
            raise StateRejected("of an earlier boot of this machine")
        if (place.engine, place.coefficients) != (here.engine, here.coefficients):
            raise StateRejected("of another engine or other coefficients")
        if not 0 <= now - at <= MAX_STATE_AGE_S:
            raise StateRejected(f"{now - at:.0f} s old")
        return from_plain(SavedState, raw.get("kept")), bool(here.listener) and place.listener == here.listener
    except StateRejected:
        raise
    except (TypeError, ValueError, KeyError, OverflowError) as e:
        raise StateRejected(f"damaged ({e})") from None


def to_plain(value: Any) -> Any:
    """Frozen or mutable records, deques and tuples as JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list | deque):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    return value


def from_plain(hint: Any, raw: Any, like: Any = None) -> Any:
    """The inverse of `plain`, by type. `like` is a default value, from which a deque takes its bound. Raises TypeError, KeyError."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(hint, raw)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if raw is None else from_plain(next(a for a in args if a is not types.NoneType), raw, like)
    if origin is Literal and raw in args:
        return raw
    if origin in (tuple, list, deque) and isinstance(raw, list) and len(raw) <= MAX_ITEMS:
        items = [from_plain(hint, item) for hint, item in zip(_hints(origin, args, len(raw)), raw, strict=True)]
        return deque(items, like.maxlen if isinstance(like, deque) else MAX_ITEMS) if origin is deque else origin(items)
    if origin is dict and isinstance(raw, dict) and len(raw) <= MAX_ITEMS:
        return {from_plain(args[0], key): from_plain(args[1], item) for key, item in raw.items()}
    return _scalar(hint, raw)


def _record(cls: type, raw: Any) -> Any:
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    if not isinstance(raw, dict) or set(raw) != names:
        raise TypeError(f"{cls.__name__} has other fields")
    try:
        likes: Any = cls()
    except TypeError:  # a record without defaults
        likes = None
    return cls(**{name: from_plain(hints[name], raw[name], getattr(likes, name, None)) for name in names})


def _hints(origin: Any, args: tuple[Any, ...], count: int) -> list[Any]:
    """The type of each item; a tuple of fixed length has one per place."""
    if origin is tuple and not (len(args) == 2 and args[1] is ...):
        return list(args)
    return [args[0]] * count


def _scalar(hint: Any, raw: Any) -> Any:
    fits = {
        bool: isinstance(raw, bool),
        int: isinstance(raw, int) and not isinstance(raw, bool),
        float: isinstance(raw, int | float) and not isinstance(raw, bool) and math.isfinite(raw),
        str: isinstance(raw, str) and len(raw) <= MAX_TEXT,
    }
    if not fits.get(hint, False):
        raise TypeError(f"a value is no {getattr(hint, '__name__', 'known type')}")
    return float(raw) if hint is float else raw
