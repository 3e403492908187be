"""The data path: read, prepare, admit, send, stream, settle.

Rules: engine work is admitted, anything else passes through unread (passthrough.py). A body of work is read whole; an
answer goes out chunk by chunk as it comes. When the client leaves, the handler is cancelled,
and leaving the exchange closes the connection to the engine. The sidecar's errors become answers in one place,
`handle`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from sidecar.engines.image_loading import SIZE_UNCHECKED
from sidecar.engines.registry import KINDS
from sidecar.errors import Draining, ImagesOff, Internal, RequestError, place_of
from sidecar.events import AbortRequests, CanariesOver, Command, Event, HttpRequest, LoadReport, MetricsPage
from sidecar.images.vllm_plugin import NO_HANDOFFS, Handoffs
from sidecar.labels import printable
from sidecar.load import api_routes, audio_upload, request_shape
from sidecar.load.api_routes import REALTIME, Api
from sidecar.relay import (
    admin_paths,
    body_thread,
    client_io,
    compression,
    engine_io,
    headers,
    metrics_page,
    outcomes,
    passthrough,
    request_body,
    response,
    session,
    websocket,
)
from sidecar.relay.admission import Admission
from sidecar.relay.answer_details import AnswerReader
from sidecar.relay.canary_gate import CanaryGate
from sidecar.relay.concurrency import MAX_QUEUED, ConcurrencyLimit, share_of
from sidecar.relay.engine_io import BodyPayload
from sidecar.relay.http.body import read_within
from sidecar.relay.http.client import ClientConnection, Request
from sidecar.relay.http.engine import Answer, EngineError
from sidecar.relay.http.head import Fields
from sidecar.relay.http.server import Server
from sidecar.relay.media import image_refusals, inline
from sidecar.relay.open_requests import LOAD_REPORT_STALE_S, OpenRequests
from sidecar.relay.pricing.charge import Pricing
from sidecar.render.protocol import PATHS as RENDER_PATHS
from sidecar.runtime.memory_limit import memory_limit
from sidecar.settings import Settings
from sidecar.signals.engine_address import EngineAddress
from sidecar.trace_context import Sampler, parse_traceparent, sampler_of

if TYPE_CHECKING:  # a relay without images, or without TLS, does not load them
    from sidecar.images.service import ImageService, PreparedImage
    from sidecar.relay.http.certificate import Certificate
    from sidecar.relay.render_api import RenderApi

_log = logging.getLogger(__name__)

CUT_S = 1.0  # for error events to clients when a drain runs out of time
MAX_PATH_CHARS = 128  # of a span's attribute
BODY_SHARE = 0.25  # of the container's memory, for request bodies: each is held up to three times while it is prepared


class Relay:
    """Handles every request of relay process `index`.

    `preprocess` serves /v1/preprocess if images are on, `fetch` fetches images behind links, `render` renders prompts,
    and `handoffs` returns what vLLM takes through shared memory now.
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
        preprocess: Callable[[Request], Awaitable[None]] | None = None,
        fetch: inline.Fetch | None = None,
        render: RenderApi | None = None,
        handoffs: Callable[[], Handoffs] | None = None,
        max_queued: int = MAX_QUEUED,
        client_stall: float = client_io.CLIENT_STALL_S,
    ) -> None:
        self._settings = settings
        self._images = images
        self._preprocess = preprocess
        self._fetch = fetch if images is not None else None
        self._render = render
        self._handoffs = handoffs
        self._engine_kind = settings.engine_kind if settings.engine_kind != "auto" else ""
        self._image_key = image_key or secrets.token_bytes(32)
        self._load_report: LoadReport | None = None
        self._reported_at = -LOAD_REPORT_STALE_S
        self._gate = CanaryGate()
        self._open_requests = OpenRequests(emit, client_stall)
        slots = share_of(settings.max_concurrent, settings.workers, index)
        self._concurrency = ConcurrencyLimit(slots, self._open_requests, max_queued)
        self._refusals = image_refusals.Refusals()
        self._pricing = pricing
        self._metrics_page = metrics_page.MergedMetricsPage(emit)
        place = engine_io.place_of(EngineAddress(settings.engine, settings.engine_ca))
        self._engine = engine_io.EngineClient(place, self._open_requests)
        self._sampler = sampler_of(os.environ, settings.otlp_endpoint)
        self._tenant_header = settings.tenant_header.lower().encode("latin-1")
        self._budget = client_io.BodyBudget(body_budget(settings.max_body_bytes, settings.workers))
        self.close = self._engine.close
        self.certificate: Certificate | None = None  # of this server's port, if it speaks TLS
        if settings.tls_cert:
            from sidecar.relay.http.certificate import Certificate

            self.certificate = Certificate(settings.tls_cert, settings.tls_key)
        self.server = Server(self.handle, self._refuse_connection, self._on_check)
        self.is_draining = False

    # --- commands and life ---

    def on_command(self, command: Command) -> None:
        """Apply what the control process published."""
        match command:
            case LoadReport():
                self._load_report, self._reported_at = command, time.monotonic()
                self._engine_kind = command.engine_kind or self._engine_kind
                self._open_requests.on_verdict(command.verdict, time.monotonic())
                self._pricing.on_load_report(command)
                self._refusals.on_load_report(command)
                if self._images is not None:
                    self._images.allow_gpu(command.verdict in inline.GPU_VERDICTS)
            case CanariesOver():
                self._gate.on_command(command)
            case AbortRequests():
                self._open_requests.abort(command.ids, command.code)
            case MetricsPage():
                self._metrics_page.put(command)

    def _on_check(self, now: float) -> None:
        self._engine.pool.sweep(now)
        if self.certificate is not None:
            self.certificate.refresh()

    @property
    def open(self) -> int:
        """Client requests under way."""
        return sum(connection.is_busy for connection in self.server.connections)

    async def drain(self, seconds: float) -> None:
        """Close idle connections and wait for open requests, at most `seconds`; cut off what is left."""
        self.is_draining = True
        if not await self.server.drain(seconds):
            _log.warning("%d requests did not end within %.0f s and are cut off", self.open, seconds)
            self._open_requests.cut()
            await self.server.drain(CUT_S)
        await self.server.close()

    # --- one request ---

    async def handle(self, request: Request) -> None:
        """Answer one request; the only place where the sidecar's errors become answers."""
        id = headers.request_id(request.fields) or self._open_requests.new_id()
        if self.is_draining:
            request.keep_alive = False
        try:
            if self.is_draining:
                raise Draining("this server is shutting down; send the request again")
            await self._dispatch(request, id)
        except outcomes.ClientStalled:
            client_io.hang_up(request, at_once=True)
        except (outcomes.ClientGone, outcomes.EngineBroke):
            client_io.hang_up(request)
        except RequestError as error:
            client_io.refuse(request, error, id)
        except Exception as e:  # noqa: BLE001  # the border: a defect costs one request, and its place is logged
            _log.error("request failed: %s at %s", type(e).__name__, place_of(e))
            client_io.refuse(request, Internal("internal error of the sidecar"), id)

    def _refuse_connection(self, connection: ClientConnection, error: RequestError) -> None:
        """Answer what is no request."""
        request = Request(connection, "", b"", "1.1", Fields())
        client_io.refuse(request, error, self._open_requests.new_id())

    async def _dispatch(self, request: Request, id: str) -> None:
        path = engine_io.path_of(request.target)
        admin_paths.check(self._settings.admin_paths, request.method, path, request.peer)
        is_session = websocket.is_wanted(request)
        api = REALTIME if is_session else api_routes.api_of(request.method, path, has_body=request.has_body)
        if api is not None:
            await self._work(request, api, id)
            return
        if request.method == "POST":
            if path == "/v1/preprocess":
                if self._preprocess is None:
                    raise ImagesOff(
                        "images are off; start the sidecar with --images inline and --model DIR to use /v1/preprocess"
                    )
                with self._budget.reading() as held:
                    held.grow(request.fields.length() or self._settings.image_max_bytes)
                    await self._preprocess(request)
                return
            if self._render is not None and path in RENDER_PATHS and self._engine_kind == "vllm":
                await self._rendered(request, id, RENDER_PATHS[path], self._render)
                return
        elif path == "/metrics" and request.method == "GET" and (page := await self._metrics_page.get()) is not None:
            fields = [(b"content-type", metrics_page.CONTENT_TYPE.encode()), (b"x-request-id", id.encode())]
            if self._engine_kind and not KINDS[self._engine_kind].series:  # control does not scrape it
                page = metrics_page.join(await self._engines_page(request, id), page)
            request.reply.begin(200, b"OK", fields, body=page)
            return
        await self._pass(request, id)

    async def _pass(self, request: Request, id: str, data: bytes | None = None) -> None:
        """Pass a request through; `data` is its body, if that has been read."""
        await passthrough.forward(
            request,
            id,
            self._engine,
            self._open_requests,
            self._budget,
            self._settings.max_body_bytes,
            self._load_report,
            self._open_gate(),
            data,
        )

    async def _rendered(self, request: Request, id: str, api: str, render: RenderApi) -> None:
        """Answer a request to render here, or pass it to the engine."""
        with self._budget.reading() as held:
            body = await client_io.read(request, self._settings.max_body_bytes, held)
            process = self._load_report.process if self._load_report is not None else 0
            given = headers.request_id(request.fields)
            made = await render.answer(request, api, body, given, self._engine, process)
            if made is None:
                await self._pass(request, id, body)
                return
            fields = [client_io.JSON_TYPE, (b"x-request-id", id.encode())]
            request.reply.begin(200, b"OK", fields, body=made)

    def _open_gate(self) -> CanaryGate | None:
        """What calls wait for that stop the engine; None while there is no control process, and so no canary."""
        return self._gate if time.monotonic() - self._reported_at < LOAD_REPORT_STALE_S else None

    async def _engines_page(self, request: Request, id: str) -> bytes:
        """The engine's own metrics page; empty where it has none."""
        try:
            with await self._engine.send(request, id, None, plain=True) as answer:
                found = await read_within(answer.body, metrics_page.MAX_BYTES) if answer.status == 200 else b""
        except (RequestError, EngineError):
            return b""
        return found or b""

    async def _work(self, request: Request, api: Api, id: str) -> None:
        """Engine work: one admission, settled before its client gets an error."""
        tenant = headers.tenant(request.fields, self._tenant_header)
        is_clients = bool(headers.request_id(request.fields))  # then it may not be unique
        admission = Admission(self._open_requests.new_id() if is_clients else id, api.route, tenant, None)
        if self._sampler is not None:
            self._trace(request, admission, self._sampler)
        try:
            with self._budget.reading() as held, self._open_requests.settling(admission):
                self._open_requests.check(time.monotonic())
                if api is REALTIME:
                    report = self._load_report
                    pricing, engine, requests = self._pricing, self._engine, self._open_requests
                    await session.serve(request, id, admission, engine, requests, pricing, report)
                    return
                await self._admitted(request, admission, await self._ready(request, admission, api, held), id, held)
        except RequestError as e:
            if not request.reply.begun:
                raise
            await response.end_with_error(request, admission, e)
        finally:
            # the answer, which waits for this call to return, goes out before anything is learned from it
            asyncio.get_running_loop().call_soon(self._pricing.settle, admission)
            if self._images is not None:
                self._images.release(admission.id)

    def _trace(self, request: Request, admission: Admission, sampler: Sampler) -> None:
        """Give a request its trace, and what a span of it needs if it is sampled."""
        given, state = request.fields.get(b"traceparent"), request.fields.get(b"tracestate")
        admission.trace = trace = sampler.sample(parse_traceparent(given, state))
        if trace.sampled:
            path = request.target.partition(b"?")[0].decode("latin-1")
            admission.http = HttpRequest(
                request.method, printable(path, MAX_PATH_CHARS), request.scheme.decode(), request.version
            )
            admission.answer = AnswerReader()

    async def _ready(self, request: Request, admission: Admission, api: Api, held: client_io.HeldBytes) -> BodyPayload:
        """The body to send: read, charged, its images prepared, and admitted."""
        body = await client_io.read(request, self._settings.max_body_bytes, held)
        admission.read_at = time.monotonic()
        media_type = request.fields.get(b"content-type", "")
        parsed = request_body.ParsedBody(body)
        if audio_upload.is_upload(api, media_type):
            admission.shape = audio_upload.describe_upload(body, media_type, api)
        elif coding := next(filter(None, map(request.fields.get, request_body.CODING_FIELDS)), ""):
            limit = self._settings.max_body_bytes
            held.grow(len(body) + compression.held_bytes(body, limit))
            scan, size = await body_thread.run(partial(request_body.scan_coded, coding=coding, limit=limit), body)
            admission.describe_unread(scan, size, api)
        elif wide := request_body.wide_coding(body):
            held.grow(3 * len(body))  # its text, and that in UTF-8
            scan, size = await body_thread.run(partial(request_body.scan_wide, coding=wide), body)
            admission.describe_unread(scan, size, api)
        else:
            parse = partial(request_body.parse, links=self._fetch is not None)
            parsed = parse(body) if len(body) <= body_thread.MAX_INLINE_BYTES else await body_thread.run(parse, body)
            api = api_routes.of_form(api, () if parsed.scan is None else parsed.scan.found.members)
            admission.route = api.route
            admission.shape = request_shape.describe(parsed.scan, api, len(body), parsed.sounds)
        estimate = await self._pricing.charge(admission, parsed)
        if self._images is None or not parsed.images:
            self._open_requests.admit(admission, estimate or self._pricing.estimate(admission, []))
            return BodyPayload(
                request_body.rebuild(parsed, {}, ask_usage=admission.shape.ask_usage), admission.mark_sent
            )
        prepared = await self._prepare(self._images, parsed, admission, held)
        # 0 tokens: the model's files do not state it
        image_tokens = [image.tokens for image in prepared if image.tokens]
        self._open_requests.admit(admission, self._pricing.estimate(admission, image_tokens))
        return self._payload(parsed, prepared, admission)

    async def _prepare(
        self, images: ImageService, parsed: request_body.ParsedBody, admission: Admission, held: client_io.HeldBytes
    ) -> list[PreparedImage]:
        """The request's images, prepared; what links bring counts as its body does."""
        handoffs, passing = self._ways()
        emit, started = self._open_requests.emit, time.monotonic()

        def on_fetched(chars: int) -> None:
            client_io.check_size(len(parsed.body) + chars, self._settings.max_body_bytes)
            held.grow(len(parsed.body) + chars)

        try:
            return await inline.prepare(
                images,
                parsed,
                emit,
                admission,
                handoffs=handoffs,
                fetch=self._fetch,
                passing=passing,
                on_fetched=on_fetched,
            )
        finally:
            admission.image_seconds = time.monotonic() - started

    def _ways(self) -> tuple[Handoffs, str]:
        """What the engine takes through shared memory, and why images pass; "" if they need not.

        An engine's plug-in that offers to take tensors has compared its sizes with those of the model's files: then no
        canary image has to, which cannot where images at the model's limit have too many tokens.
        """
        passing = self._refusals.passing
        if self._handoffs is None or self._engine_kind != "vllm" or passing not in ("", SIZE_UNCHECKED):
            return NO_HANDOFFS, passing
        handoffs = self._handoffs()
        return handoffs, passing if handoffs.tensors is None else ""

    def _payload(
        self, parsed: request_body.ParsedBody, prepared: list[PreparedImage], admission: Admission
    ) -> BodyPayload:
        """The body to send; with the original one, if the engine may refuse the prepared images."""
        parts = parsed.images
        rebuild = partial(request_body.rebuild, parsed, ask_usage=admission.shape.ask_usage)

        sent = admission.mark_sent
        if not prepared:
            return BodyPayload(rebuild({}), sent)
        has_originals = all(part.data for part in parts)  # also of images behind links
        if has_originals and self._refusals.passing not in ("", SIZE_UNCHECKED):  # perhaps since these were prepared
            return BodyPayload(rebuild(inline.originals(parts, prepared)), sent)
        name = partial(inline.cache_name, self._image_key, admission.tenant) if self._engine_kind == "vllm" else None
        data = BodyPayload(rebuild(inline.replacements(parts, prepared, name)), sent)
        data.form = inline.form_of(prepared)
        if has_originals and data.form and self._refusals.is_trial(data.form, data.size):
            # the request's sending time stays that of its first attempt
            data.original = lambda: BodyPayload(rebuild(inline.originals(parts, prepared)))
        return data

    async def _admitted(
        self, request: Request, admission: Admission, data: BodyPayload, id: str, held: client_io.HeldBytes
    ) -> None:
        """The answer to `data`; if its prepared images are refused, that to the original body."""
        task = request.connection.task
        assert task is not None  # it runs this
        with admission.abortable(task):
            await self._concurrency.acquire(admission)
            try:
                self._open_requests.check(time.monotonic())
                with await self._send(request, data, admission, id) as answer:
                    if data.original is None or not await self._refusals.is_refusal(answer, data):
                        data.original = None
                        held.release()
                        await self._respond(request, answer, admission, id)
                        return
                refused_with = admission.status
                with await self._send(request, data.original(), admission, id) as answer:
                    self._refusals.on_original(refused_with, answer)
                    held.release()
                    await self._respond(request, answer, admission, id)
            finally:
                self._concurrency.release()

    async def _send(self, request: Request, body: BodyPayload, admission: Admission, id: str) -> Answer:
        """The engine's answer to a body."""
        answer = await self._engine.send(request, id, body, trace=admission.trace, plain=admission.shape.ask_usage)
        admission.status = answer.status
        return answer

    async def _respond(self, request: Request, answer: Answer, admission: Admission, id: str) -> None:
        """Send the engine's answer to the client."""
        overhead = admission.overhead(time.monotonic())
        ours = {b"x-sidecar-mu": b"%.4f" % admission.mu, b"x-sidecar-overhead-ms": b"%.3f" % (overhead * 1e3)}
        if headers.wants_price(request.fields):
            admission.price = partial(self._pricing.price_milli, admission)
        hides_usage = admission.shape.ask_usage and response.is_stream(answer)
        decoder = response.decoder_of(answer) if hides_usage else None
        drop: tuple[bytes, ...] = ()
        if decoder is not None:
            drop = b"content-length", b"content-encoding"
        elif (admission.price is not None or hides_usage) and response.can_change(answer):
            drop = (b"content-length",)
        passed = headers.to_client(request.fields, answer.fields, id, self._load_report, ours, drop=drop)
        try:
            await response.ResponseSender(request, answer, passed, admission, self._open_requests, decoder).send()
        except outcomes.EngineBroke:
            if not request.reply.begun:  # the client can still get an error
                raise outcomes.engine_error(None, self._open_requests.verdict) from None
            raise


def body_budget(max_body_bytes: int, workers: int) -> int:
    """Bytes of request bodies that one relay process may hold: a share of the memory that the container may use."""
    return max(max_body_bytes, int(memory_limit() * BODY_SHARE / workers))
