"""Every API, answered whole, streamed, left early and failed: what is recorded, compared with what the engine did.

The table in docs/metering.md holds the results of these tests. UPDATE_DOCS=1 rewrites it.
"""

from __future__ import annotations

import asyncio
import io
import os
import wave
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import Admitted, Delivered, FirstToken, Outcome, RequestSize, Settled
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import Ledger, Settlement
from sidecar.relay.sse import JSON_LINES, SSE

from ..waiting import PATIENCE
from .metered_apis import METERED, MeteredApi, Truth

LEFT: Final = 120  # tokens after which a client leaves
FAILED: Final = 40  # and an engine fails
MANNERS: Final = ("whole", "streamed", "left early", "failed")
PAGE: Final = Path(__file__).parents[2] / "docs" / "metering.md"
BEGIN, END = "<!-- metered apis -->\n", "<!-- /metered apis -->\n"


class KnowingEngine:
    """Answers in the form of one API, and records what it did."""

    def __init__(self, api: MeteredApi) -> None:
        self.api, self.manner = api, ""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        api, truth = self.api, self.api.truth
        if self.manner == "failed" and api.token is None:
            return web.json_response({"error": {"message": "CUDA error", "code": 500}})
        if self.manner == "whole":
            assert api.whole is not None
            answer = api.whole(truth)
            if isinstance(answer, bytes):
                return web.Response(body=answer, content_type="audio/wav")
            return web.json_response(answer, headers=api.header(truth))
        response = web.StreamResponse(headers={"content-type": api.media_type})
        await response.prepare(request)
        await response.write(api.opening(truth))
        stop = {"left early": LEFT, "failed": FAILED}.get(self.manner, truth.output) // api.step
        for n, event in enumerate(api.events(truth)):
            if n == stop:
                break
            await response.write(event)
        if self.manner == "left early":
            await asyncio.Event().wait()
        await response.write(api.failure if self.manner == "failed" else api.closing(truth))
        return response


async def settlements(rig: Any, serve: Any, api: MeteredApi) -> dict[str, Settlement]:
    """The settlement for each manner that the API has."""
    engine = KnowingEngine(api)
    r = await rig(await serve(engine))
    ledger, found, done = Ledger(Coefficients()), {}, 0
    for manner in MANNERS:
        is_stream = api.token is not None and manner != "whole"
        if (manner == "whole" and api.whole is None) or (manner in ("streamed", "left early") and api.token is None):
            continue
        engine.manner = manner
        path = api.stream_path if is_stream and api.stream_path else api.path
        body = {**api.body, **(api.streams if is_stream else {"stream": False} if api.path.startswith("/api/") else {})}
        sent = {"data": form(body)} if api.upload else {"json": body}
        async with asyncio.timeout(PATIENCE), r.client.post(r.url + path, **sent) as got:
            if manner == "left early":
                end = b"\n" if api.media_type != "text/event-stream" else b"\n\n"
                seen, wanted = b"", api.opening(api.truth).count(end) + LEFT // api.step
                while seen.count(end) < wanted:
                    seen += await got.content.readany()
                got.close()
            else:
                await got.read()
        await r.emitted.wait(Settled, len(found) + 1)
        while done < len(r.emitted.all):
            settlement = ledger.apply(0, r.emitted.all[done])
            done += 1
            if settlement is not None:
                found[manner] = settlement
    return found


def truth_of(api: MeteredApi, manner: str) -> Truth:
    """What the engine did; of a whole answer that failed, nothing is owed."""
    if manner == "failed" and api.token is None:
        return Truth(0, 0, 0)
    output = {"left early": LEFT, "failed": FAILED}.get(manner, api.truth.output)
    cached = api.truth.cached if api.caches else 0
    return Truth(api.truth.prompt, cached, output if api.generates else 0)


def form(body: dict[str, Any]) -> aiohttp.FormData:
    """The members of a body, and eight seconds of silence."""
    recording = io.BytesIO()
    with wave.open(recording, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8 * 16_000))
    made = aiohttp.FormData({name: str(value) for name, value in body.items()})
    made.add_field("file", recording.getvalue(), filename="a.wav", content_type="audio/wav")
    return made


def is_near(booked: int, truth: int) -> bool:
    return abs(booked - truth) <= 0.02 * truth


def row(api: MeteredApi, manner: str, settlement: Settlement) -> str:
    work, truth = settlement.work, truth_of(api, manner)
    booked = f"{work.uncached + work.cached} / {work.cached} / {work.output}"
    was = f"{truth.prompt} / {truth.cached} / {truth.output}"
    word = "told" if settlement.told else "estimated"
    return f"| {api.name} | {manner} | {was} | {booked} | {word} | `{settlement.settled.outcome}` |"


@pytest.mark.parametrize("api", METERED, ids=lambda api: api.name)
async def test_what_is_booked_is_what_the_engine_did(rig: Any, serve: Any, api: MeteredApi) -> None:
    """Within 2 % of the truth, or marked as an estimate; and an estimate includes all counted or reported tokens."""
    found = await settlements(rig, serve, api)
    for manner, settlement in found.items():
        truth, work = truth_of(api, manner), settlement.work
        outcome = {"left early": "client_cancelled", "failed": "engine_error"}.get(manner, "ok")
        assert settlement.settled.outcome == outcome, manner
        assert settlement.told is (api.tells and manner in ("whole", "streamed")), manner
        if manner == "failed" and api.token is None:
            assert settlement.mu == 0, manner
            continue
        assert settlement.mu > 0
        if (api.tells and api.token is not None) or settlement.told:
            assert is_near(work.output, truth.output), (manner, work)
        if settlement.told or (api.tells_at_once and api.tells):
            assert is_near(work.uncached + work.cached, truth.prompt), (manner, work)
            assert is_near(work.cached, truth.cached), (manner, work)
    assert_documented([row(api, manner, settlement) for manner, settlement in found.items()])


def assert_documented(rows: list[str]) -> None:
    """The document has the rows of one API."""
    text = PAGE.read_text()
    if os.environ.get("UPDATE_DOCS"):
        head, rest = text.split(BEGIN)
        table, tail = rest.split(END)
        name = rows[0].split(" | ")[0]
        kept = [one for one in table.splitlines() if not one.startswith(name + " | ")]
        order = [f"| {api.name}" for api in METERED]
        title, body = kept[:2], sorted([*kept[2:], *rows], key=lambda one: order.index(one.split(" | ")[0]))
        text = head + BEGIN + "\n".join([*title, *body]) + "\n" + END + tail
        PAGE.write_text(text)
    for one in rows:
        assert one in text.splitlines(), f"{PAGE.name} is stale: UPDATE_DOCS=1 pytest {Path(__file__).name}"


def test_the_document_has_no_other_rows() -> None:
    """Removed APIs are not in the table."""
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines()[2:]
    assert {one.split(" | ")[0] for one in table} == {f"| {api.name}" for api in METERED}


STREAMED: Final = [api for api in METERED if api.token is not None]


@given(st.data())
def test_counters_never_fall_over_all_apis(data: st.DataObject) -> None:
    """Streams of any API side by side, in any pieces, ended, failed or left anywhere: totals only grow.

    And each has at most what its engine wrote, and at least what its events show.
    """
    ledger, shown = Ledger(Coefficients()), dict[str, float]()
    expected = RequestSize(900, output=50)

    def check() -> None:
        nonlocal shown
        now: dict[str, float] = {"delivered": ledger.delivered_total}
        for (tenant, model, outcome), (mu, count) in ledger.totals.items():
            now |= {f"mu {tenant} {model} {outcome}": mu, f"requests {tenant} {model} {outcome}": count}
        assert all(now[name] >= value for name, value in shown.items())
        shown = now

    open_streams: dict[str, tuple[MeteredApi, SSE, bytes, int]] = {}
    for n in range(data.draw(st.integers(1, 4))):
        api = data.draw(st.sampled_from(STREAMED))
        output = api.step * data.draw(st.integers(1, 12)) * 2
        truth = Truth(1200, data.draw(st.sampled_from((0, 800))), output)
        fails_at = data.draw(st.none() | st.integers(0, output // api.step))
        events = [*api.events(truth)][:fails_at]
        written = api.opening(truth) + b"".join(events) + (api.closing(truth) if fails_at is None else api.failure)
        left = written[: data.draw(st.integers(0, len(written)))] if data.draw(st.booleans()) else written
        open_streams[str(n)] = api, SSE(False, is_lines=api.media_type in JSON_LINES), left, len(events) * api.step
        ledger.apply(0, Admitted(str(n), 0.0, "acme", "m", "chat", True, expected, None, 1.0))
    at = 0.0
    while open_streams:
        id = data.draw(st.sampled_from(sorted(open_streams)))
        api, sse, rest, most = open_streams[id]
        size, before, at = data.draw(st.integers(1, 900)), sse.tokens, at + 0.25
        sse.feed(rest[:size])
        if sse.started:
            ledger.apply(0, FirstToken(id, at))
        ledger.apply(0, Delivered(id, at, sse.tokens - before, size))
        check()
        open_streams[id] = api, sse, rest[size:], most
        if len(rest) <= size:
            usage = sse.told and sse.told.usage(expected, sse.tokens)
            outcome: Outcome = "engine_error" if sse.failed else "client_cancelled"
            tokens = usage.completion_tokens if usage else sse.tokens
            end = Settled(id, at, outcome, 200, usage, tokens, 1, None, 0.0, 0.0)
            done = ledger.apply(0, end)
            assert done is not None and min(sse.tokens, most) <= done.work.output <= most
            del open_streams[id]
            check()
