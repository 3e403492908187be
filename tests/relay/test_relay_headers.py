"""Our headers, and the merged metrics page."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import AnswerDetails, HttpRequest, LoadReport, MetricsPage, MetricsPageRequested

from .work import once

# --- headers of ours ---


async def test_request_ids(rig: Any, serve: Any) -> None:
    """A sound id of the client is kept, an unsound one replaced, a missing one made; the engine gets the same."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=request.headers["x-request-id"])

    r = await rig(await serve(engine))
    for given, kept in (("abc-1", True), ("a" * 129, False), ("a b", False), (None, False)):
        for path in ("/v1/completions", "/other"):
            async with r.client.post(r.url + path, data=b"{}", headers={"x-request-id": given} if given else {}) as got:
                assert await got.text() == got.headers["x-request-id"]
                assert (got.headers["x-request-id"] == given) is kept


async def test_load_reports(rig: Any, serve: Any) -> None:
    """The load report has the requested form and replaces the engine's; until there is one, the engine's passes."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"endpoint-load-metrics": "engine's"})

    r = await rig(await serve(engine))

    async def ask(form: str) -> str:
        headers = {"endpoint-load-metrics-format": form} if form else {}
        async with r.client.post(r.url + "/v1/completions", data=b"{}", headers=headers) as got:
            return str(got.headers["endpoint-load-metrics"])

    assert await ask("JSON") == "engine's"
    r.relay.on_command(LoadReport('JSON {"a": 1}', "TEXT a=1", "idle", "", "BIN CQ=="))
    assert [await ask(form) for form in ("json", "TEXT", "", "BIN", "XML")] == [
        'JSON {"a": 1}',
        "TEXT a=1",
        "engine's",
        "BIN CQ==",
        "engine's",
    ]


async def test_tracing_makes_our_span_the_parent(rig: Any, serve: Any) -> None:
    """With tracing on, the engine's parent is the span reported to control, in the client's trace; state unchanged."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response([request.headers.get("traceparent"), request.headers.get("tracestate")])

    r = await rig(await serve(engine), otlp_endpoint="http://127.0.0.1:1")
    given = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    async with r.client.post(r.url + "/v1/completions", data=b"{}", headers=given) as got:
        parent, state = await got.json()
    trace = once(r.emitted)[0].trace
    assert trace is not None
    assert parent == f"00-0af7651916cd43dd8448eb211c80319c-{trace.span_id}-01"
    assert (trace.parent_id, trace.sampled, state) == ("b7ad6b7169203331", True, "a=b")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
async def test_a_sampled_trace_carries_what_a_span_needs(sampled: bool, stream: bool, rig: Any, serve: Any) -> None:
    """Method and path without the query, and what the answer says of itself; the client's bytes are unchanged."""
    answer = {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "finish_reason": "stop", "text": "x"}]}
    body = json.dumps(answer).encode()
    sent = b"data: " + body + b"\n\ndata: [DONE]\n\n" if stream else body
    media = "text/event-stream" if stream else "application/json"

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=sent, content_type=media)

    r = await rig(await serve(engine), otlp_endpoint="http://127.0.0.1:1")
    given = {"traceparent": f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0{int(sampled)}"}
    request = json.dumps({"prompt": "x", "stream": stream})
    async with r.client.post(r.url + "/v1/completions?key=secret", data=request, headers=given) as got:
        assert await got.read() == sent
    admitted, settled = once(r.emitted)
    http, details = HttpRequest("POST", "/v1/completions", "http", "1.1"), AnswerDetails("c-1", "m-1", ("stop",))
    assert (admitted.http, settled.details) == ((http, details) if sampled else (None, None))


async def test_the_samplers_decision_reaches_the_engine(rig: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OTEL_* alone: what is not sampled has a traceparent that says so, and carries nothing else."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(request.headers.get("traceparent"))

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", data=b"{}") as got:
        assert (await got.json()).endswith("-00")
    admitted, settled = once(r.emitted)
    assert (admitted.trace.sampled, admitted.http, settled.details) == (False, None, None)


# --- metrics ---


async def test_the_merged_page_is_asked_for_once(rig: Any, serve: Any) -> None:
    """Many scrapes at once cost one question to control, all get its page, and the engine none."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("the engine was scraped")

    r = await rig(await serve(engine))

    async def scrape() -> str:
        async with r.client.get(r.url + "/metrics?x=1") as got:
            assert got.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            return str(await got.text())

    scrapes = [asyncio.create_task(scrape()) for _ in range(5)]
    await r.emitted.wait(MetricsPageRequested)
    r.relay.on_command(MetricsPage(0.0, "a 1\n"))
    assert await asyncio.gather(*scrapes) == ["a 1\n"] * 5
    assert await scrape() == "a 1\n"
    assert len(r.emitted.of(MetricsPageRequested)) == 1


@pytest.mark.parametrize(("status", "passes"), [(200, True), (404, False)])
async def test_the_page_of_an_engine_that_is_not_scraped_is_passed_on(
    rig: Any, serve: Any, status: int, passes: bool
) -> None:
    """Control reads no page of an unknown engine; who scrapes the relay finds it all the same, before ours."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="dynamo_requests 7\nsidecar_x 1", status=status)

    r = await rig(await serve(engine), kind="openai")
    scrape = asyncio.create_task(r.client.get(r.url + "/metrics"))
    await r.emitted.wait(MetricsPageRequested)
    r.relay.on_command(MetricsPage(0.0, "ours 1\n"))
    assert await (await scrape).text() == ("dynamo_requests 7\nours 1\n" if passes else "ours 1\n")


async def test_without_control_the_engines_page_passes(rig: Any, serve: Any) -> None:
    """A control process that does not answer costs a bounded wait, not the engine's metrics."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="engine 1\n")

    r = await rig(await serve(engine))
    async with r.client.get(r.url + "/metrics") as got:
        assert await got.text() == "engine 1\n"
