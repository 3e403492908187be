"""A WebSocket session as work: admitted when it opens, charged while it runs, settled by its traffic when it ends.

Rules: only the first byte of each piece is read, to distinguish pings and closes from messages. Its
audio is estimated from the bytes that its client sends: base64 of 16-bit samples, 16,000 a second, as vLLM expects.
While the engine owes no answer (it sent last, or the client has sent nothing yet), its silence is the client's.
A session whose tenant has no units left is ended. It needs no slot of --max-concurrent, as it may be idle for hours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs

from sidecar.errors import TenantLimited
from sidecar.events import LoadReport, RequestBlocked
from sidecar.load.api_routes import REALTIME
from sidecar.load.request_shape import MAX_MODEL_NAME_CHARS, RequestShape
from sidecar.load.usage_forms import ToldUsage
from sidecar.relay import engine_io, headers, response, websocket
from sidecar.relay.admission import Admission
from sidecar.relay.http.client import Request
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.request_body import ParsedBody

PAID_SECONDS: Final = 30.0  # of audio, for which its tenant is charged ahead: one window of Whisper's
BYTES_PER_S: Final = 2 * 16_000 * 4 / 3
# RFC 6455, 5.5: control frames are short, and have these first bytes.
_CONTROLS: Final = (0x88, 0x89, 0x8A)  # close, ping, pong
_MAX_CONTROL_BYTES: Final = 125 + 6


@dataclass(slots=True)
class SessionMeter:
    """Traffic of one session. `owed`: the client has sent something since the engine last did.

    `paid`: seconds of audio that its tenant was charged for.
    """

    client_bytes: int = 0
    engine_bytes: int = 0
    owed: bool = False
    paid: float = PAID_SECONDS

    @property
    def seconds(self) -> float:
        """Seconds of audio that the client can have sent."""
        return self.client_bytes / BYTES_PER_S

    def sent(self, data: bytes) -> bool:
        """The client sent a piece. Returns whether the engine owes something from now on, as it did not before."""
        if is_control(data):
            return False
        self.client_bytes += len(data)
        owed, self.owed = self.owed, True
        return not owed

    def received(self, data: bytes) -> bool:
        """The engine sent a piece. Returns whether it owes nothing from now on, as it did before."""
        if is_control(data):
            return False
        self.engine_bytes += len(data)
        owed, self.owed = self.owed, False
        return owed

    def usage(self) -> ToldUsage:
        """The estimated usage."""
        return ToldUsage(0, 0, seconds=max(1e-3, self.seconds), final=False)


def is_control(data: bytes) -> bool:
    """Whether a piece is a ping, a pong or a close: the API process sends those while its engine hangs."""
    return len(data) <= _MAX_CONTROL_BYTES and bool(data) and data[0] in _CONTROLS


def shape_of(target: bytes) -> RequestShape:
    """The shape of a session that is asked for at `target`."""
    model = parse_qs(target.partition(b"?")[2].decode("latin-1")).get("model", [""])[0]
    return RequestShape(
        model=model[:MAX_MODEL_NAME_CHARS],
        audio_seconds=PAID_SECONDS,
        told_output=round(REALTIME.output_per * PAID_SECONDS),
        reorders=True,
        withholds=True,
    )


async def serve(
    request: Request,
    id: str,
    admission: Admission,
    engine: engine_io.EngineClient,
    open_requests: OpenRequests,
    pricing: Pricing,
    report: LoadReport | None,
) -> None:
    """One session; or the engine's answer, if it refuses one. `report`: the load report for the answer's header."""
    admission.read_at = time.monotonic()
    admission.shape = shape_of(request.target)
    await pricing.charge(admission, ParsedBody(b""))
    open_requests.admit(admission, pricing.estimate(admission, []))
    task = request.connection.task
    assert task is not None  # it runs this
    with admission.abortable(task):
        open_requests.check(time.monotonic())
        with await engine.send(request, id, None, is_upgrade=True) as answer:
            admission.status = answer.status
            admission.mark_sent()
            passed = headers.to_client(request.fields, answer.fields, id, report, {})
            if not answer.is_upgrade:
                await response.ResponseSender(request, answer, passed, admission, open_requests).send()
                return
            meter = SessionMeter()
            try:
                open_requests.emit(RequestBlocked(admission.id, time.monotonic(), True))
                await websocket.tunnel(request, answer, passed, *_ears(meter, admission, open_requests, pricing))
            finally:
                admission.told = meter.usage()


def _ears(
    meter: SessionMeter, admission: Admission, open_requests: OpenRequests, pricing: Pricing
) -> tuple[websocket.Hear, websocket.Hear]:
    """The callbacks for each piece from the engine, and for each from the client."""

    def received(data: bytes) -> None:
        before = meter.engine_bytes
        if meter.received(data):
            open_requests.emit(RequestBlocked(admission.id, time.monotonic(), True))
        if size := meter.engine_bytes - before:
            open_requests.deliver(admission, 0, size, started=False)

    def sent(data: bytes) -> None:
        if meter.sent(data):
            open_requests.emit(RequestBlocked(admission.id, time.monotonic(), False))
        while meter.seconds > meter.paid:
            meter.paid += PAID_SECONDS
            try:
                pricing.top_up(admission, admission.mu)
            except TenantLimited as error:
                admission.abort(error)
                return

    return received, sent
