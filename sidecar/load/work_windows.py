"""Pure: for each ten seconds, how long the engine was busy, and the work it did, by term of the cost model.

Rules:
- The engine is busy while it has any request. The work of a prompt is done in the seconds before its first token, that
  of the output evenly from then to its end. Without a stream, the cost model estimates the time of the first token.
- A window is closed once no request that began before its end awaits its first token.
- A window is dropped if that takes too long, if the sidecar was unhealthy, or if a request failed or was blocked by its
  client.
- Steps are tokens over the mean number of requests that decoded together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec import structs

from sidecar.load import cost_model
from sidecar.load.api_routes import REALTIME
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import FAILED_OUTCOMES, AdmissionHold, Settlement

WINDOW_S: Final = 10.0  # many steps, and short compared to the minutes in which load changes
SLOT_S: Final = 0.005  # resolution of busy time
LATE_EVENT_S: Final = 1.0  # events may arrive this late
WINDOW_CLOSE_WAIT_S: Final = 60.0  # for first tokens
MIN_BUSY_SHARE: Final = 0.05  # below it, a window holds too little
FULL_BUSY_SHARE: Final = 0.2  # below it, single requests and idle gaps between steps weigh too much to fit coefficients
WINDOW_TERMS: Final = (*cost_model.TERMS[:3], "step", *cost_model.TERMS[3:])  # d is split: per step, and per token
STEP_INDEX: Final = WINDOW_TERMS.index("step")


@dataclass(frozen=True, slots=True)
class WorkWindow:
    """`ms` of busy time, the `work` (the factor of each of WINDOW_TERMS), and requests that decoded `together`."""

    at: float
    ms: float
    work: tuple[float, ...]
    together: float

    @property
    def is_full(self) -> bool:
        """Whether the engine was busy enough for coefficients to be compared with the window."""
        return self.ms >= FULL_BUSY_SHARE * WINDOW_S * 1000


@dataclass(slots=True)
class _OpenWindow:
    """An open window. The masks have one bit per slot."""

    busy: int = 0
    decoding: int = 0
    decode_seconds: float = 0.0
    work: list[float] = field(default_factory=lambda: [0.0] * len(cost_model.TERMS))
    spoiled: bool = False


class WorkWindows:
    """Windows of one engine, from its settlements. Only those of WINDOW_CLOSE_WAIT_S are open."""

    def __init__(self, co: Coefficients, now: float) -> None:
        self._co = co
        self._next = int(now / WINDOW_S) + 1  # the next window to close; earlier ones are incomplete
        self._open: dict[int, _OpenWindow] = {}

    def settled(self, settlement: Settlement) -> None:
        ended = settlement.settled
        if ended.sent_at is None or ended.outcome in ("rejected", "not_begun"):
            return
        if settlement.admitted.route == REALTIME.route:  # a session may be idle for hours
            return
        indices = range(max(self._next, int(ended.sent_at / WINDOW_S)), int(ended.at / WINDOW_S) + 1)
        windows = {index: self._open.setdefault(index, _OpenWindow()) for index in indices}
        if settlement.slowed or ended.outcome in FAILED_OUTCOMES:
            for window in windows.values():
                window.spoiled = True
            return
        work, first = cost_model.features(settlement.work, self._co), self._first_token_at(settlement, ended.sent_at)
        for index, window in windows.items():
            _add_overlap(window, index, ended.sent_at, first, ended.at, work)

    def spoil(self, now: float) -> None:
        """Drop the window of `now`."""
        if (index := int(now / WINDOW_S)) >= self._next:
            self._open.setdefault(index, _OpenWindow()).spoiled = True

    def close(self, holds: Iterable[AdmissionHold], now: float) -> list[WorkWindow]:
        """Close and return the windows complete by now; `holds` are the open requests."""
        due = int((now - LATE_EVENT_S) / WINDOW_S)
        if due <= self._next:
            return []
        waiting = list(holds)
        if due - self._next > 2 * WINDOW_CLOSE_WAIT_S / WINDOW_S:  # this process slept
            self._next = due
        closed = []
        while self._next < due:
            end = (self._next + 1) * WINDOW_S
            late = [h for h in waiting if _is_awaited(h) and h.since < end]
            if late and now < end + WINDOW_CLOSE_WAIT_S:
                break
            window = self._open.pop(self._next, None) or _OpenWindow()
            if not late and not window.spoiled:
                closed += self._finish(window, waiting, self._next)
            self._next += 1
        self._open = {index: w for index, w in self._open.items() if index >= self._next}
        return closed

    def _finish(self, window: _OpenWindow, holds: list[AdmissionHold], index: int) -> list[WorkWindow]:
        for hold in holds:
            if hold.first_at is None:
                continue
            if hold.blocked or hold.slowed:
                return []
            work = cost_model.features(structs.replace(hold.admitted.expected, output=hold.delivered), self._co)
            _add_overlap(window, index, hold.admitted.at, hold.first_at, max(hold.last_at, hold.first_at), work)
        busy = window.busy.bit_count() * SLOT_S
        if busy < MIN_BUSY_SHARE * WINDOW_S:
            return []
        together = max(1.0, window.decode_seconds / (window.decoding.bit_count() * SLOT_S or 1.0))
        x = window.work
        steps = x[cost_model.TERMS.index("d")] / together
        return [WorkWindow((index + 1) * WINDOW_S, busy * 1000, (*x[:STEP_INDEX], steps, *x[STEP_INDEX:]), together)]

    def _first_token_at(self, settlement: Settlement, sent: float) -> float:
        """When the prefill ended; estimated by the cost model if the answer was not streamed."""
        ended = settlement.settled
        if settlement.admitted.stream and ended.first_at is not None:
            return ended.first_at
        priced = cost_model.terms(settlement.work, self._co)
        return sent + (ended.at - sent) * (priced.before_first_token / priced.total if priced.total else 0.0)


def _add_overlap(window: _OpenWindow, index: int, sent: float, first: float, end: float, work: Sequence[float]) -> None:
    """Add the part of a request that falls into a window. `work`: of the whole request, in the order of TERMS."""
    start = index * WINDOW_S
    window.busy |= _mask(sent - start, end - start)
    window.decoding |= _mask(first - start, end - start)
    window.decode_seconds += _overlap(first, end, start)
    prefill, decode = _share(max(sent, first - WINDOW_S), first, start), _share(first, end, start)
    for i, name in enumerate(cost_model.TERMS):
        window.work[i] += work[i] * (decode if name in ("d", "f") else prefill)


def _is_awaited(hold: AdmissionHold) -> bool:
    """True if it is unknown what the engine does for a request; a blocked one has not begun."""
    return (hold.first_at is None or hold.whole > 0) and not hold.blocked


def _overlap(began: float, ended: float, start: float) -> float:
    return max(0.0, min(ended, start + WINDOW_S) - max(began, start))


def _share(began: float, ended: float, start: float) -> float:
    """The share of an interval that falls into the window; all or nothing if it is empty."""
    if ended - began < 1e-6:
        return float(start <= ended < start + WINDOW_S)
    return _overlap(began, ended, start) / (ended - began)


def _mask(began: float, ended: float) -> int:
    """The slots that an interval touches, in seconds from the window's start."""
    low = max(0, int(began / SLOT_S))
    high = min(round(WINDOW_S / SLOT_S), int(ended / SLOT_S) + 1)
    return ((1 << (high - low)) - 1) << low if high > low and ended >= 0 else 0
