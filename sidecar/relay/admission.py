"""Every admission is a `with`: it holds model units from `admit` on and settles exactly once, however it ends.

Rules: Admitted comes before the request's other facts, Settled after them; a request that ends before it was admitted (too
large, a bad image, the client left) is reported as both at once, so that it is counted. Delivered is summed and sent at most
every FLUSH seconds, by one timer for all streams, which runs only while something is delivered.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from sidecar.errors import EngineStalled, EngineUnreachable, RequestError, SidecarError
from sidecar.facts import Admitted, Delivered, Fact, FirstToken, Outcome, Settled, State, Trace, Usage, Work
from sidecar.relay.shapes import Shape

FLUSH: Final = 0.2  # seconds
NO_WORK: Final = Work(uncached=0)


class ClientGone(SidecarError):
    """The client hung up while we wrote to it."""

    code = "client_gone"


class EngineBroke(SidecarError):
    """The engine's answer ended before it was complete; part of it is with the client already."""

    code = "engine_broke"


class Cut(SidecarError):
    """We ended the request ourselves, because a drain ran out of time."""

    code = "drain_cut"


# How an exception settles a request; the first that fits. A request that ends without one is settled by its status.
_OUTCOMES: Final[tuple[tuple[type[BaseException], Outcome], ...]] = (
    (EngineUnreachable, "engine_error"),
    (EngineStalled, "stalled"),
    (EngineBroke, "engine_error"),
    (RequestError, "rejected"),
    (Cut, "lost"),
    (ClientGone, "client_cancelled"),
    (asyncio.CancelledError, "client_cancelled"),
    (Exception, "lost"),
)


class Desk:
    """Where requests are admitted. `emit` takes facts; `verdict` is the last one that control published."""

    def __init__(self, emit: Callable[[Fact], None]) -> None:
        self.emit = emit
        self.verdict: State = "unknown"
        self.cutting = False  # whether open requests are being cut off by a drain that ran out of time
        # ids are unique over relay processes and their restarts; a client's own request id need not be
        self._prefix = os.urandom(4).hex()
        self._counter = itertools.count(1)
        self._dirty: set[Admission] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

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
            self._timer = self._loop.call_later(FLUSH, self._flush)

    def forget(self, admission: Admission) -> None:
        """`admission` settles; its sums are in Settled."""
        self._dirty.discard(admission)

    def _flush(self) -> None:
        self._timer = None
        now = time.monotonic()
        for admission in self._dirty:
            self.emit(admission.delivery(now))
        self._dirty.clear()


class Admission:
    """One request from its arrival to its settlement."""

    __slots__ = (
        "_admitted",
        "_desk",
        "_pending_bytes",
        "_pending_tokens",
        "at",
        "bytes",
        "first_at",
        "id",
        "image_seconds",
        "mu",
        "read_at",
        "route",
        "sent_at",
        "shape",
        "status",
        "tenant",
        "tokens",
        "trace",
        "usage",
    )

    def __init__(self, desk: Desk, id: str, route: str, tenant: str, trace: Trace | None) -> None:
        self._desk = desk
        self._admitted = False
        self._pending_tokens = 0
        self._pending_bytes = 0
        self.id = id
        self.route = route
        self.tenant = tenant
        self.trace = trace
        self.at = time.monotonic()
        self.shape = Shape()
        self.read_at: float | None = None  # when the client's last byte was here
        self.sent_at: float | None = None
        self.first_at: float | None = None
        self.image_seconds = 0.0
        self.status = 0
        self.mu = 0.0
        self.tokens = 0
        self.bytes = 0
        self.usage: Usage | None = None

    def admit(self, shape: Shape, work: Work, mu: float) -> None:
        """Hold `mu` from now on."""
        self._admitted = True
        self.shape = shape
        self.mu = mu
        self._desk.emit(
            Admitted(
                id=self.id,
                at=time.monotonic(),
                tenant=self.tenant,
                model=shape.model,
                route=self.route,
                stream=shape.stream,
                expected=work,
                max_output=shape.max_output,
                mu=mu,
                trace=self.trace,
            )
        )

    def sent(self) -> None:
        """The request is with the engine."""
        self.sent_at = time.monotonic()

    def deliver(self, tokens: int, size: int, started: bool) -> None:
        """`tokens` and `size` bytes came from the engine; `started`: generation has begun."""
        if started and self.first_at is None:
            self.first_at = time.monotonic()
            self._desk.emit(FirstToken(self.id, self.first_at))
        self.tokens += tokens
        self.bytes += size
        self._pending_tokens += tokens
        self._pending_bytes += size
        if tokens:  # pings and comments are no progress of the engine
            self._desk.note(self)

    def delivery(self, now: float) -> Delivered:
        """What was delivered since the last call."""
        fact = Delivered(self.id, now, self._pending_tokens, self._pending_bytes)
        self._pending_tokens = self._pending_bytes = 0
        return fact

    @property
    def overhead(self) -> float:
        """Seconds of our own between the client's last byte and ours to the engine, image work excluded."""
        if self.read_at is None:
            return 0.0
        until = time.monotonic() if self.sent_at is None else self.sent_at
        return max(0.0, until - self.read_at - self.image_seconds)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._admitted:
            self.admit(self.shape, NO_WORK, 0.0)
        self._desk.forget(self)
        if isinstance(error, asyncio.CancelledError) and self._desk.cutting:
            error = Cut()
        outcome = _outcome(error, self.status, self._desk.verdict)
        self._desk.emit(
            Settled(
                id=self.id,
                at=time.monotonic(),
                outcome=outcome,
                status=self.status,
                usage=self.usage,
                delivered_tokens=self.usage.completion_tokens if self.usage else self.tokens,
                delivered_bytes=self.bytes,
                first_at=self.first_at,
                sent_at=self.sent_at,
                overhead=self.overhead,
                error=_reason(error, self.status),
            )
        )


def _outcome(error: BaseException | None, status: int, verdict: State) -> Outcome:
    if error is None:
        outcome: Outcome = "engine_error" if status >= 500 else "rejected" if status >= 400 else "ok"
    else:
        outcome = next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), "lost")
    return "stalled" if outcome == "engine_error" and error is not None and verdict == "stalled" else outcome


def _reason(error: BaseException | None, status: int) -> str:
    """A reason code, never free text."""
    if error is None:
        return f"status_{status}" if status >= 400 else ""
    if isinstance(error, asyncio.CancelledError):
        return ClientGone.code
    return str(getattr(error, "reason", error.code)) if isinstance(error, SidecarError) else "internal"
