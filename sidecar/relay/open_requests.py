"""Where requests are admitted, kept while they are open, and ended by the control process's orders.

Rules: Delivered is summed and sent at most every FLUSH seconds, by one timer for all streams, which runs only while something is
delivered. One more timer, for as long as requests are open, looks for clients that do not read.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterable
from typing import Final

from sidecar.events import Event, State, Trace
from sidecar.relay.admission import Admission
from sidecar.relay.client_io import CLIENT_STALL_S
from sidecar.relay.outcomes import ended, stalled

EVENT_FLUSH_INTERVAL_S: Final = 0.2  # seconds
STALL_CHECK_INTERVAL_S: Final = 0.5  # seconds between looks for writes that wait for their client
LOAD_REPORT_STALE_S: Final = (
    5.0  # seconds that a verdict holds, which is published every second; without control nobody is refused
)


class OpenRequests:
    """Where requests are admitted. `emit` takes facts; `verdict` is the last one that control published.

    `client_stall`: seconds that a client may read nothing.
    """

    def __init__(self, emit: Callable[[Event], None], client_stall: float = CLIENT_STALL_S) -> None:
        self.emit = emit
        self.verdict: State = "unknown"
        self.cutting = False  # whether open requests are being cut off by a drain that ran out of time
        self._judged_at = 0.0
        # ids are unique over relay processes and their restarts; a client's own request id need not be
        self._prefix = os.urandom(4).hex()
        self._counter = itertools.count(1)
        self._dirty: set[Admission] = set()
        self._open: dict[str, Admission] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._client_stall = client_stall
        self._loop = asyncio.get_running_loop()

    # --- orders ---

    def on_verdict(self, verdict: State, now: float) -> None:
        """Control published a verdict: one that gives the engine up ends what is with it."""
        before, self.verdict, self._judged_at = self.verdict, verdict, now
        if verdict == before:
            return
        if verdict in ("stalled", "dead"):
            for admission in self._open.values():
                admission.end(stalled())

    def end(self, ids: Iterable[str], code: str) -> None:
        """Control ends single requests; others of these ids are another relay's, or over."""
        for id in ids:
            if (admission := self._open.get(id)) is not None:
                admission.end(ended(code))

    def check(self, now: float) -> None:
        """Raises EngineStalled while the engine is given up. One that is gone is tried: it may be back before control knows."""
        if self.verdict == "stalled" and now - self._judged_at < LOAD_REPORT_STALE_S:
            raise stalled()

    # --- requests ---

    def new_id(self) -> str:
        """A request id that nobody else has."""
        return f"{self._prefix}-{next(self._counter):x}"

    def open(self, route: str, tenant: str, trace: Trace | None) -> Admission:
        """An admission, to be entered by `with`."""
        return Admission(self, self.new_id(), route, tenant, trace)

    def note(self, admission: Admission) -> None:
        """Remember that `admission` has deliveries to report."""
        self._dirty.add(admission)
        if self._timer is None:
            self._timer = self._loop.call_later(EVENT_FLUSH_INTERVAL_S, self._flush)

    def enter(self, admission: Admission) -> None:
        """`admission` is open from now on."""
        self._open[admission.id] = admission
        if self._looking is None:
            self._looking = self._loop.call_later(STALL_CHECK_INTERVAL_S, self._look)

    def forget(self, admission: Admission) -> None:
        """`admission` settles; its sums are in Settled."""
        self._dirty.discard(admission)
        self._open.pop(admission.id, None)

    def _look(self) -> None:
        now = time.monotonic()
        for admission in self._open.values():
            admission.check_stalled_write(now, self._client_stall)
        self._looking = self._loop.call_later(STALL_CHECK_INTERVAL_S, self._look) if self._open else None

    def _flush(self) -> None:
        self._timer = None
        now = time.monotonic()
        for admission in self._dirty:
            self.emit(admission.delivery(now))
        self._dirty.clear()
