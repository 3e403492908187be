"""Real HTTP servers that respond like each engine: its model list, metrics page, marks and keys.

Their responses are written after the engines' published sources (see sidecar/engines/*.py); pages are those of
tests/engines/pages.
"""

from __future__ import annotations

import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web

PAGES = Path(__file__).with_name("pages")
KEY = "Bearer secret"
TOKEN = (
    'data: {"choices": [{"text": "1", "finish_reason": "length"}], "usage": {"prompt_tokens": 2}}\n\ndata: [DONE]\n\n'
)

Answer = tuple[int, str]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def models(owner: str, name: str = "served-name") -> Answer:
    return 200, json.dumps({"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner}]})


def page(name: str) -> Answer:
    return 200, (PAGES / name).read_text()


def said(**fields: Any) -> Answer:
    return 200, json.dumps(fields)


@dataclass(frozen=True, slots=True)
class Face:
    """What an engine answers: path -> (status, body). Paths of `guarded` want KEY where the engine has one."""

    answers: Mapping[str, Answer]
    guarded: tuple[str, ...]
    metrics: str  # the path's page, left out where metrics are off; "": it has none
    off: Answer = (404, "")


FACES: dict[str, Face] = {
    "vllm": Face(
        {"/v1/models": models("vllm"), "/version": said(version="0.32.0"), "/v1/completions": (200, TOKEN)},
        ("/v1",),
        "vllm-0.32-idle.txt",
    ),
    "sglang": Face(
        {
            "/v1/models": models("sglang"),
            "/model_info": said(model_path="org/model", is_generation=True),
            "/get_model_info": said(model_path="org/model", is_generation=True),
            "/server_info": said(enable_priority_scheduling=True, version="0.5.23"),
            "/v1/completions": (200, TOKEN),
        },
        ("/v1", "/model_info", "/get_model_info", "/server_info"),
        "sglang-0.5.23.txt",
    ),
    "tgi": Face(
        {
            "/v1/models": models("org/model", "org/model"),
            "/info": said(model_id="org/model", router="text-generation-router", version="3.3.7"),
            "/v1/completions": (200, TOKEN),
        },
        ("/v1/completions", "/v1/chat"),
        "tgi-3.3.7.txt",
    ),
    "llamacpp": Face(
        {
            "/v1/models": models("llamacpp", "model.gguf"),
            "/health": said(status="ok"),
            "/props": said(default_generation_settings={}, total_slots=4, is_sleeping=False),
            "/v1/completions": (200, TOKEN),
        },
        ("/v1/completions", "/props", "/metrics"),
        "llamacpp.txt",
        (501, '{"error": {"code": 501, "type": "not_supported_error"}}'),
    ),
    "tei": Face(
        {
            "/info": said(
                model_id="org/model",
                served_model_name="org/model",
                model_type={"embedding": {"pooling": "cls"}},
                tokenization_workers=4,
                max_input_length=512,
                version="1.9.3",
            ),
            "/embed": (200, "[[0.5, 0.25]]"),
        },
        ("/info", "/embed"),
        "tei-1.9.txt",
    ),
    "ollama": Face(
        {
            "/v1/models": models("library", "tiny:latest"),
            "/api/ps": said(models=[{"name": "tiny:latest", "model": "tiny:latest", "context_length": 8192}]),
            "/api/version": said(version="0.22.0"),
            "/api/generate": said(model="tiny:latest", response="2", done=True, done_reason="length"),
        },
        (),
        "",
    ),
}


@dataclass
class Shown:
    """A server with a face that can change. `asked` counts requests, `bodies` has the bodies of posts, by path."""

    answers: dict[str, Answer]
    guarded: tuple[str, ...] = ()
    handlers: dict[str, Handler] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    url: str = ""
    tls: ssl.SSLContext | None = None
    socket: str = ""  # the path of a Unix socket, instead of a port

    async def __aenter__(self) -> Shown:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        if self.socket:
            await web.UnixSite(self._runner, self.socket).start()
            self.url = f"unix:{self.socket}"
        else:
            await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self.tls).start()
            self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.asked[path] += 1
        if request.method == "POST":
            is_json = request.content_type == "application/json"
            body = await request.json() if is_json else {k: _bytes(v) for k, v in (await request.post()).items()}
            self.bodies.setdefault(path, []).append(body)
        if path.startswith(self.guarded or ("-",)) and request.headers.get("authorization") != KEY:
            return web.json_response({"error": "Unauthorized"}, status=401)
        if path in self.handlers:
            return await self.handlers[path](request)
        status, body = self.answers.get(path, (404, '{"detail": "Not Found"}'))
        return web.Response(status=status, text=body)


def _bytes(part: Any) -> Any:
    return part.file.read() if isinstance(part, web.FileField) else part


def shown(name: str, *, metrics: bool = True, key: bool = False, **place: Any) -> Shown:
    """The face of an engine, with its metrics on or off, with a key or without; `place`: its TLS or socket."""
    face = FACES[name]
    answers = {**face.answers, "/metrics": page(face.metrics) if metrics and face.metrics else face.off}
    return Shown(answers, face.guarded if key else (), **place)


class OnDemand:
    """A server that loads what it is asked for, and evicts what was; `says`: its list tells which model is loaded."""

    def __init__(self, *names: str, says: bool, loaded: str = "") -> None:
        self.names, self.says, self.loaded = names, says, loaded
        self.loads: list[str] = []

    async def list_models(self, request: web.Request) -> web.Response:
        cards: list[dict[str, Any]] = [
            {"id": name, "owned_by": "llamacpp" if self.says else "me"} for name in self.names
        ]
        for card in cards if self.says else ():
            card["status"] = {"value": "loaded" if card["id"] == self.loaded else "unloaded"}
        return web.json_response({"object": "list", "data": cards})

    async def complete(self, request: web.Request) -> web.Response:
        wanted = (await request.json())["model"]
        if wanted != self.loaded:
            self.loads.append(wanted)
            self.loaded = wanted
        usage = {"prompt_tokens": 2, "completion_tokens": 1}
        return web.json_response({"choices": [{"text": "1", "finish_reason": "length"}], "usage": usage})

    def shown(self) -> Shown:
        work = dict.fromkeys(("/v1/completions", "/v1/chat/completions", "/v1/embeddings"), self.complete)
        return Shown({}, handlers={"/v1/models": self.list_models, **work})
