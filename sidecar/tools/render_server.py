"""Serve prompts as vLLM would make them: token ids, image hashes, placeholders and grids, without decoding an image.

For routers that choose an engine by prefix. `POST /v1/chat/completions/render` and `/v1/completions/render` answer as
vLLM 0.32 does to `mm_payload: "none"`; `?layout=1` adds each image's final size, grid and tokens. What cannot be
rendered exactly gets 501 with a reason, what the engine would refuse 400.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs

import aiohttp

from sidecar import flags
from sidecar.errors import BadTarget, Internal, RequestError, StartError, UsageError, place_of
from sidecar.flags import address, flag, integer, one_of, size, text
from sidecar.launch.preflight import RENDER_MODULES
from sidecar.relay import client_io, headers
from sidecar.relay.handler import body_budget
from sidecar.relay.http.client import ClientConnection, Request
from sidecar.relay.http.head import Fields
from sidecar.relay.http.server import Server
from sidecar.render.engine_check import EngineFacts, check
from sidecar.render.image_hash import ALGORITHMS
from sidecar.render.protocol import PATHS, RenderCall, RenderSettings
from sidecar.render.workers import RenderWorkers
from sidecar.runtime import cpu_quota, logs
from sidecar.tools.scripted_engine.server import bind_socket

HEALTH_PATHS: Final = ("/health", "/healthz", "/readyz")
BACKLOG: Final = 1024
DRAIN_S: Final = 5.0
ENGINE_TIMEOUT_S: Final = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RenderServerSettings:
    """Settings of `sidecar render`."""

    model: str = flag(
        "",
        flags.existing_dir,
        "Model directory: config.json, preprocessor_config.json, tokenizer.json and its chat template",
        heading="Model",
    )
    engine: str = flag(
        "",
        flags.url,
        "Base URL of one of the engines: at the start its name for the model and its context length are asked for, and "
        "its tokens compared; none: as the next two say",
    )
    engine_key: str = flag("", text, "API key for those questions", secret=True)
    engine_model: str = flag(
        "", text, "The model as the engines' command line names it, which is part of image hashes; none: as --model"
    )
    max_model_len: int = flag(
        0, integer(0, 1 << 31), "The engines' context length; 0: not known, then no sampling_params in answers"
    )
    chat_template: str = flag("", flags.existing_file, "The engines' --chat-template; none: the model's own")
    mm_hasher_algorithm: str = flag("blake3", one_of(*ALGORITHMS), "The engines' --mm-hasher-algorithm")
    listen: tuple[str, int] = flag(("127.0.0.1", 8300), address, "Where the server listens", heading="Server")
    workers: int = flag(0, integer(0, 64), "Number of render worker processes; 0: one per core of the CPU quota")
    max_body_bytes: int = flag(64 << 20, size, "Maximum size of a request body")
    log_level: str = flag("info", one_of("debug", "info", "warning", "error"), "Minimum level of log lines")


class RenderServer:
    """Answers requests to render. Make it within an event loop."""

    def __init__(self, workers: RenderWorkers, facts: EngineFacts, max_body_bytes: int) -> None:
        self._workers = workers
        self._facts = facts
        self._max_body_bytes = max_body_bytes
        self._budget = client_io.BodyBudget(body_budget(max_body_bytes, 1))
        self._started = time.monotonic_ns()
        self._count = 0
        self.server = Server(self.handle, self._refuse_connection)

    async def handle(self, request: Request) -> None:
        """Answer one request; the only place where errors become answers."""
        given = headers.request_id(request.fields)
        self._count += 1
        id = given or f"{self._started:x}-{self._count:x}"
        try:
            await self._dispatch(request, given)
        except RequestError as error:
            client_io.refuse(request, error, id)
        except ConnectionError:
            client_io.hang_up(request)
        except Exception as e:  # noqa: BLE001  # the border: a defect costs one request, and its place is logged
            _log.error("request failed: %s at %s", type(e).__name__, place_of(e))
            client_io.refuse(request, Internal("internal error of the sidecar"), id)

    async def _dispatch(self, request: Request, given_id: str) -> None:
        path, _, query = request.target.decode("latin-1").partition("?")
        if request.method == "GET" and path in HEALTH_PATHS:
            client_io.send_json(request, {"status": "ok", "images": self._workers.no_images or "rendered"})
            return
        api = PATHS.get(path)
        if api is None or request.method != "POST":
            raise BadTarget(f"send POST {' or '.join(PATHS)}, or GET {HEALTH_PATHS[1]}")
        layout = parse_qs(query).get("layout", ["0"])[0] == "1"
        facts = self._facts
        call = RenderCall(api, given_id, facts.model, facts.names, facts.max_model_len, layout)
        with self._budget.reading() as held:
            body = await client_io.read(request, self._max_body_bytes, held)
            made = await self._workers.render(call, body)
        request.reply.begin(200, b"OK", [client_io.JSON_TYPE], body=made)

    def _refuse_connection(self, connection: ClientConnection, error: RequestError) -> None:
        """Answer what is no request."""
        client_io.refuse(Request(connection, "", b"", "1.1", Fields()), error, "")


@contextlib.asynccontextmanager
async def serving(settings: RenderServerSettings) -> AsyncIterator[str]:
    """The server as a block; gives its URL. Raises StartError, also where the model cannot be rendered."""
    chosen = RenderSettings(settings.model, settings.chat_template, settings.mm_hasher_algorithm)
    socket = bind_socket(settings.listen)
    with contextlib.closing(socket):
        async with RenderWorkers(chosen, settings.workers or cpu_quota.quota()) as workers:
            facts = EngineFacts(settings.engine_model or settings.model, settings.max_model_len)
            if settings.engine:
                facts = await _ask_engine(settings, workers)
            ours = RenderServer(workers, facts, settings.max_body_bytes)
            loop = asyncio.get_running_loop()
            accepting = await loop.create_server(ours.server, sock=socket, backlog=BACKLOG)
            if workers.no_images:
                _log.warning("prompts with images get 501: %s", workers.no_images)
            host, port = socket.getsockname()[:2]
            try:
                yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            finally:
                accepting.close()
                await ours.server.drain(DRAIN_S)
                await ours.server.close()


async def _ask_engine(settings: RenderServerSettings, workers: RenderWorkers) -> EngineFacts:
    """What the engine at --engine says of itself. Raises StartError."""
    fields = {"authorization": f"Bearer {settings.engine_key}"} if settings.engine_key else {}
    timeout = aiohttp.ClientTimeout(total=ENGINE_TIMEOUT_S)
    async with aiohttp.ClientSession(headers=fields, timeout=timeout, auto_decompress=True) as http:

        async def ask(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
            method = "GET" if body is None else "POST"
            async with http.request(method, settings.engine + path, json=body) as answer:
                return answer.status, await answer.json(content_type=None)

        try:
            found = await check(ask, workers.render)
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            raise StartError(f"--engine: no answer ({type(e).__name__}); start it first, or omit --engine") from None
    if isinstance(found, str):
        raise StartError(f"--engine: {found}")
    return found


async def _until_signalled(settings: RenderServerSettings) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with serving(settings) as url:
        _log.info("rendering at %s", url)
        await ended.wait()


def main(settings: RenderServerSettings) -> int:
    """Run `sidecar render`. Returns the exit code. Raises StartError."""
    if not settings.model:
        raise UsageError(
            "--model is missing; expected the model's directory, e.g. --model /models/Qwen2-VL-2B-Instruct"
        )
    if any(importlib.util.find_spec(module) is None for module in RENDER_MODULES):
        raise StartError("the extra is not installed; pip install 'inference-sidecar[render]'")
    logs.setup(settings.log_level)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signalled(settings))
    return 0
