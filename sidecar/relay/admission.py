"""One request from its arrival to its settlement: its state, and transitions that return the event to emit.

Rules: Admitted comes before the request's other events, Settled after them. A request that ends before it was admitted
(too large, a bad image, the client left) returns both at once, so that it is counted. `abort` ends a request from
outside: it cancels what is inside `abortable`, and only that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import structs

from sidecar.errors import SidecarError
from sidecar.events import Admitted, Delivered, HttpRequest, RequestBlocked, RequestSize, Settled, State, Trace
from sidecar.load import api_routes, request_shape
from sidecar.load.api_routes import Api
from sidecar.load.body_scan import BodyScan
from sidecar.load.estimator import Estimate
from sidecar.load.request_shape import RequestShape
from sidecar.load.usage_forms import ToldUsage
from sidecar.relay.answer_details import AnswerReader
from sidecar.relay.outcomes import ClientStalled, outcome_of, reason_of
from sidecar.relay.pricing.tenant_accounts import TenantCharge
from sidecar.relay.pricing.tokenizer import TokenCount
from sidecar.relay.sse import SSE, Price

# A write that waits longer than this for its client makes the request's silence the client's.
BLOCKED_WRITE_S: Final = 1.0
NO_SHAPE: Final = RequestShape()
NO_ESTIMATE: Final = Estimate(RequestSize(uncached=0), 0.0)


@dataclass(slots=True, eq=False)
class Admission:
    """The state of one request. Times are monotonic seconds."""

    id: str
    route: str
    tenant: str
    trace: Trace | None
    shape: RequestShape = NO_SHAPE
    admitted: bool = False
    read_at: float | None = None  # the client's last byte arrived
    sent_at: float | None = None  # the engine has the whole request
    first_at: float | None = None
    image_seconds: float = 0.0
    queued_seconds: float = 0.0
    image_tokens: Sequence[int] = ()  # of images whose files state their size
    token_count: TokenCount | None = None  # of its text, by the model's tokenizer
    charge: TenantCharge | None = None  # what its tenant's limits were charged
    mu: float = 0.0
    work: RequestSize = NO_ESTIMATE.work
    price: Price | None = None  # of a usage, if the client wants it in the answer
    task: asyncio.Task[None] | None = None  # which `abort` cancels
    abort_error: SidecarError | None = None
    events: SSE | None = None  # the answer's reader, if it is an event stream in plain text
    status: int = 0
    tokens: int = 0
    bytes: int = 0
    unreported_tokens: int = 0
    unreported_bytes: int = 0
    writing_since: float | None = None
    blocked: bool = False
    told: ToldUsage | None = None  # reported by the engine
    failed: bool = False  # according to its answer, whatever its status
    tokens_per_event: float = 1.0  # of its model's streams
    settled: Settled | None = None
    http: HttpRequest | None = None  # of a sampled trace
    answer: AnswerReader | None = None  # likewise

    def describe_unread(self, scan: BodyScan | None, size: int, api: Api) -> None:
        """Take the shape of a body that is forwarded unchanged; `scan` and `size` are those of its text."""
        api = api_routes.of_form(api, () if scan is None else scan.found.members)
        self.route = api.route
        self.shape = structs.replace(request_shape.describe(scan, api, size), ask_usage=False)

    def admit(self, estimate: Estimate, now: float) -> Admitted:
        """The engine is to get the request: hold its estimate."""
        self.admitted = True
        self.mu, self.work = estimate.mu, estimate.work
        return Admitted(
            id=self.id,
            at=now,
            tenant=self.tenant,
            model=self.shape.model,
            route=self.route,
            stream=self.shape.stream,
            expected=estimate.work,
            max_output=self.shape.max_output,
            mu=estimate.mu,
            trace=self.trace,
            tail=estimate.tail,
            priority=self.shape.priority,
            reorders=self.shape.reorders,
            withholds=self.shape.withholds,
            http=self.http,
        )

    def abortable(self, task: asyncio.Task[None]) -> Abortable:
        """A block in `task` that `abort` cancels, and that then raises its error."""
        return Abortable(self, task)

    def abort(self, error: SidecarError) -> None:
        """End the request with `error` if it is inside `abortable`; the first error counts."""
        if self.task is not None and self.abort_error is None:
            self.abort_error = error
            self.task.cancel()

    def mark_sent(self) -> None:
        """The engine has the whole request; the time of a second attempt does not count."""
        if self.sent_at is None:
            self.sent_at = time.monotonic()

    def report_delivered(self, now: float) -> Delivered:
        """What was delivered since the last report."""
        tokens, size = self.unreported_tokens, self.unreported_bytes
        self.unreported_tokens = self.unreported_bytes = 0
        return Delivered(self.id, now, tokens, size)

    def check_stalled_write(self, now: float, limit: float) -> RequestBlocked | None:
        """Mark a write that waits for the client; abort the request after `limit` seconds."""
        if self.writing_since is None:
            return None
        waited = now - self.writing_since
        if waited > limit:
            self.abort(ClientStalled())
        if waited <= BLOCKED_WRITE_S or self.blocked:
            return None
        self.blocked = True
        return RequestBlocked(self.id, now, True)

    def overhead(self, now: float) -> float:
        """Seconds that the sidecar added before the engine had the request, without image work and queueing."""
        if self.read_at is None:
            return 0.0
        until = now if self.sent_at is None else self.sent_at
        return max(0.0, until - self.read_at - self.image_seconds - self.queued_seconds)

    def settle(self, error: BaseException | None, verdict: State, now: float) -> Settled:
        """The request has ended: with `error`, or by the engine's status."""
        counted = round(self.tokens * self.tokens_per_event) if self.events is not None else self.tokens
        usage = None if self.told is None else self.told.usage(self.work, counted)
        self.settled = Settled(
            id=self.id,
            at=now,
            outcome=outcome_of(error, self.status, verdict, failed=self.failed),
            status=self.status,
            usage=usage,
            delivered_tokens=usage.completion_tokens if usage else counted,
            delivered_bytes=self.bytes,
            first_at=self.first_at,
            sent_at=self.sent_at,
            overhead=self.overhead(now),
            error=reason_of(error, self.status, failed=self.failed),
            estimated=self.told is not None and not self.told.is_whole(self.work),
            details=None if self.answer is None else self.answer.details(),
        )
        return self.settled


class Abortable:
    """A block inside which `Admission.abort` cancels its task."""

    __slots__ = ("_admission", "_cancelling", "_task")

    def __init__(self, admission: Admission, task: asyncio.Task[None]) -> None:
        self._admission = admission
        self._task = task
        self._cancelling = task.cancelling()

    def __enter__(self) -> None:
        self._admission.task = self._task

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        admission = self._admission
        admission.task = None
        if admission.abort_error is None:
            return
        # like asyncio.timeout, distinguish our own cancellation from the client's
        if self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise admission.abort_error from None
