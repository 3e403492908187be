"""The admin port: probes, load, metrics, verdicts, diagnoses, the page.

Rules: read-only; a probe renders the last verdict and never waits; nothing here contacts the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from aiohttp import web

from sidecar.control.diagnosis import Diagnoses
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


def make_app(sources: Sources) -> web.Application:
    """The admin application."""
    app = web.Application()
    app.router.add_get("/livez", _probe(sources, "live"))
    app.router.add_get("/readyz", _probe(sources, "ready"))
    app.router.add_get("/startupz", _probe(sources, "startup"))
    app.router.add_get("/healthz", _health(sources))
    app.router.add_get("/load", _load(sources))
    app.router.add_get("/cost", _cost(sources))
    app.router.add_get("/coefficients", _file(lambda: sources.coefficients.co))
    app.router.add_get("/coefficients/shadow", _file(lambda: sources.coefficients.shadow()))
    app.router.add_get(
        "/verdicts", _json(lambda: {"verdicts": [probes.verdict_json(v) for v in sources.snapshot().changes]})
    )
    app.router.add_get("/diagnoses", _json(lambda: {"diagnoses": _diagnoses(sources.diagnoses)}))
    app.router.add_get("/diagnoses/{id}", _diagnosis(sources.diagnoses))
    app.router.add_get("/metrics", _metrics(sources.pages))
    app.router.add_get("/", live_page.index)
    app.router.add_get("/events", sources.feed.events)
    return app


Handler = Callable[[web.Request], Any]


def _answer(content: Any, status: int = 200) -> web.Response:
    return web.Response(
        text=json.dumps(content) + "\n",
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def _probe(sources: Sources, kind: probes.Kind) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        state = sources.probe_state()
        return _answer(probes.verdict_json(state.verdict), 200 if probes.passes(kind, state) else 503)

    return handle


def _json(content: Callable[[], Any]) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return _answer(content())

    return handle


def _load(sources: Sources) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return _answer(load_json.render(sources.snapshot(), request.query.get("unit", "")))

    return handle


def _cost(sources: Sources) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        try:
            return _answer(cost_json.render(request.query, sources.coefficients.co))
        except ValueError as e:
            return _answer({"error": str(e)}, 400)

    return handle


def _file(coefficients: Callable[[], Coefficients | None]) -> Handler:
    """Coefficients in the form of a file for --coefficients."""

    async def handle(_: web.Request) -> web.Response:
        co = coefficients()
        if co is None:
            return _answer({"error": "too little work so far; /load counts the windows"}, 404)
        return _answer(asdict(co))

    return handle


def _health(sources: Sources) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        is_healthy, details = sources.own_health()
        return _answer({"status": "ok" if is_healthy else "failing", **details}, 200 if is_healthy else 503)

    return handle


def _metrics(pages: MetricsPages) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        body, content_type = pages.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    return handle


def _diagnoses(diagnoses: Diagnoses) -> list[dict[str, Any]]:
    return [
        {"id": d.id, "at": d.at_wall, "reason": d.reason, "summary": d.summary, "bytes": d.bytes}
        for d in diagnoses.summaries()
    ]


def _diagnosis(diagnoses: Diagnoses) -> Handler:
    """The bundle as JSON, or as a page for a browser."""

    async def handle(request: web.Request) -> web.Response:
        id = request.match_info["id"]
        body = await asyncio.to_thread(diagnoses.read, id)
        if body is None:
            return _answer({"error": "no such diagnosis; see /diagnoses"}, 404)
        if "text/html" in request.headers.get("Accept", ""):
            text = await asyncio.to_thread(lambda: diagnosis_page.render(id, json.loads(body)))
            return web.Response(text=text, content_type="text/html", headers=diagnosis_page.HEADERS)
        return web.Response(body=body, content_type="application/json", headers={"Vary": "Accept"})

    return handle
