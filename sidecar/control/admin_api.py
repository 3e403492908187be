"""The admin port: probes, load, metrics, verdicts, diagnoses, the page.

Rules: read-only; a probe renders the last verdict and never waits; nothing here contacts the engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from sidecar.control.loop import ControlLoop
from sidecar.control.state import ControlState
from sidecar.events import DiagnosisSummary
from sidecar.health import probes
from sidecar.load.cost_model import Coefficients
from sidecar.report import cost_json, diagnosis_page, live_page, load_json, status_json

TICK_LOST_S: Final = 5.0  # without a tick for so long, /healthz fails

Handler = Callable[[web.Request], Any]
Answer = tuple[Any, int]  # content and HTTP status


def make_app(loop: ControlLoop, *middlewares: Middleware) -> web.Application:
    """The admin application."""
    answers: dict[str, Callable[[web.Request], Answer]] = {
        "/livez": lambda _: _probe("live", loop.control.health.probe_state()),
        "/readyz": lambda _: _probe("ready", loop.control.health.probe_state()),
        "/startupz": lambda _: _probe("startup", loop.control.health.probe_state()),
        "/healthz": lambda _: _own_health(loop, time.monotonic()),
        "/status": lambda _: (status_json.render(loop.snapshot), 200),
        "/load": lambda request: _load(request.query, loop),
        "/cost": lambda request: _cost(request.query, loop.control),
        "/coefficients": lambda _: _file(loop.control.coefficients.co),
        "/coefficients/shadow": lambda _: _file(loop.control.coefficients.shadow()),
        "/verdicts": lambda _: ({"verdicts": [probes.verdict_json(v) for v in loop.snapshot.changes]}, 200),
        "/diagnoses": lambda _: ({"diagnoses": [_summary(d) for d in loop.diagnoses.summaries()]}, 200),
    }

    async def diagnosis(request: web.Request) -> web.Response:
        """The bundle as JSON, or as a page for a browser."""
        id = request.match_info["id"]
        body = await asyncio.to_thread(loop.diagnoses.read, id)
        if body is None:
            return _respond({"error": "no such diagnosis; see /diagnoses"}, 404)
        if "text/html" in request.headers.get("Accept", ""):
            text = await asyncio.to_thread(lambda: diagnosis_page.render(id, json.loads(body)))
            return web.Response(text=text, content_type="text/html", headers=diagnosis_page.HEADERS)
        return web.Response(body=body, content_type="application/json", headers={"Vary": "Accept"})

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = loop.pages.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def events(request: web.Request) -> web.StreamResponse:
        return await loop.feed.events(request)

    app = web.Application(middlewares=middlewares)
    app.add_routes([web.get(path, _json(answer)) for path, answer in answers.items()])
    app.add_routes([web.get("/diagnoses/{id}", diagnosis), web.get("/metrics", metrics)])
    app.add_routes([web.get("/", live_page.index), web.get("/events", events)])
    return app


def _respond(content: Any, status: int = 200) -> web.Response:
    return web.json_response(text=json.dumps(content) + "\n", status=status, headers={"Cache-Control": "no-store"})


def _json(answer: Callable[[web.Request], Answer]) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return _respond(*answer(request))

    return handle


def _probe(kind: probes.Kind, state: probes.ProbeState) -> Answer:
    return probes.verdict_json(state.verdict), 200 if probes.passes(kind, state) else 503


def _own_health(loop: ControlLoop, now: float) -> Answer:
    """The health of the sidecar itself."""
    relays = [
        {"index": relay.index, "pid": relay.pid, "restarts": relay.restarts, "pulse_age": relay.pulse_age}
        for relay in loop.pool.use(now)
    ]
    is_healthy = now - loop.ticked_at < TICK_LOST_S and any(relay["pid"] for relay in relays)
    details = {"pid": os.getpid(), "relays": relays, "loop_lag": loop.control.health.lag}
    return {"status": "ok" if is_healthy else "failing", **details}, 200 if is_healthy else 503


def _load(query: Mapping[str, str], loop: ControlLoop) -> Answer:
    """The load, with current latency predictions; with `in`, for a request of that size (parameters as for /cost)."""
    unit, size, snapshot = query.get("unit", ""), None, loop.snapshot
    forecast = loop.control.latency.forecast(time.monotonic())
    snapshot = replace(snapshot, load=replace(snapshot.load, forecast=forecast))
    if "in" in query:
        try:
            size = cost_json.parse_size({name: query[name] for name in cost_json.PARAMETERS if name in query})
        except ValueError as e:
            return {"error": str(e)}, 400
    return load_json.render(snapshot, unit, size, loop.control.coefficients.co), 200


def _cost(query: Mapping[str, str], control: ControlState) -> Answer:
    try:
        return cost_json.render(query, control.coefficients.co, control.gpu_price), 200
    except ValueError as e:
        return {"error": str(e)}, 400


def _file(co: Coefficients | None) -> Answer:
    """Coefficients in the form of a file for --coefficients."""
    return (asdict(co), 200) if co else ({"error": "too little work so far; /load counts the windows"}, 404)


def _summary(d: DiagnosisSummary) -> dict[str, Any]:
    return {"id": d.id, "at": d.at_wall, "reason": d.reason, "summary": d.summary, "bytes": d.bytes}
