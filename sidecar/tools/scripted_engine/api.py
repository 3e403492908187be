"""The scripted engine's HTTP API: vLLM's paths, and `/faults`.

A client that disconnects ends its handler's stream block, which aborts the sequence. Every response and every chunk
waits for the active faults; `/faults` itself never does.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Rows
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from sidecar.tools.scripted_engine import admin_api, responses
from sidecar.tools.scripted_engine.core import EngineCore, TokenStream
from sidecar.tools.scripted_engine.faults import FAULTS, FaultError, Faults
from sidecar.tools.scripted_engine.metrics import GARBAGE_PAGE, EngineMetrics
from sidecar.tools.scripted_engine.requests import CompletionRequest, RequestRefused, bad_request, parse_request
from sidecar.tools.scripted_engine.responses import CHAT, COMPLETION, AnswerForm
from sidecar.tools.scripted_engine.scheduler import ScheduledSequence

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
VERSION = "0.32.0+scripted"
MAX_BODY_BYTES = 256 << 20
# Bound on the simulated preprocessing of one request.
MAX_IMAGE_S = 60.0
CORE_DEAD = RequestRefused(500, "InternalServerError", "EngineCore encountered an issue.")
ENGINE_LOADING = RequestRefused(503, "ServiceUnavailableError", "The engine is starting.")
NO_PNM = RequestRefused(500, "InternalServerError", "The image format Pnm is not supported")
QUEUE_FULL = RequestRefused(503, "ServiceUnavailableError", "The waiting queue is full.")


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything the handlers use."""

    model: str
    seed: int
    capacity: int
    image_seconds_per_pixel: float
    cores: Rows[EngineCore]
    faults: Faults
    metrics: EngineMetrics
    preprocessor: Executor  # one thread, as vLLM's


def application(parts: EngineParts) -> web.Application:
    """All routes, behind the gate of the faults."""
    api = EngineApi(parts)
    app = web.Application(middlewares=[api.gate], client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get("/health", api.health),
            web.get("/version", api.version),
            web.get("/v1/models", api.models),
            web.get("/metrics", api.metrics),
            *admin_api.routes(parts.faults),
            web.post("/v1/chat/completions", api.complete("chat", CHAT)),
            web.post("/v1/completions", api.complete("completions", COMPLETION)),
            web.post("/v1/embeddings", api.embeddings),
            web.get("/faults", api.list_faults),
            web.post("/faults", api.start_fault),
            web.delete("/faults", api.clear_faults),
        ]
    )
    return app


class EngineApi:
    """The handlers. State: the faults, the cores, and the lock of the `serial_http` fault."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._faults = parts.faults
        self._turn = asyncio.Lock()

    @web.middleware
    async def gate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Apply the faults of the whole API before and after the handler; turn refusals into vLLM's error bodies."""
        if request.path == "/faults":
            return await handler(request)
        await self._wait_until_answering()
        try:
            if self._faults.behaviour.loading and request.path != "/version":
                raise ENGINE_LOADING
            if self._faults.behaviour.serial:
                async with self._turn:
                    response = await handler(request)
            else:
                response = await handler(request)
        except RequestRefused as refusal:
            response = web.json_response(refusal.body(), status=refusal.status)
        if not response.prepared:
            await self._wait_until_answering()
        return response

    async def _wait_until_answering(self) -> None:
        await self._faults.until(lambda behaviour: behaviour.answering)

    # --- state ---

    async def health(self, _: web.Request) -> web.Response:
        behaviour = self._faults.behaviour
        if behaviour.health_delay:
            await asyncio.sleep(behaviour.health_delay)
        return web.Response(status=behaviour.health_status)

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def models(self, _: web.Request) -> web.Response:
        model = self._parts.model
        card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "scripted", "root": model}
        card |= {"parent": None, "max_model_len": self._parts.capacity}
        return web.json_response({"object": "list", "data": [card]})

    async def metrics(self, request: web.Request) -> web.Response:
        behaviour = self._faults.behaviour
        if behaviour.metrics == "none":
            raise RequestRefused(404, "NotFoundError", "Not Found")
        if behaviour.metrics == "garbage":
            return web.Response(body=GARBAGE_PAGE, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        body, content_type = self._parts.metrics.page(behaviour, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    # --- work ---

    def complete(self, route: str, form: AnswerForm) -> Handler:
        """The handler of one completion route."""

        async def handler(request: web.Request) -> web.StreamResponse:
            completion = await self._read(route, request)
            id = form.prefix + (request.headers.get("X-Request-Id", "")[:200] or uuid.uuid4().hex)
            with self._core().admit(
                ScheduledSequence(completion.prompt, completion.limit, completion.blocks, completion.finish)
            ) as stream:
                answer = CompletionAnswer(form, id, completion, stream, self._parts)
                return await (answer.stream_to(request) if completion.stream else answer.whole())

        return handler

    async def embeddings(self, request: web.Request) -> web.Response:
        completion = await self._read("embeddings", request)
        with self._core().admit(
            ScheduledSequence(completion.prompt, 0, completion.blocks, completion.finish)
        ) as stream:
            await stream.more(0)
            return web.json_response(responses.embedding(f"embd-{uuid.uuid4().hex}", int(time.time()), completion))

    async def _read(self, route: str, request: web.Request) -> CompletionRequest:
        behaviour, parts = self._faults.behaviour, self._parts
        if behaviour.error:
            raise CORE_DEAD
        capacity = None if behaviour.oversized else parts.capacity
        body = await request.read()
        if not behaviour.pnm and b"data:image/x-portable-" in body:
            raise NO_PNM
        completion = parse_request(route, body, parts.model, parts.seed, capacity)
        seconds = min(completion.pixels * parts.image_seconds_per_pixel, MAX_IMAGE_S)
        if seconds:
            await asyncio.get_running_loop().run_in_executor(parts.preprocessor, time.sleep, seconds)
        return completion

    def _core(self) -> EngineCore:
        """The core with the fewest open requests among those with room in the queue."""
        free = [core for core in self._parts.cores if core.scheduler.has_room()]
        if not free:
            raise QUEUE_FULL
        return min(free, key=lambda core: core.open)

    # --- faults ---

    async def list_faults(self, _: web.Request) -> web.Response:
        rows = [
            {
                "kind": kind,
                "text": row.text,
                "modes": row.modes,
                "alarms": row.alarms,
                "parameter": row.parameter and {"name": row.parameter.name, "default": row.parameter.default},
            }
            for kind, row in FAULTS.items()
        ]
        return web.json_response({"active": self._faults.active, "faults": rows})

    async def start_fault(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
            kind, seconds = str(body.pop("kind", "")), body.pop("seconds", None)
            self._faults.start(kind, seconds, **body)
        except FaultError as e:
            return web.json_response(bad_request(str(e)).body(), status=400)
        except (ValueError, AttributeError, TypeError):
            wrong = bad_request('expected a JSON object such as {"kind": "freeze", "seconds": 20}')
            return web.json_response(wrong.body(), status=400)
        return web.json_response({"active": self._faults.active})

    async def clear_faults(self, request: web.Request) -> web.Response:
        self._faults.clear(request.query.get("kind"))
        return web.json_response({"active": self._faults.active})


class CompletionAnswer:
    """One completion being delivered to its client."""

    def __init__(
        self, form: AnswerForm, id: str, completion: CompletionRequest, stream: TokenStream, parts: EngineParts
    ) -> None:
        self._form, self._id, self._completion, self._stream = form, id, completion, stream
        self._created = int(time.time())
        self._faults = parts.faults
        self._words = responses.words(completion, parts.seed, parts.faults.behaviour.text)
        self._opened = not form.opens

    async def whole(self) -> web.Response:
        """Respond with all tokens at once, in JSON."""
        seen = 0
        while not self._stream.done:
            seen = await self._stream.more(seen)
        await self._wait_for_piece(1)
        text = self._words(self._stream.ready)
        return web.json_response(
            responses.whole(
                self._form, self._id, self._created, self._completion, text, self._usage(self._stream.ready)
            )
        )

    async def stream_to(self, request: web.Request) -> web.StreamResponse:
        """Send tokens as server-sent events as they are generated."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        seen = pieces = 0
        while seen < self._completion.limit:
            ready = await self._stream.more(seen)
            await self._wait_for_piece(pieces)
            await response.write(self._events(seen, ready))
            seen, pieces = ready, pieces + 1
        await response.write(self._closing(seen))
        await response.write_eof()
        return response

    async def _wait_for_piece(self, pieces: int) -> None:
        await self._faults.until(
            lambda behaviour: behaviour.answering and (behaviour.max_pieces is None or pieces < behaviour.max_pieces)
        )

    def _events(self, seen: int, ready: int) -> bytes:
        """The events of the tokens from `seen` to `ready`; a chat starts with its role."""
        first = b"" if self._opened else self._chunk([responses.opening()], 0)
        self._opened = True
        finish = self._completion.finish if ready >= self._completion.limit else None
        return first + self._chunk([responses.choice(self._form, self._words(ready - seen), finish)], ready)

    def _closing(self, seen: int) -> bytes:
        if not self._completion.include_usage:
            return responses.DONE
        return self._encode([], usage=self._usage(seen)) + responses.DONE

    def _chunk(self, choices: list[dict[str, Any]], generated: int) -> bytes:
        more = {"usage": self._usage(generated)} if self._completion.continuous_usage else {}
        return self._encode(choices, **more)

    def _encode(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return responses.chunk(self._form, self._id, self._created, self._completion.model, choices, **more)

    def _usage(self, generated: int) -> dict[str, Any]:
        return responses.usage(self._completion, generated, self._stream.sequence.cached)
