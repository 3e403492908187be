"""The admin port: probes, load, metrics, verdicts, diagnoses, the page.

Rules: read-only; a probe renders the last verdict and never waits; nothing here contacts the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aiohttp import web

from sidecar.control.diagnosis import Diagnoses
from sidecar.events import DiagnosisSummary
from sidecar.health import probes
from sidecar.load.coefficient_monitor import CoefficientMonitor
from sidecar.load.cost_model import Coefficients
from sidecar.report import cost_json, diagnosis_page, live_page, load_json
from sidecar.report.prometheus import MetricsPages
from sidecar.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the answers come from. Each call returns at once. `own_health`: of the sidecar itself, with details."""

    probe_state: Callable[[], probes.ProbeState]
    snapshot: Callable[[], Snapshot]
    own_health: Callable[[], tuple[bool, dict[str, Any]]]
    pages: MetricsPages
    feed: live_page.PageFeed
    diagnoses: Diagnoses
    coefficients: CoefficientMonitor


Handler = Callable[[web.Request], Any]
Answer = tuple[Any, int]  # content and HTTP status


def make_app(sources: Sources) -> web.Application:
    """The admin application."""
    answers: dict[str, Callable[[web.Request], Answer]] = {
        "/livez": lambda _: _probe("live", sources.probe_state()),
        "/readyz": lambda _: _probe("ready", sources.probe_state()),
        "/startupz": lambda _: _probe("startup", sources.probe_state()),
        "/healthz": lambda _: _health(*sources.own_health()),
        "/load": lambda request: (load_json.render(sources.snapshot(), request.query.get("unit", "")), 200),
        "/cost": lambda request: _cost(request.query, sources.coefficients.co),
        "/coefficients": lambda _: _file(sources.coefficients.co),
        "/coefficients/shadow": lambda _: _file(sources.coefficients.shadow()),
        "/verdicts": lambda _: ({"verdicts": [probes.verdict_json(v) for v in sources.snapshot().changes]}, 200),
        "/diagnoses": lambda _: ({"diagnoses": [_summary(d) for d in sources.diagnoses.summaries()]}, 200),
    }
    app = web.Application()
    app.add_routes([web.get(path, _json(answer)) for path, answer in answers.items()])
    app.router.add_get("/diagnoses/{id}", _diagnosis(sources.diagnoses))
    app.router.add_get("/metrics", _metrics(sources.pages))
    app.router.add_get("/", live_page.index)
    app.router.add_get("/events", sources.feed.events)
    return app


def _respond(content: Any, status: int = 200) -> web.Response:
    return web.json_response(text=json.dumps(content) + "\n", status=status, headers={"Cache-Control": "no-store"})


def _json(answer: Callable[[web.Request], Answer]) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return _respond(*answer(request))

    return handle


def _probe(kind: probes.Kind, state: probes.ProbeState) -> Answer:
    return probes.verdict_json(state.verdict), 200 if probes.passes(kind, state) else 503


def _health(is_healthy: bool, details: dict[str, Any]) -> Answer:
    return {"status": "ok" if is_healthy else "failing", **details}, 200 if is_healthy else 503


def _cost(query: Mapping[str, str], co: Coefficients) -> Answer:
    try:
        return cost_json.render(query, co), 200
    except ValueError as e:
        return {"error": str(e)}, 400


def _file(co: Coefficients | None) -> Answer:
    """Coefficients in the form of a file for --coefficients."""
    return (asdict(co), 200) if co else ({"error": "too little work so far; /load counts the windows"}, 404)


def _metrics(pages: MetricsPages) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        body, content_type = pages.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    return handle


def _summary(d: DiagnosisSummary) -> dict[str, Any]:
    return {"id": d.id, "at": d.at_wall, "reason": d.reason, "summary": d.summary, "bytes": d.bytes}


def _diagnosis(diagnoses: Diagnoses) -> Handler:
    """The bundle as JSON, or as a page for a browser."""

    async def handle(request: web.Request) -> web.Response:
        id = request.match_info["id"]
        body = await asyncio.to_thread(diagnoses.read, id)
        if body is None:
            return _respond({"error": "no such diagnosis; see /diagnoses"}, 404)
        if "text/html" in request.headers.get("Accept", ""):
            text = await asyncio.to_thread(lambda: diagnosis_page.render(id, json.loads(body)))
            return web.Response(text=text, content_type="text/html", headers=diagnosis_page.HEADERS)
        return web.Response(body=body, content_type="application/json", headers={"Vary": "Accept"})

    return handle
