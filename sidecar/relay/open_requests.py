"""The open requests of one relay process: what becomes of them is emitted as events, and control's commands end them.

Rules: an admission settles exactly once, however it ends. Delivered is summed and emitted at most every
EVENT_FLUSH_INTERVAL_S, by one timer for all streams, which runs only while something is delivered. A second timer runs
while requests are open, and looks for clients that do not read. Calls that are passed on unread are reported, too, but
not ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from sidecar.events import Event, FirstToken, RequestBlocked, State
from sidecar.load.estimator import Estimate
from sidecar.relay.admission import NO_ESTIMATE, Admission
from sidecar.relay.client_io import CLIENT_STALL_S
from sidecar.relay.outcomes import abort_error, cut, stalled
from sidecar.relay.unread_call import UnreadCall
from sidecar.runtime.limited_log import LimitedLog

EVENT_FLUSH_INTERVAL_S: Final = 0.2
STALL_CHECK_INTERVAL_S: Final = 0.5
# A verdict is published every second; an older one refuses no request, as when control is gone.
LOAD_REPORT_STALE_S: Final = 5.0
# Unread calls that are reported at a time; control and the replay log keep each. While so many are open, later ones go
# unreported: it is known that there is possible work.
MAX_UNREAD: Final = 4096


class OpenRequests:
    """`emit` receives events; a client that reads nothing for `client_stall` seconds is disconnected."""

    def __init__(self, emit: Callable[[Event], None], client_stall: float = CLIENT_STALL_S) -> None:
        self.emit = emit
        self.verdict: State = "unknown"  # the last one that control published
        self.cutting = False  # a drain ran out of time and cuts off what is open
        self.log = LimitedLog(logging.getLogger(__name__))
        self._verdict_at = 0.0
        # ids are unique over relay processes and their restarts; a client's own request id need not be
        self._prefix = os.urandom(4).hex()
        self._counter = itertools.count(1)
        self._undelivered: set[Admission | UnreadCall] = set()
        self._open: dict[str, Admission] = {}
        self._unread: set[UnreadCall] = set()  # those that are reported
        self._flush_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._client_stall = client_stall
        self._loop = asyncio.get_running_loop()

    # --- commands ---

    def on_verdict(self, verdict: State, now: float) -> None:
        """Control published a verdict: one that gives the engine up aborts every open request."""
        before, self.verdict, self._verdict_at = self.verdict, verdict, now
        if verdict != before and verdict in ("stalled", "dead"):
            for admission in self._open.values():
                admission.abort(stalled())

    def abort(self, ids: Iterable[str], code: str) -> None:
        """Control ends single requests. Ids that are not open here are ignored: they are another relay's, or over."""
        for id in ids:
            if (admission := self._open.get(id)) is not None:
                admission.abort(abort_error(code))

    def cut(self) -> None:
        """A drain ran out of time: end every open request with an error that its client can read."""
        self.cutting = True
        for admission in self._open.values():
            admission.abort(cut())

    def check(self, now: float) -> None:
        """Raise EngineStalled while the engine is stalled. A dead one is still tried; it may have restarted already."""
        if self.verdict == "stalled" and now - self._verdict_at < LOAD_REPORT_STALE_S:
            raise stalled()

    # --- requests ---

    def new_id(self) -> str:
        """A unique request id."""
        return f"{self._prefix}-{next(self._counter):x}"

    def settling(self, admission: Admission) -> Settling:
        """Keep `admission`, whose id is from `new_id`, open for a block, and settle it at the end."""
        return Settling(self, admission)

    def open(self, admission: Admission) -> None:
        """Keep it open until it is settled."""
        self._open[admission.id] = admission
        self._watch_clients()

    def settle(self, admission: Admission, error: BaseException | None) -> None:
        """It has ended: with `error`, or by the engine's status."""
        if not admission.admitted:
            self.admit(admission, NO_ESTIMATE)
        self._undelivered.discard(admission)  # Settled has the sums
        del self._open[admission.id]
        if isinstance(error, asyncio.CancelledError) and self.cutting:
            error = cut()
        self.emit(admission.settle(error, self.verdict, time.monotonic()))

    def admit(self, admission: Admission, estimate: Estimate) -> None:
        """Hold `estimate` from now on."""
        self.emit(admission.admit(estimate, time.monotonic()))

    @contextmanager
    def queueing(self, admission: Admission) -> Iterator[None]:
        """Context for time spent in the sidecar's queue; excluded from engine silence."""
        began = time.monotonic()
        self.emit(RequestBlocked(admission.id, began, True))
        try:
            yield
        finally:
            now = time.monotonic()
            admission.queued_seconds += now - began
            self.emit(RequestBlocked(admission.id, now, False))

    def end_write(self, admission: Admission) -> None:
        """The client has taken a write."""
        admission.writing_since = None
        if admission.blocked:
            admission.blocked = False
            self.emit(RequestBlocked(admission.id, time.monotonic(), False))

    def deliver(self, admission: Admission, tokens: int, size: int, *, started: bool) -> None:
        """The engine sent `tokens` in `size` bytes. `started`: they show that generation has begun."""
        if started and admission.first_at is None:
            admission.first_at = time.monotonic()
            self.emit(FirstToken(admission.id, admission.first_at))
        admission.tokens += tokens
        admission.bytes += size
        admission.unreported_tokens += tokens
        admission.unreported_bytes += size
        # pings and comments of an event stream are no progress of the engine, and neither are errors
        if tokens or (size and admission.events is None and admission.status < 400):
            self._report_later(admission)

    # --- calls that are passed on unread ---

    @contextmanager
    def passing(self, path_class: str) -> Iterator[UnreadCall]:
        """A call that is with the engine for a block. `path_class`: of one that may be work; control learns of it."""
        call = UnreadCall(self.new_id(), path_class)
        if not path_class:
            yield call
            return
        if len(self._unread) >= MAX_UNREAD:  # it is counted, and nothing more
            try:
                yield call
            finally:
                self.emit(call.end(time.monotonic(), begun=False))
            return
        self._unread.add(call)
        self._watch_clients()
        self.emit(call.begin(time.monotonic()))
        try:
            yield call
        finally:
            self._unread.discard(call)
            self._undelivered.discard(call)
            self.emit(call.end(time.monotonic()))

    def receive(self, call: UnreadCall, piece: bytes) -> None:
        """The engine sent a piece of its answer to `call`."""
        if call.receive(piece, time.monotonic()) and call in self._unread:
            self._report_later(call)

    def resume(self, call: UnreadCall) -> None:
        """The client has sent or taken a piece."""
        if (resumed := call.resume(time.monotonic())) is not None:
            self.emit(resumed)

    def _report_later(self, source: Admission | UnreadCall) -> None:
        self._undelivered.add(source)
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(EVENT_FLUSH_INTERVAL_S, self._flush)

    def _watch_clients(self) -> None:
        if self._stall_timer is None and (self._open or self._unread):
            self._stall_timer = self._loop.call_later(STALL_CHECK_INTERVAL_S, self._check_clients)

    def _check_clients(self) -> None:
        now = time.monotonic()
        for admission in self._open.values():
            if (blocked := admission.check_stalled_write(now, self._client_stall)) is not None:
                self.emit(blocked)
        for call in self._unread:
            if (blocked := call.check_client(now)) is not None:
                self.emit(blocked)
        self._stall_timer = None
        self._watch_clients()

    def _flush(self) -> None:
        self._flush_timer = None
        now = time.monotonic()
        for source in self._undelivered:
            self.emit(source.report_delivered(now))
        self._undelivered.clear()


class Settling:
    """A block in which an admission is open."""

    __slots__ = ("_admission", "_requests")

    def __init__(self, requests: OpenRequests, admission: Admission) -> None:
        self._requests = requests
        self._admission = admission

    def __enter__(self) -> None:
        self._requests.open(self._admission)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._requests.settle(self._admission, error)
