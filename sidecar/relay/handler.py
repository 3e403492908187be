"""The data path: read, prepare, admit, send, stream, settle.

Rules: engine work is admitted, anything else passes through unread (passthrough.py). A body of work is read whole; an
answer goes out chunk by chunk as it comes. When the client leaves, aiohttp cancels the handler
(`handler_cancellation`), and leaving the exchange closes the connection to the engine. The sidecar's errors become
answers in one place, `handle`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from sidecar.errors import BodyTooLarge, Draining, ImagesOff, Internal, RequestError, place_of
from sidecar.events import AbortRequests, Command, Event, LoadReport, MetricsPage
from sidecar.load import request_shape
from sidecar.relay import (
    body_thread,
    client_io,
    engine_io,
    headers,
    metrics_page,
    outcomes,
    passthrough,
    request_body,
    response,
)
from sidecar.relay.admission import Admission
from sidecar.relay.concurrency import MAX_QUEUED, ConcurrencyLimit, share_of
from sidecar.relay.engine_io import BodyPayload
from sidecar.relay.media import image_refusals, inline
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.pricing.charge import Pricing
from sidecar.settings import Settings
from sidecar.signals.engine_address import EngineAddress
from sidecar.trace_context import new_trace, parse_traceparent

if TYPE_CHECKING:  # a relay without images does not load them
    from sidecar.images.service import ImageService, PreparedImage

_log = logging.getLogger(__name__)


class Relay:
    """Handles every request of relay process `index`.

    `preprocess` serves /v1/preprocess if images are on, `fetch` fetches images behind links, and `is_shm_ready` returns
    whether vLLM takes images from shared memory now.
    """

    def __init__(
        self,
        settings: Settings,
        emit: Callable[[Event], None],
        pricing: Pricing,
        *,
        index: int = 0,
        image_key: bytes = b"",
        images: ImageService | None = None,
        preprocess: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]] | None = None,
        fetch: inline.Fetch | None = None,
        is_shm_ready: Callable[[], bool] | None = None,
        max_queued: int = MAX_QUEUED,
        client_stall: float = client_io.CLIENT_STALL_S,
    ) -> None:
        self._settings = settings
        self._images = images
        self._preprocess = preprocess
        self._fetch = fetch if images is not None else None
        self._is_shm_ready = is_shm_ready
        self._engine_kind = settings.engine_kind if settings.engine_kind != "auto" else ""
        self._image_key = image_key or secrets.token_bytes(32)
        self._load_report: LoadReport | None = None
        self._open_requests = OpenRequests(emit, client_stall)
        slots = share_of(settings.max_concurrent, settings.workers, index)
        self._concurrency = ConcurrencyLimit(slots, self._open_requests, max_queued)
        self._refusals = image_refusals.Refusals()
        self._pricing = pricing
        self._metrics_page = metrics_page.MergedMetricsPage(emit)
        self._engine = engine_io.EngineClient(EngineAddress(settings.engine, settings.engine_ca), self._open_requests)
        self.close = self._engine.close
        self._connections = client_io.BusyConnections()
        self.is_draining = False

    # --- commands and life ---

    def on_command(self, command: Command) -> None:
        """Apply what the control process published."""
        match command:
            case LoadReport():
                self._load_report = command
                self._engine_kind = command.engine_kind or self._engine_kind
                self._open_requests.on_verdict(command.verdict, time.monotonic())
                self._pricing.on_load_report(command)
                self._refusals.on_load_report(command)
                if self._images is not None:
                    self._images.gpu = command.verdict in inline.GPU_VERDICTS
            case AbortRequests():
                self._open_requests.abort(command.ids, command.code)
            case MetricsPage():
                self._metrics_page.put(command)

    @property
    def open(self) -> int:
        """Client requests under way."""
        return len(self._connections)

    async def drain(self, server: web.Server, seconds: float) -> None:
        """Close idle connections and wait for open requests, at most `seconds`; cut off what is left."""
        self.is_draining = True
        if not await self._connections.drain(server, seconds):
            _log.warning("%d requests did not end within %.0f s and are cut off", self.open, seconds)
            self._open_requests.cutting = True
        await server.shutdown(timeout=0.5)

    # --- one request ---

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; the only place where the sidecar's errors become answers."""
        id = headers.request_id(request.headers) or self._open_requests.new_id()
        with self._connections.busy(request.protocol):
            try:
                if self.is_draining:
                    raise Draining("this server is shutting down; send the request again")
                return await self._dispatch(request, id)
            except (outcomes.ClientStalled, outcomes.ClientGone, outcomes.EngineBroke) as e:
                return client_io.hang_up(request, at_once=isinstance(e, outcomes.ClientStalled))
            except RequestError as e:
                return _refuse(request, e, id)
            except Exception as e:  # noqa: BLE001  # the border: a defect costs one request, and its place is logged
                _log.error("request failed: %s at %s", type(e).__name__, place_of(e))
                return _refuse(request, Internal("internal error of the sidecar"), id)
            finally:
                if self.is_draining:
                    request.protocol.close()

    async def _dispatch(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        path = engine_io.origin_form(request.raw_path).partition("?")[0]
        if request.method == "POST":
            route = request_body.route_of(path)
            if route is not None:
                return await self._work(request, route, id)
            if path == "/v1/preprocess":
                if self._preprocess is None:
                    raise ImagesOff(
                        "images are off; start the sidecar with --images inline and --model DIR to use /v1/preprocess"
                    )
                return await self._preprocess(request)
        elif path == "/metrics" and request.method == "GET" and (page := await self._metrics_page.get()) is not None:
            return web.Response(body=page, headers={"content-type": metrics_page.CONTENT_TYPE, "x-request-id": id})
        max_bytes = self._settings.max_body_bytes
        return await passthrough.forward(request, id, self._engine, self._open_requests, max_bytes, self._load_report)

    async def _work(self, request: web.BaseRequest, route: str, id: str) -> web.StreamResponse:
        """Engine work: one admission, settled before its client gets an error."""
        tenant = headers.tenant(request.headers, self._settings.tenant_header)
        trace = None
        if self._settings.otlp_endpoint:
            given, state = request.headers.get("traceparent", ""), request.headers.get("tracestate", "")
            trace = parse_traceparent(given, state) or new_trace()
        admission = Admission(self._open_requests.new_id(), route, tenant, trace)
        try:
            with self._open_requests.settling(admission):
                self._open_requests.check(time.monotonic())
                return await self._admitted(request, admission, await self._ready(request, admission), id)
        except RequestError as e:
            if admission.answer is None:
                raise
            return await response.end_with_error(request, admission, e)
        finally:
            # the answer, which waits for this call to return, goes out before anything is learned from it
            asyncio.get_running_loop().call_soon(self._pricing.settle, admission)
            if self._images is not None:
                self._images.release(admission.id)

    async def _ready(self, request: web.BaseRequest, admission: Admission) -> BodyPayload:
        """The body to send: read, charged, its images prepared, and admitted."""
        body = await client_io.read(request, self._settings.max_body_bytes)
        admission.read_at = time.monotonic()
        parsed = request_body.ParsedBody(body)
        if admission.route != "audio" and "content-encoding" not in request.headers:
            parsed = await body_thread.run(partial(request_body.parse, links=self._fetch is not None), body)
        admission.shape = request_shape.describe(parsed.scan, admission.route, len(body))
        await self._pricing.charge(admission, parsed)
        prepared = await self._prepare(parsed, admission)
        # 0 tokens: the model's files do not state it
        image_tokens = [image.tokens for image in prepared if image.tokens]
        self._open_requests.admit(admission, self._pricing.estimate(admission, image_tokens))
        return self._payload(parsed, prepared, admission)

    async def _prepare(self, parsed: request_body.ParsedBody, admission: Admission) -> list[PreparedImage]:
        """The request's images, prepared; none if images are off."""
        if self._images is None or not parsed.images:
            return []
        passing = self._refusals.passing
        shm = not passing and self._is_shm_ready is not None and self._engine_kind == "vllm" and self._is_shm_ready()
        emit, started = self._open_requests.emit, time.monotonic()
        try:
            return await inline.prepare(
                self._images, parsed, emit, admission, shm=shm, fetch=self._fetch, passing=passing
            )
        finally:
            admission.image_seconds = time.monotonic() - started

    def _payload(
        self, parsed: request_body.ParsedBody, prepared: list[PreparedImage], admission: Admission
    ) -> BodyPayload:
        """The body to send; with the original one, if the engine may refuse the prepared images."""
        parts = parsed.images
        rebuild = partial(request_body.rebuild, parsed, ask_usage=admission.shape.ask_usage)

        def sent() -> None:
            if admission.sent_at is None:  # not the time of a second attempt
                admission.sent_at = time.monotonic()

        if not prepared:
            return BodyPayload(rebuild({}), sent)
        has_originals = all(part.data for part in parts)  # also of images behind links
        if has_originals and self._refusals.passing:  # perhaps since these were prepared
            return BodyPayload(rebuild(inline.originals(parts, prepared)), sent)
        name = partial(inline.cache_name, self._image_key, admission.tenant) if self._engine_kind == "vllm" else None
        data = BodyPayload(rebuild(inline.replacements(parts, prepared, name)), sent)
        data.form = inline.form_of(prepared)
        if has_originals and data.form and self._refusals.is_trial(data.form, data.size or 0):
            # the request's sending time stays that of its first attempt
            data.original = lambda: BodyPayload(rebuild(inline.originals(parts, prepared)), lambda: None)
        return data

    async def _admitted(
        self, request: web.BaseRequest, admission: Admission, data: BodyPayload, id: str
    ) -> web.StreamResponse:
        """The answer to `data`; if its prepared images are refused, that to the original body."""

        async def send(body: BodyPayload) -> aiohttp.ClientResponse:
            answer = await self._engine.send(request, id, body, trace=admission.trace, length=body.size)
            admission.status = answer.status
            return answer

        async with admission.abortable(), self._concurrency.acquire(admission):
            self._open_requests.check(time.monotonic())
            with closing(await send(data)) as answer:
                if not await self._refusals.is_refusal(answer, data):
                    data.original = None
                    return await self._respond(request, answer, admission, id)
            assert data.original is not None
            refused_with = admission.status
            with closing(await send(data.original())) as answer:
                self._refusals.on_original(refused_with, answer)
                return await self._respond(request, answer, admission, id)

    async def _respond(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, admission: Admission, id: str
    ) -> web.StreamResponse:
        """Send the engine's answer to the client."""
        overhead = admission.overhead(time.monotonic())
        ours = {"x-sidecar-mu": f"{admission.mu:.4f}", "x-sidecar-overhead-ms": f"{overhead * 1e3:.3f}"}
        if headers.wants_price(request.headers):
            admission.price = partial(self._pricing.price_milli, admission)
        hides_usage = admission.shape.ask_usage and response.is_stream(answer)
        drop = "content-length" if (admission.price is not None or hides_usage) and response.can_change(answer) else ""
        passed = headers.to_client(request.headers, answer.headers, id, self._load_report, ours, drop=drop)
        try:
            return await response.ResponseSender(request, answer, passed, admission, self._open_requests).send()
        except outcomes.EngineBroke:
            if admission.answer is None:  # the client can still get an error
                raise outcomes.engine_error(None, self._open_requests.verdict) from None
            raise


def _refuse(request: web.BaseRequest, error: RequestError, id: str) -> web.Response:
    if request.writer.output_size:  # too late for another answer
        return client_io.hang_up(request)
    extra = {} if error.retry_after is None else headers.retry_after(error.retry_after)
    response = web.json_response(error.body(), status=error.status, headers={"x-request-id": id, **extra})
    if isinstance(error, BodyTooLarge):
        response.force_close()  # the rest of the body is not worth reading
    return response
