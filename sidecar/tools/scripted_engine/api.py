"""The scripted engine's HTTP API: vLLM's paths, and `/faults`.

A client that disconnects ends its handler's stream block, which aborts the sequence. Every response and every chunk
waits for the active faults; `/faults` itself never does.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Rows
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from sidecar.tools.scripted_engine import admin_api, responses
from sidecar.tools.scripted_engine.answers import CompletionAnswer, NativeAnswer
from sidecar.tools.scripted_engine.core import EngineCore
from sidecar.tools.scripted_engine.faults import FAULTS, FaultError, Faults
from sidecar.tools.scripted_engine.hang_catalogue import ALARMS, MODES, numbers_of
from sidecar.tools.scripted_engine.metrics import GARBAGE_PAGE, EngineMetrics
from sidecar.tools.scripted_engine.requests import (
    CompletionRequest,
    RequestRefused,
    bad_request,
    native_body,
    parse_request,
)
from sidecar.tools.scripted_engine.responses import CHAT, COMPLETION, AnswerForm
from sidecar.tools.scripted_engine.scheduler import ScheduledSequence
from sidecar.tools.scripted_engine.served_models import ServedModels
from sidecar.tools.scripted_engine.timed_routes import timed_routes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
VERSION = "0.32.0+scripted"
MAX_BODY_BYTES = 256 << 20
# Bound on the simulated preprocessing of one request.
MAX_IMAGE_S = 60.0
CORE_DEAD = RequestRefused(500, "InternalServerError", "EngineCore encountered an issue.")
ENGINE_LOADING = RequestRefused(503, "ServiceUnavailableError", "The engine is starting.")
NO_PNM = RequestRefused(500, "InternalServerError", "The image format Pnm is not supported")
REFUSED = ("NotFoundError", "Not Found")
REFUSALS = {500: (CORE_DEAD.kind, str(CORE_DEAD)), 503: ("ServiceUnavailableError", "The engine takes no work.")}
WORK_PATHS = ("/v1/", "/api/")
# Connections that are distinguished.
MAX_CLIENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything the handlers use."""

    models: ServedModels
    seed: int
    capacity: int
    answer_tokens: int  # of an answer without a limit; 0: a seeded number
    by_priority: bool  # the lowest priority of a request goes first; else priorities are ignored
    full_status: int  # of requests beyond the queue
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
            *timed_routes(parts.faults),
            web.post("/v1/chat/completions", api.complete("chat", CHAT)),
            web.post("/v1/completions", api.complete("completions", COMPLETION)),
            web.post("/api/chat", api.complete("chat", CHAT, NativeAnswer, native_body)),
            web.post("/api/generate", api.complete("completions", COMPLETION, NativeAnswer, native_body)),
            web.post("/v1/embeddings", api.embeddings),
            web.get("/faults", api.list_faults),
            web.post("/faults", api.start_fault),
            web.delete("/faults", api.clear_faults),
        ]
    )
    return app


class EngineApi:
    """The handlers. State: the faults, the cores, the lock of `serial_http`, the connections of `half_deaf`."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._faults = parts.faults
        self._turn = asyncio.Lock()
        self._processes: dict[Any, bool] = {}  # whether the second API process has a connection, by its address
        self._random = random.Random(parts.seed)

    @web.middleware
    async def gate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Apply the faults of the whole API before and after the handler; turn refusals into vLLM's error bodies."""
        if request.path == "/faults":
            return await handler(request)
        second = self._is_of_second_process(request)
        await self._faults.until(lambda behaviour: behaviour.answering and not (behaviour.deaf and second))
        try:
            if self._faults.behaviour.loading and request.path != "/version":
                raise ENGINE_LOADING
            if request.method == "POST" and request.path.startswith(WORK_PATHS):
                self._refuse_work(request.path)
            if self._faults.behaviour.serial:
                async with self._turn:
                    response = await handler(request)
            else:
                response = await handler(request)
        except RequestRefused as refusal:
            response = web.json_response(refusal.body(), status=refusal.status)
        if not response.prepared:
            await self._faults.until(lambda behaviour: behaviour.answering)
        return response

    def _is_of_second_process(self, request: web.Request) -> bool:
        """Whether the second of two API processes has accepted this connection: the kernel chooses one by a hash."""
        if len(self._processes) >= MAX_CLIENTS:
            self._processes.clear()
        address = request.transport and request.transport.get_extra_info("peername")
        return self._processes.setdefault(address, self._random.random() < 0.5)

    def _refuse_work(self, path: str) -> None:
        """Raise what a fault makes of all work on this path."""
        behaviour = self._faults.behaviour
        if behaviour.memory_released:
            self._faults.start("crash")
            raise CORE_DEAD
        if behaviour.error:
            raise RequestRefused(behaviour.error, *REFUSALS.get(behaviour.error, REFUSED))
        if behaviour.serves and not path.startswith(behaviour.serves):
            raise RequestRefused(behaviour.unserved_status, *REFUSED)

    # --- state ---

    async def health(self, _: web.Request) -> web.Response:
        behaviour = self._faults.behaviour
        if behaviour.health_delay:
            await asyncio.sleep(behaviour.health_delay)
        return web.Response(status=behaviour.health_status)

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def models(self, _: web.Request) -> web.Response:
        cards = self._parts.models.cards(self._parts.capacity) if self._faults.behaviour.lists_models else []
        return web.json_response({"object": "list", "data": cards})

    async def metrics(self, request: web.Request) -> web.Response:
        behaviour = self._faults.behaviour
        if behaviour.metrics_delay:
            await asyncio.sleep(behaviour.metrics_delay)
        if behaviour.metrics == "none":
            raise RequestRefused(404, "NotFoundError", "Not Found")
        if behaviour.metrics == "garbage":
            return web.Response(body=GARBAGE_PAGE, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        body, content_type = self._parts.metrics.page(behaviour, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    # --- work ---

    def complete(
        self,
        route: str,
        form: AnswerForm,
        answer: type[CompletionAnswer] = CompletionAnswer,
        translate: Callable[[bytes], bytes] = bytes,
    ) -> Handler:
        """The handler of one completion route. `translate` makes OpenAI's form of a body."""

        async def handler(request: web.Request) -> web.StreamResponse:
            completion = await self._read(route, translate(await request.read()))
            id = form.prefix + (request.headers.get("X-Request-Id", "")[:200] or uuid.uuid4().hex)
            with self._core().admit(self._sequence(completion), completion.grammar) as stream:
                made = answer(form, id, completion, stream, self._faults, self._parts.seed)
                return await (made.stream_to(request) if completion.stream else made.whole())

        return handler

    def _sequence(self, completion: CompletionRequest) -> ScheduledSequence:
        parts = self._parts
        return ScheduledSequence(
            completion.prompt,
            completion.limit,
            completion.blocks,
            completion.finish,
            priority=completion.priority if parts.by_priority else 0,
            adapter=completion.model if completion.model in parts.models.adapters else "",
        )

    async def embeddings(self, request: web.Request) -> web.Response:
        completion = await self._read("embeddings", await request.read())
        with self._core().admit(self._sequence(completion)) as stream:
            await stream.more(0)
            return web.json_response(responses.embedding(f"embd-{uuid.uuid4().hex}", int(time.time()), completion))

    async def _read(self, route: str, body: bytes) -> CompletionRequest:
        """The request in `body`, once its model is loaded and its images are prepared."""
        behaviour, parts = self._faults.behaviour, self._parts
        capacity = None if behaviour.oversized else parts.capacity
        if not behaviour.pnm and b"data:image/x-portable-" in body:
            raise NO_PNM
        names = (*parts.models.names, *parts.models.adapters)
        completion = parse_request(route, body, names, parts.seed, capacity, parts.answer_tokens)
        if completion.limit <= 1 and not behaviour.one_token:
            raise bad_request("bootstrap_room is required")
        await parts.models.load(completion.model)
        seconds = min(completion.pixels * parts.image_seconds_per_pixel, MAX_IMAGE_S)
        if seconds:
            await asyncio.get_running_loop().run_in_executor(parts.preprocessor, time.sleep, seconds)
        return completion

    def _core(self) -> EngineCore:
        """The core with the fewest open requests among those with room in the queue."""
        free = [core for core in self._parts.cores if core.scheduler.has_room()]
        if not free:
            raise RequestRefused(self._parts.full_status, "ServiceUnavailableError", "The waiting queue is full.")
        return min(free, key=lambda core: core.open)

    # --- faults ---

    async def list_faults(self, _: web.Request) -> web.Response:
        rows = [
            {
                "kind": kind,
                "text": row.text,
                "modes": numbers_of(kind, MODES),
                "alarms": numbers_of(kind, ALARMS),
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
