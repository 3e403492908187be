"""Pure: what outlives the sidecar's own process, as JSON, and whether a file of it may be believed.

Rules: a memory belongs to one boot of one machine (its times are monotonic), one engine address and one set of coefficients, and is
forgotten after an hour. What was learned of silences, and the kills, hold for every process of that engine, as they do while the sidecar
watches a restart; what was true of one process (a token served, its canaries) holds only where the same process still listens.
Whatever is not exactly as it should be makes the whole file worthless: nothing is guessed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final, TypeVar, get_args, get_origin

import msgspec

from sidecar.health.monitor import SavedHealth
from sidecar.load.drift import DriftState

STATE_VERSION: Final = 3
MAX_STATE_AGE_S: Final = 3600.0  # seconds; an older memory says too little of now

T = TypeVar("T")


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
class SavedState(SavedHealth):
    """What is kept: the health of the engine, and how well the coefficients hold."""

    drift: DriftState


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
    except (TypeError, ValueError, OverflowError) as e:  # msgspec's ValidationError is a ValueError
        raise StateRejected(f"damaged ({e})") from None


def to_plain(value: Any) -> Any:
    """Records, tuples and deques as JSON values."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=_deque_to_list))


def from_plain(cls: type[T], raw: Any) -> T:
    """Inverse of to_plain. Raises ValueError unless `raw` has exactly the fields of `cls`, each of its type."""
    found = msgspec.convert(raw, cls, dec_hook=_deque_from_list)
    if to_plain(found) != raw:  # a field more or less, which msgspec would ignore or fill by its default
        raise ValueError("other fields")
    return found


def _deque_to_list(value: Any) -> Any:
    if isinstance(value, deque):
        return list(value)
    raise NotImplementedError


def _deque_from_list(hint: Any, raw: Any) -> Any:
    if get_origin(hint) is deque:
        return deque(msgspec.convert(raw, list[get_args(hint)[0]]))  # type: ignore[misc]  # the item's type, at run time
    raise NotImplementedError
