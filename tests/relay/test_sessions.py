"""WebSocket sessions as work: admitted, charged, open while they last, and settled by what passed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import TenantLimited
from sidecar.events import Admitted, RequestBlocked, Settled, UnreadRequest
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.ledger import Ledger
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantAccounts
from sidecar.relay.session import BYTES_PER_S, SessionMeter, is_control, shape_of
from sidecar.signals.limits_file import read_limits

from ..waiting import PATIENCE


async def talk(request: web.BaseRequest) -> web.StreamResponse:
    """An engine that answers each message with its length."""
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for message in ws:
        await ws.send_str(str(len(message.data)))
    return ws


async def test_a_session_is_admitted_and_settled_by_what_passed(rig: Any, serve: Any) -> None:
    """Once, in its tenant's name, with the seconds of audio that its bytes can be, marked as no word of the engine."""
    r = await rig(await serve(talk))
    second = "A" * round(BYTES_PER_S)
    async with r.client.ws_connect(r.url + "/v1/realtime?model=m", headers={"x-tenant-id": "acme"}) as ws:
        [admitted] = await r.emitted.wait(Admitted)
        for _ in range(90):
            await ws.send_str(second)
            assert await ws.receive_str() == str(len(second))
        assert not r.emitted.of(Settled)
    ended = await r.emitted.settled()
    assert (admitted.tenant, admitted.model, admitted.route, admitted.stream) == ("acme", "m", "realtime", False)
    assert (ended.outcome, ended.status) == ("ok", 101)
    assert ended.usage is not None
    assert ended.usage.audio_seconds == pytest.approx(90, rel=0.01)
    assert ended.estimated
    assert not r.emitted.of(UnreadRequest)
    ledger = Ledger(Coefficients())
    settled = [ledger.apply(0, event) for event in r.emitted.all][-1]
    assert settled is not None
    assert (settled.work.audio_seconds, settled.work.prompts) == (ended.usage.audio_seconds, 4)
    assert settled.mu == pytest.approx(cost_model.mu(settled.work, Coefficients()))
    assert not [*ledger.holds()]


async def test_a_silent_session_is_not_the_engines_silence(rig: Any, serve: Any) -> None:
    """It waits for its client until that speaks, and again once the engine has answered."""
    r = await rig(await serve(talk))
    async with r.client.ws_connect(r.url + "/v1/realtime") as ws:
        await ws.send_str("a")
        await ws.receive_str()
        await r.emitted.wait(RequestBlocked, 3)
    assert [event.on for event in r.emitted.of(RequestBlocked)][:3] == [True, False, True]


async def test_a_refused_session_is_a_rejected_request(rig: Any, serve: Any) -> None:
    """The engine's answer is the client's, and nothing is charged."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=403, text="no")

    r = await rig(await serve(engine))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await r.client.ws_connect(r.url + "/v1/realtime")
    assert refused.value.status == 403
    ended = await r.emitted.settled()
    assert (ended.outcome, ended.usage) == ("rejected", None)


async def test_a_session_keeps_to_its_tenants_limit(rig: Any, serve: Any, tmp_path: Path) -> None:
    """A tenant without units gets a 429 instead of a session."""
    file = tmp_path / "limits.toml"
    file.write_text("default = {mu_per_minute = 0}")
    quota = Quota(str(file), TenantAccounts("", 1, 0), 1, read_limits(str(file)))
    r = await rig(await serve(talk), pricing=Pricing(Estimator(Coefficients()), quota))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await r.client.ws_connect(r.url + "/v1/realtime")
    assert refused.value.status == 429
    quota.close()


async def test_a_long_session_is_charged_as_it_goes_on(rig: Any, serve: Any, tmp_path: Path) -> None:
    """One that has used up its tenant's units is ended, and its tenant has what it did not use."""
    window = Estimator(Coefficients()).estimate("t", shape_of(b"/v1/realtime"), []).mu
    file = tmp_path / "limits.toml"
    file.write_text(f"default = {{mu_per_minute = 0.0001, burst_mu = {3.5 * window}}}")
    accounts = TenantAccounts("", 1, 0)
    quota = Quota(str(file), accounts, 1, read_limits(str(file)))
    r = await rig(await serve(talk), pricing=Pricing(Estimator(Coefficients()), quota))
    second = "A" * round(BYTES_PER_S)
    url, acme = r.url + "/v1/realtime", {"x-tenant-id": "acme"}
    async with r.client.ws_connect(url, headers=acme) as ws, asyncio.timeout(PATIENCE):
        heard = 0
        with contextlib.suppress(ConnectionError):
            while heard < 300:
                await ws.send_str(second)
                if (await ws.receive()).type is not aiohttp.WSMsgType.TEXT:
                    break
                heard += 1
    assert 85 <= heard <= 91
    ended = await r.emitted.settled()
    assert (ended.outcome, ended.error) == ("rejected", "rate_limit_exceeded")
    assert ended.usage is not None
    await asyncio.sleep(0)  # the charge is corrected right after the settlement
    assert quota.take("acme", 0.3 * window, 0.0) is not None  # half a window is left
    with pytest.raises(TenantLimited):
        quota.take("acme", 0.3 * window, 0.0)
    quota.close()


async def test_an_engine_that_goes_ends_the_session(rig: Any, serve: Any) -> None:
    """The client's connection ends, and the session is settled once."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.receive()
        assert request.transport is not None
        request.transport.abort()
        return ws

    r = await rig(await serve(engine))
    async with r.client.ws_connect(r.url + "/v1/realtime") as ws, asyncio.timeout(PATIENCE):
        await ws.send_str("a")
        assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSE)
    await r.emitted.settled()
    assert len(r.emitted.of(Settled)) == 1


async def test_a_drain_waits_for_a_session_and_then_cuts_it(rig: Any, serve: Any) -> None:
    """It is open work: not cut before the drain's time is over, and settled then."""
    r = await rig(await serve(talk))
    async with r.client.ws_connect(r.url + "/v1/realtime") as ws:
        await ws.send_str("a")
        await ws.receive_str()
        assert r.relay.open == 1
        async with asyncio.timeout(PATIENCE):
            await r.relay.drain(0.05)
        ended = await r.emitted.settled()
        assert ended.outcome == "lost"
        assert ended.usage is not None


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=300))))
def test_what_passes_is_counted_and_control_frames_are_not(pieces: list[tuple[bool, bytes]]) -> None:
    """Each change of who owes an answer is reported once."""
    meter, owed = SessionMeter(), False
    for is_client, data in pieces:
        changed = meter.sent(data) if is_client else meter.received(data)
        assert changed == (not is_control(data) and owed != is_client)
        owed = owed if is_control(data) else is_client
    sent = sum(len(data) for is_client, data in pieces if is_client and not is_control(data))
    assert meter.usage().seconds == max(1e-3, sent / BYTES_PER_S)
