"""What a request cost, in the usage of its answer, for clients that ask."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.events import Settled
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine
from tests.relay.work import CHAT, FAST

ASK = {"x-sidecar-usage": "mu"}


def last_usage(text: str, stream: bool) -> dict[str, Any]:
    if not stream:
        return dict(json.loads(text)["usage"])
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return dict(next(event["usage"] for event in reversed(events) if event.get("usage")))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_price_is_that_of_the_settlement(rig: Any, stream: bool) -> None:
    """`mu_milli` is the ledger's charge in whole thousandths; without the header the bytes are the engine's."""
    body = {**CHAT, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        async with r.client.post(r.url + "/v1/chat/completions", json=body, headers=ASK) as got:
            usage, length = last_usage(await got.text(), stream), got.headers.get("content-length")
        async with r.client.post(r.url + "/v1/chat/completions", json=body) as got:
            assert "mu_milli" not in last_usage(await got.text(), stream)
    assert (length is None) is stream
    settled = (await r.emitted.settled()).usage
    assert settled is not None
    work = cost_model.settled_work(cost_model.RequestSize(0), settled, 0)
    assert usage["mu_milli"] == round(1000 * cost_model.mu(work, Coefficients())) > 0
    assert all(end.outcome == "ok" for end in r.emitted.of(Settled))


async def test_a_stream_whose_usage_the_client_did_not_want_has_no_price(rig: Any) -> None:
    """The usage that we asked for ourselves stays hidden."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}, headers=ASK) as got:
            assert 'usage":{' not in await got.text()
