"""The data path: read, prepare, admit, send, stream, settle.

Rules: whatever is not engine work passes through unread; a request body is read whole only when it is work or short; an
answer goes out chunk by chunk as it comes. When the client leaves, aiohttp cancels the handler
(`handler_cancellation`), and leaving the exchange closes the connection to the engine. Errors of ours become answers in
one place, `handle`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from sidecar.errors import (
    BodyTooLarge,
    Draining,
    EngineUnreachable,
    ImagesOff,
    Internal,
    RequestError,
    place_of,
)
from sidecar.events import AbortRequests, Command, Event, LoadReport, MetricsPage, Trace
from sidecar.load import request_shape
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.relay import (
    client_io,
    concurrency,
    engine_io,
    engine_pauses,
    headers,
    metrics_page,
    outcomes,
    request_body,
    websocket,
)
from sidecar.relay import response as answering
from sidecar.relay.admission import Admission
from sidecar.relay.media import image_refusals, inline
from sidecar.relay.metrics_page import MergedMetricsPage
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.pricing.charge import Pricing
from sidecar.settings import Settings
from sidecar.trace_context import new_trace, parse_traceparent

if TYPE_CHECKING:  # a relay without images does not load them
    from sidecar.images.service import ImageService, PreparedImage

_log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Relay:
    """Handles every request of relay process `index`. `preprocess` serves /v1/preprocess where images are on, `fetch` gets images behind links,
    `shm` says whether a vLLM takes images from shared memory now."""

    def __init__(
        self,
        settings: Settings,
        coefficients: Coefficients,
        emit: Callable[[Event], None],
        *,
        index: int = 0,
        engine_kind: str = "openai",
        image_key: bytes = b"",
        images: ImageService | None = None,
        preprocess: Handler | None = None,
        fetch: inline.Fetch | None = None,
        shm: Callable[[], bool] | None = None,
        pricing: Pricing | None = None,
        max_queued: int = concurrency.MAX_QUEUED,
        client_stall: float = client_io.CLIENT_STALL_S,
    ) -> None:
        self._settings = settings
        self._images = images
        self._preprocess = preprocess
        self._fetch = fetch if images is not None else None
        self._shm = shm
        self._engine_kind = engine_kind
        self._image_key = image_key or secrets.token_bytes(32)
        self._published: LoadReport | None = None
        self._desk = OpenRequests(emit, client_stall)
        self._slots = concurrency.ConcurrencyLimit(
            concurrency.share_of(settings.max_concurrent, settings.workers, index), max_queued
        )
        self._refusals = image_refusals.Refusals()
        self._directing = engine_pauses.Calls(emit, time.monotonic)
        self._pricing = pricing or Pricing(Estimator(coefficients))
        self._page = MergedMetricsPage(emit)
        self._engine = engine_io.Connections()
        self._busy: set[Any] = set()  # client connections with a request under way
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    # --- orders and life ---

    def on_command(self, order: Command) -> None:
        """Take in what the control process published."""
        match order:
            case LoadReport():
                self._published = order
                self._engine_kind = order.engine_kind or self._engine_kind
                self._desk.on_verdict(order.verdict, time.monotonic())
                self._pricing.on_load_report(order)
                self._refusals.report(order)
                if self._images is not None:
                    self._images.gpu = order.verdict in inline.SETTLED
            case AbortRequests():
                self._desk.end(order.ids, order.code)
            case MetricsPage():
                self._page.put(order)

    @property
    def open(self) -> int:
        """Client requests under way."""
        return len(self._busy)

    async def drain(self, server: web.Server, seconds: float) -> None:
        """Close idle connections and wait for open requests, at most `seconds`; what is left then is cut off."""
        self.draining = True
        for connection in server.connections:
            if connection not in self._busy:
                connection.close()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d requests did not end within %.0f s and are cut off", self.open, seconds)
            self._desk.cutting = True
        await server.shutdown(timeout=0.5)

    async def close(self) -> None:
        """Close the connections to the engine."""
        await self._engine.close()

    # --- one request ---

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; the only place where errors of ours become answers."""
        connection = request.protocol
        self._busy.add(connection)
        self._idle.clear()
        id = headers.request_id(request.headers) or self._desk.new_id()
        try:
            if self.draining:
                raise Draining("this server is shutting down; send the request again")
            return await self._dispatch(request, id)
        except RequestError as e:
            return _refusal(e, id) if not request.writer.output_size else client_io.hang_up(request)
        except outcomes.ClientStalled:
            return client_io.hang_up(request, at_once=True)
        except (outcomes.ClientGone, outcomes.EngineBroke):
            return client_io.hang_up(request)
        except Exception as e:  # noqa: BLE001  # the border: a defect of ours costs one request, and says where it is
            _log.error("request failed: %s at %s", type(e).__name__, place_of(e))
            if request.writer.output_size:
                return client_io.hang_up(request)
            return _refusal(Internal("internal error of the sidecar"), id)
        finally:
            self._busy.discard(connection)
            if not self._busy:
                self._idle.set()
            if self.draining:
                connection.close()

    async def _dispatch(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        path = engine_io.origin_form(request.raw_path).partition("?")[0]
        if request.method == "POST":
            route = request_body.route_of(path)
            if route is not None:
                return await self._work(request, route, id)
            if path == "/v1/preprocess":
                return await self._preprocessed(request)
        elif path == "/metrics" and request.method == "GET":
            page = await self._page.get()
            if page is not None:
                return web.Response(body=page, headers={"content-type": metrics_page.CONTENT_TYPE, "x-request-id": id})
        elif websocket.wanted(request):
            url = engine_io.target(self._settings.engine, engine_io.origin_form(request.raw_path))
            return await websocket.relay(request, self._engine.fresh, url, self._to_engine(request, id, None, None))
        return await self._pass(request, id)

    async def _pass(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        """Not engine work: both bodies pass unread, but for those that resume the engine's work; a long one streams."""
        path, _, query = engine_io.origin_form(request.raw_path).partition("?")
        row, partly, streams = engine_pauses.row_of(request.method, path), False, False
        data: Any = None
        if row is not None and row.turn == "resumes":
            data = await client_io.read(request, self._settings.max_body_bytes)
            partly = engine_pauses.is_partial(query, data)
        elif request.body_exists and (request.content_length or math.inf) <= engine_io.REPEATED:
            data = await client_io.read(request, engine_io.REPEATED)
        elif request.body_exists:
            await client_io.expect(request)
            streams = True
        with self._directing.call(row, partly=partly) as call:
            if streams:
                data = engine_io.stream(request.content, call.sent)
            else:
                call.sent()
            answer = await self._send(request, self._to_engine(request, id, None, None), data)
            call.answered(answer.status)
        with closing(answer):
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=self._to_client(request, answer, id)
            )
            await client_io.start(response, request)
            while chunk := await client_io.next_chunk(answer):
                await client_io.write(response, chunk)
            await client_io.end(response)
            return response

    async def _work(self, request: web.BaseRequest, route: str, id: str) -> web.StreamResponse:
        """Engine work: one admission, settled before its client is told of an error."""
        tenant = headers.tenant(request.headers, self._settings.tenant_header)
        admission = self._desk.open(route, tenant, self._trace(request))
        try:
            with admission:
                self._desk.check(time.monotonic())
                return await self._admitted(request, admission, await self._ready(request, admission), id)
        except RequestError as e:
            if admission.begun is None:
                raise
            return await answering.part(request, admission, e)
        finally:
            # the answer, which waits for us to return, goes out before anything is learned of it
            asyncio.get_running_loop().call_soon(self._pricing.over, admission)
            if self._images is not None:
                self._images.release(admission.id)

    async def _ready(self, request: web.BaseRequest, admission: Admission) -> engine_io.BodyPayload:
        """The body to send, read, prepared and admitted."""
        body = await client_io.read(request, self._settings.max_body_bytes)
        admission.read_at = time.monotonic()
        opaque = admission.route == "audio" or "content-encoding" in request.headers
        skeleton = (
            request_body.ParsedBody(body)
            if opaque
            else request_body.extract_data_urls(body, secrets.token_hex(16), links=self._fetch is not None)
        )
        admission.shape = request_shape.describe(skeleton.payload, admission.route, len(body), skeleton.text)
        await self._pricing.charge(admission, skeleton)
        prepared = await self._prepare(skeleton, admission)
        # 0 tokens: the model's files do not say
        self._pricing.admit(admission, [image.tokens for image in prepared if image.tokens])
        return self._pieces(skeleton, prepared, admission)

    def _pieces(
        self, skeleton: request_body.ParsedBody, prepared: list[PreparedImage], admission: Admission
    ) -> engine_io.BodyPayload:
        """The body to send; with the one as it came, where the engine may refuse what was prepared."""
        parts = skeleton.images
        join = partial(request_body.rebuild, skeleton, ask_usage=admission.shape.ask_usage)
        if not prepared:
            return engine_io.BodyPayload(join({}), admission.sent)
        came = all(part.data for part in parts)  # whether the originals are here, also of images behind links
        if came and self._refusals.passing:  # perhaps since these were prepared
            return engine_io.BodyPayload(join(inline.originals(parts, prepared)), admission.sent)
        name = partial(inline.cache_name, self._image_key, admission.tenant) if self._engine_kind == "vllm" else None
        data = engine_io.BodyPayload(join(inline.replacements(parts, prepared, name)), admission.sent)
        data.form = inline.form_of(prepared)
        if came and data.form and self._refusals.tries(data.form, data.size or 0):
            # the request's time of sending stays that of its first attempt
            data.original = lambda: engine_io.BodyPayload(join(inline.originals(parts, prepared)), lambda: None)
        return data

    async def _admitted(
        self, request: web.BaseRequest, admission: Admission, data: engine_io.BodyPayload, id: str
    ) -> web.StreamResponse:
        async with admission.abortable(), self._slots.acquire(admission):
            self._desk.check(time.monotonic())
            passed = self._to_engine(request, id, admission.trace, data.size)
            with closing(await self._send(request, passed, data)) as answer:
                admission.status = answer.status
                if not await self._refusals.refuses(answer, data):
                    data.original = None
                    return await self._answer(request, answer, admission, id)
            return await self._as_it_came(request, admission, data, id)

    async def _as_it_came(
        self, request: web.BaseRequest, admission: Admission, refused: engine_io.BodyPayload, id: str
    ) -> web.StreamResponse:
        """The answer to a request whose prepared images were refused: to the client's own."""
        assert refused.original is not None
        data, status = refused.original(), admission.status
        passed = self._to_engine(request, id, admission.trace, data.size)
        with closing(await self._send(request, passed, data)) as answer:
            admission.status = answer.status
            self._refusals.ended(status, answer)
            return await self._answer(request, answer, admission, id)

    async def _prepare(self, skeleton: request_body.ParsedBody, admission: Admission) -> list[PreparedImage]:
        """What became of each image; nothing where images are off."""
        parts = skeleton.images
        if self._images is None or not parts:
            return []
        passing = self._refusals.passing
        shm = not passing and self._shm is not None and self._engine_kind == "vllm" and self._shm()
        started = time.monotonic()
        try:
            prepared = await inline.prepare(
                self._images, parts, self._desk.emit, admission.id, admission.tenant, shm=shm,
                fetch=self._fetch, passing=passing, keep=self._refusals.tries(inline.SHM if shm else inline.INLINE),
            )  # fmt: skip
        finally:
            admission.image_seconds = time.monotonic() - started
        return prepared

    async def _answer(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, admission: Admission, id: str
    ) -> web.StreamResponse:
        """The engine's answer to work."""
        ours = {"x-sidecar-mu": f"{admission.mu:.4f}", "x-sidecar-overhead-ms": f"{admission.overhead * 1e3:.3f}"}
        if headers.wants_price(request.headers):
            admission.price = partial(self._pricing.milli, admission)
        asked = admission.price is not None or (admission.shape.ask_usage and answering.is_stream(answer))
        changed = asked and answering.is_plain(answer) and answering.is_read(answer)
        passed = self._to_client(request, answer, id, ours, "content-length" if changed else "")
        try:
            return await answering.pass_on(request, answer, admission, passed)
        except outcomes.EngineBroke:
            if admission.begun is None:  # the client can still be told
                raise self._broken() from None
            raise

    async def _preprocessed(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._preprocess is None:
            raise ImagesOff(
                "images are off; start the sidecar with --images inline and --model DIR to use /v1/preprocess"
            )
        return await self._preprocess(request)

    # --- to the engine ---

    async def _send(self, request: web.BaseRequest, passed: headers.Headers, data: Any) -> aiohttp.ClientResponse:
        """The head of the engine's answer. Whoever gets it closes it: left early, its connection closes too."""
        path = engine_io.origin_form(request.raw_path)
        url = engine_io.target(self._settings.engine, path)
        try:
            return await self._engine.request(request.method, url, passed, data)
        except client_io.BREAKS as e:
            raise self._broken(e) from None

    def _broken(self, error: BaseException | None = None) -> RequestError:
        """The engine broke before the client got anything: what the client is told."""
        if self._desk.verdict == "stalled" and not isinstance(error, aiohttp.ClientConnectorError):
            return outcomes.stalled()
        if isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
            return EngineUnreachable("the engine does not accept connections; it may be starting or restarting")
        return EngineUnreachable("the engine closed the connection before it answered")

    def _to_engine(self, request: web.BaseRequest, id: str, trace: Trace | None, length: int | None) -> headers.Headers:
        return headers.to_engine(request.headers, id=id, remote=request.remote or "", trace=trace, length=length)

    def _to_client(
        self,
        request: web.BaseRequest,
        answer: aiohttp.ClientResponse,
        id: str,
        ours: dict[str, str] | None = None,
        drop: str = "",
    ) -> headers.Headers:
        load = headers.orca(request.headers, self._published)
        return headers.to_client(answer.headers, {"x-request-id": id, **load, **(ours or {})}, drop=drop)

    def _trace(self, request: web.BaseRequest) -> Trace | None:
        """Our span of this request; None where tracing is off."""
        if not self._settings.otlp_endpoint:
            return None
        given = request.headers.get("traceparent", "")
        return parse_traceparent(given, request.headers.get("tracestate", "")) or new_trace()


def _refusal(error: RequestError, id: str) -> web.Response:
    extra = {} if error.retry_after is None else headers.retry_after(error.retry_after)
    response = web.json_response(error.body(), status=error.status, headers={"x-request-id": id, **extra})
    if isinstance(error, BodyTooLarge):
        response.force_close()  # the rest of the body is not worth reading
    return response
