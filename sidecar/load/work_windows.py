"""Pure: what the engine did in each ten seconds: how long it was busy, and the work that was done meanwhile, by term of the cost model.

Rules:
- The engine is busy while any request is with it. A request's prompt is worked on in the seconds before its first token, its output
  evenly from there to its end; of an answer in one piece the cost model says where its first token was.
- A window is closed when nothing that began before its end still awaits its first token; one that waits too long for that, that we
  could not trust ourselves in, or in which a request failed or was kept waiting by its client, is thrown away.
- What other requests a step serves is seen as the mean number that decoded together: steps = tokens / that number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import AdmissionHold, Settlement

WINDOW_S: Final = 10.0  # of a window: many steps, and short against the minutes in which load changes
SLOT_S: Final = 0.02  # seconds; the resolution of being busy
LATE_EVENT_S: Final = 1.0  # seconds that facts may be under way
WINDOW_CLOSE_WAIT_S: Final = 60.0  # seconds that a window waits for first tokens
MIN_BUSY_SHARE: Final = 0.2  # share of a window; below, a slot's rounding and idle gaps between steps weigh too much
WINDOW_TERMS: Final = (*cost_model.TERMS[:3], "step", *cost_model.TERMS[3:])  # d apart: per step, and per token
STEP_INDEX: Final = WINDOW_TERMS.index("step")
TOKEN_INDEX: Final = STEP_INDEX + 1


@dataclass(frozen=True, slots=True)
class WorkWindow:
    """`ms` that the engine was busy; `work` is what each coefficient of WINDOW_TERMS is multiplied by; `together` decoded at once."""

    at: float
    ms: float
    work: tuple[float, ...]
    together: float


@dataclass(frozen=True, slots=True)
class _BusySpan:
    """One request with the engine: when it was sent, had its first token, ended; its work, by the coefficients' order."""

    sent: float
    first: float
    end: float
    work: tuple[float, ...]


@dataclass(slots=True)
class _OpenWindow:
    """A window in the making. The masks have one bit per slot."""

    busy: int = 0
    decoding: int = 0
    decode_seconds: float = 0.0
    work: list[float] = field(default_factory=lambda: [0.0] * len(cost_model.TERMS))
    spoiled: bool = False


class WorkWindows:
    """Windows of one engine, from its settlements. Bounded: a window for every ten seconds of WAIT."""

    def __init__(self, co: Coefficients, now: float) -> None:
        self._co = co
        self._next = int(now / WINDOW_S) + 1  # the window that is closed next; what came before is not seen whole
        self._open: dict[int, _OpenWindow] = {}

    def settled(self, settlement: Settlement) -> None:
        """A request ended."""
        ended = settlement.settled
        if ended.sent_at is None or ended.outcome == "rejected":
            return
        if settlement.slowed or ended.outcome in ("engine_error", "stalled", "lost"):
            self._spoil(ended.sent_at, ended.at)
            return
        cut = self._first_token_at(
            settlement.work, ended.sent_at, ended.first_at, ended.at, stream=settlement.admitted.stream
        )
        self._add(_BusySpan(ended.sent_at, cut, ended.at, cost_model.features(settlement.work, self._co)))

    def spoil(self, now: float) -> None:
        """What is seen now must not be believed."""
        self._spoil(now, now)

    def close(self, holds: Iterable[AdmissionHold], now: float) -> list[WorkWindow]:
        """The windows that are whole by now; `holds` are the requests still open."""
        due = int((now - LATE_EVENT_S) / WINDOW_S)
        if due <= self._next:
            return []
        waiting = list(holds)
        if due - self._next > 2 * WINDOW_CLOSE_WAIT_S / WINDOW_S:  # we slept
            self._next = due
        closed = []
        while self._next < due:
            end = (self._next + 1) * WINDOW_S
            late = [h for h in waiting if _is_awaited(h) and h.since < end]
            if late and now < end + WINDOW_CLOSE_WAIT_S:
                break
            window = self._open.pop(self._next, None) or _OpenWindow()
            if not late and not window.spoiled:
                closed += self._finish(window, waiting, self._next, now)
            self._next += 1
        self._open = {index: w for index, w in self._open.items() if index >= self._next}
        return closed

    def _finish(self, window: _OpenWindow, holds: list[AdmissionHold], index: int, now: float) -> list[WorkWindow]:
        for hold in holds:
            if hold.first_at is None:
                continue
            if hold.blocked or hold.slowed:
                return []
            expected = hold.admitted.expected
            work = cost_model.features(replace(expected, output=hold.delivered), self._co)
            self._add_overlap(
                window, index, _BusySpan(hold.admitted.at, hold.first_at, max(hold.last_at, hold.first_at), work)
            )
        busy = window.busy.bit_count() * SLOT_S
        if busy < MIN_BUSY_SHARE * WINDOW_S:
            return []
        together = max(1.0, window.decode_seconds / (window.decoding.bit_count() * SLOT_S or 1.0))
        x = window.work
        steps = x[cost_model.TERMS.index("d")] / together
        return [WorkWindow((index + 1) * WINDOW_S, busy * 1000, (*x[:STEP_INDEX], steps, *x[STEP_INDEX:]), together)]

    def _first_token_at(
        self, work: RequestSize, sent: float, first: float | None, end: float, *, stream: bool
    ) -> float:
        """When the prompt was done."""
        if stream and first is not None:
            return first
        priced = cost_model.terms(work, self._co)
        return sent + (end - sent) * (priced.before_first_token / priced.total if priced.total else 0.0)

    def _add(self, span: _BusySpan) -> None:
        for index in range(max(self._next, int(span.sent / WINDOW_S)), int(span.end / WINDOW_S) + 1):
            self._add_overlap(self._open.setdefault(index, _OpenWindow()), index, span)

    def _add_overlap(self, window: _OpenWindow, index: int, span: _BusySpan) -> None:
        """What of a request lies in a window."""
        start = index * WINDOW_S
        window.busy |= _mask(span.sent - start, span.end - start)
        window.decoding |= _mask(span.first - start, span.end - start)
        window.decode_seconds += _overlap(span.first, span.end, start)
        began = max(span.sent, span.first - WINDOW_S)
        prefill = _share(began, span.first, start)
        decode = _share(span.first, span.end, start)
        for i, name in enumerate(cost_model.TERMS):
            window.work[i] += span.work[i] * (decode if name in ("d", "f") else prefill)

    def _spoil(self, began: float, ended: float) -> None:
        for index in range(max(self._next, int(began / WINDOW_S)), int(ended / WINDOW_S) + 1):
            self._open.setdefault(index, _OpenWindow()).spoiled = True


def _is_awaited(hold: AdmissionHold) -> bool:
    """Whether what the engine does for a request is not known yet. One that waits in our own queue has not begun."""
    return (hold.first_at is None or hold.whole > 0) and not hold.blocked


def _overlap(began: float, ended: float, start: float) -> float:
    return max(0.0, min(ended, start + WINDOW_S) - max(began, start))


def _share(began: float, ended: float, start: float) -> float:
    """The share of a time that lies in the window; of a moment, all or nothing."""
    if ended - began < 1e-6:
        return float(start <= ended < start + WINDOW_S)
    return _overlap(began, ended, start) / (ended - began)


def _mask(began: float, ended: float) -> int:
    """The slots that a time touches; seconds from the window's start."""
    low = max(0, int(began / SLOT_S))
    high = min(round(WINDOW_S / SLOT_S), int(ended / SLOT_S) + 1)
    return ((1 << (high - low)) - 1) << low if high > low and ended >= 0 else 0
