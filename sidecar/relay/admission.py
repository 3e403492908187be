"""Every admission is a `with`: it holds model units from `admit` on and settles exactly once, however it ends.

Rules: Admitted comes before the request's other facts, Settled after them; a request that ends before it was admitted (too
large, a bad image, the client left) is reported as both at once, so that it is counted. Whoever ends a request from outside does
it by `end`, which cancels what is inside `endable`, and only that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol

from aiohttp import web

from sidecar.errors import SidecarError
from sidecar.events import (
    Admitted,
    Delivered,
    Event,
    FirstToken,
    RequestBlocked,
    RequestSize,
    Settled,
    State,
    Trace,
    Usage,
)
from sidecar.load.estimator import Estimate
from sidecar.load.request_shape import RequestShape
from sidecar.relay.outcomes import ClientStalled, DrainCut, outcome_of, reason_of
from sidecar.relay.pricing.tenant_accounts import TenantCharge
from sidecar.relay.pricing.tokenizer import TokenCount
from sidecar.relay.sse import SSE, Price

BLOCKED: Final = 1.0  # seconds that a write may wait for its client before the request's silence is the client's
NOTHING: Final = Estimate(RequestSize(uncached=0), 0.0)


class RequestRegistry(Protocol):
    """What an admission needs of the desk where it was opened."""

    emit: Callable[[Event], None]
    verdict: State
    cutting: bool

    def enter(self, admission: Admission) -> None: ...
    def note(self, admission: Admission) -> None: ...
    def forget(self, admission: Admission) -> None: ...


@dataclass(frozen=True, slots=True)
class BegunAnswer:
    """An answer whose head the client has; `sse` where it is an event stream that we read along."""

    response: web.StreamResponse
    sse: SSE | None


class Admission:
    """One request from its arrival to its settlement."""

    __slots__ = (
        "_admitted",
        "_blocked",
        "_desk",
        "_pending_bytes",
        "_pending_tokens",
        "_writing_since",
        "aside_seconds",
        "at",
        "begun",
        "bytes",
        "counted",
        "first_at",
        "id",
        "image_seconds",
        "image_tokens",
        "lease",
        "mu",
        "price",
        "read_at",
        "route",
        "scope",
        "sent_at",
        "settled",
        "shape",
        "status",
        "tenant",
        "tokens",
        "trace",
        "usage",
        "work",
    )

    def __init__(self, desk: RequestRegistry, id: str, route: str, tenant: str, trace: Trace | None) -> None:
        self._desk = desk
        self._admitted = False
        self._pending_tokens = 0
        self._pending_bytes = 0
        self.scope: AbortScope | None = None
        self._writing_since: float | None = None
        self._blocked = False
        self.id = id
        self.route = route
        self.tenant = tenant
        self.trace = trace
        self.at = time.monotonic()
        self.shape = RequestShape()
        self.read_at: float | None = None  # when the client's last byte was here
        self.sent_at: float | None = None
        self.first_at: float | None = None
        self.image_seconds = 0.0
        self.image_tokens: list[int] = []  # of images whose files say their size
        self.aside_seconds = 0.0
        self.begun: BegunAnswer | None = None
        self.price: Price | None = None  # of a usage, where the client wants it there
        self.status = 0
        self.mu = 0.0
        self.work = NOTHING.work
        self.tokens = 0
        self.bytes = 0
        self.usage: Usage | None = None
        self.settled: Settled | None = None  # once it is over
        self.counted: TokenCount | None = None  # its text's tokens, by the model's tokenizer
        self.lease: TenantCharge | None = None  # what its tenant's limits were charged with

    def admit(self, shape: RequestShape, estimate: Estimate) -> None:
        """Hold the estimate from now on."""
        self._admitted = True
        self.shape = shape
        self.mu, self.work = estimate.mu, estimate.work
        self._desk.emit(
            Admitted(
                id=self.id,
                at=time.monotonic(),
                tenant=self.tenant,
                model=shape.model,
                route=self.route,
                stream=shape.stream,
                expected=estimate.work,
                max_output=shape.max_output,
                mu=estimate.mu,
                trace=self.trace,
                tail=estimate.tail,
            )
        )

    def sent(self) -> None:
        """The request is with the engine."""
        self.sent_at = time.monotonic()

    def begin(self, response: web.StreamResponse, sse: SSE | None) -> None:
        """The client has the head of its answer; `sse` where that is an event stream."""
        self.begun = BegunAnswer(response, sse)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait of ours, in which the request is not with the engine."""
        began = time.monotonic()
        self._desk.emit(RequestBlocked(self.id, began, True))
        try:
            yield
        finally:
            now = time.monotonic()
            self.aside_seconds += now - began
            self._desk.emit(RequestBlocked(self.id, now, False))

    # --- ended from outside ---

    def abortable(self) -> AbortScope:
        """A block that `end` cancels, and that then raises its error."""
        return AbortScope(self)

    def end(self, error: SidecarError) -> None:
        """End the request with `error`, where it is in a part that can be ended; the first one counts."""
        if self.scope is not None:
            self.scope.end(error)

    # --- written to the client ---

    def writing(self) -> None:
        """A write to the client begins."""
        self._writing_since = time.monotonic()

    def written(self) -> None:
        """It has ended."""
        self._writing_since = None
        if self._blocked:
            self._blocked = False
            self._desk.emit(RequestBlocked(self.id, time.monotonic(), False))

    def check_stalled_write(self, now: float, limit: float) -> None:
        """Whether a write waits for the client, and too long (`limit` seconds)."""
        if self._writing_since is None:
            return
        waited = now - self._writing_since
        if waited > BLOCKED and not self._blocked:
            self._blocked = True
            self._desk.emit(RequestBlocked(self.id, now, True))
        if waited > limit:
            self.end(ClientStalled())

    # --- deliveries ---

    def deliver(self, tokens: int, size: int, started: bool) -> None:
        """`tokens` and `size` bytes came from the engine; `started`: they show that generation has begun."""
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
        """Seconds of our own between the client's last byte and ours to the engine, image work and waiting excluded."""
        if self.read_at is None:
            return 0.0
        until = time.monotonic() if self.sent_at is None else self.sent_at
        return max(0.0, until - self.read_at - self.image_seconds - self.aside_seconds)

    def __enter__(self) -> Admission:
        self._desk.enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._admitted:
            self.admit(self.shape, NOTHING)
        self._desk.forget(self)
        if isinstance(error, asyncio.CancelledError) and self._desk.cutting:
            error = DrainCut()
        outcome = outcome_of(error, self.status, self._desk.verdict)
        self.settled = Settled(
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
            error=reason_of(error, self.status),
        )
        self._desk.emit(self.settled)


class AbortScope:
    """A block of an admission's handling that can be ended from outside, once."""

    __slots__ = ("_admission", "_error", "_timeout")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._error: SidecarError | None = None
        self._timeout = asyncio.timeout(None)  # cancels, and tells its own cancelling from a client's

    def end(self, error: SidecarError) -> None:
        """Cancel the block; the first error counts."""
        if self._error is None:
            self._error = error
            self._timeout.reschedule(0.0)  # long ago: now

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._admission.scope = self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.scope = None
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._error is None:
                raise
            raise self._error from None
