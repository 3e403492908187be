"""vLLM's admin endpoints that pause the engine on purpose, as a literal table over the faults.

Sleep, pause and weight updates need vLLM's development mode, profiling needs a profiler; here all are always on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.faults import Faults
from sidecar.tools.scripted_engine.timed_routes import seconds_of

# Duration of /update_weights, unless `?seconds=N` sets another.
DEFAULT_UPDATE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class AdminRoute:
    """A POST to `path` starts or clears the fault; `answer` is vLLM's body, None if it has none."""

    path: str
    fault: str
    starts: bool
    answer: dict[str, str | int | None] | None = None


ADMIN_ROUTES: Final = (
    AdminRoute("/sleep", "sleep", True, {"status": "sleeping", "level": 1}),
    AdminRoute("/wake_up", "sleep", False, {"status": "awake", "tags": None}),
    AdminRoute("/pause", "pause", True, {"status": "paused"}),
    AdminRoute("/resume", "pause", False, {"status": "resumed"}),
    AdminRoute("/release_memory_occupation", "memory_released", True),
    AdminRoute("/resume_memory_occupation", "memory_released", False),
    AdminRoute("/start_profile", "profile", True),
    AdminRoute("/stop_profile", "profile", False),
)
STATE_ROUTES: Final[tuple[tuple[str, str, Callable[[Behaviour], bool]], ...]] = (
    ("/is_sleeping", "is_sleeping", lambda behaviour: behaviour.sleeping),
    ("/is_paused", "is_paused", lambda behaviour: behaviour.paused),
)

Handler = Callable[[web.Request], Awaitable[web.Response]]


def routes(faults: Faults) -> list[web.RouteDef]:
    """The routes of all commands and state queries."""
    commands = [web.post(route.path, _fault_handler(route, faults)) for route in ADMIN_ROUTES]
    states = [web.get(path, _state_handler(key, read, faults)) for path, key, read in STATE_ROUTES]
    return [*commands, *states, web.post("/update_weights", _update_handler(faults))]


def _fault_handler(route: AdminRoute, faults: Faults) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        if route.starts:
            faults.start(route.fault)
        else:
            faults.clear(route.fault)
        return web.Response() if route.answer is None else web.json_response(route.answer)

    return handle


def _state_handler(key: str, read: Callable[[Behaviour], bool], faults: Faults) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response({key: read(faults.behaviour)})

    return handle


def _update_handler(faults: Faults) -> Handler:
    async def update(request: web.Request) -> web.Response:
        """Stop the core for the duration of the call."""
        seconds = seconds_of(request, DEFAULT_UPDATE_S)
        faults.start("weight_update")
        try:
            await asyncio.sleep(seconds)
        finally:
            faults.clear("weight_update")
        return web.json_response({"message": "Weights updated"})

    return update
