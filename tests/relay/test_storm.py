"""All at once: stalls, aborts, clients that leave and a queue; every admission settles once and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import AbortRequests, Admitted, LoadReport, Settled
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.tenant_limits import TenantLimit, TenantLimits
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantAccounts, TenantCharge

from ..waiting import PATIENCE
from .metered_apis import DONE
from .work import CHAT, TOKEN, sse


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [{}, {"max_concurrent": 5, "max_queued": 20}], ids=["plain", "all on"])
async def test_a_storm_leaves_nothing_behind(
    rig: Any, serve: Any, seed: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever coincides, each admission is followed by one settlement of its id, and then the relay works normally."""
    dice = random.Random(seed)

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await asyncio.sleep(dice.random() * 0.02)
        await response.prepare(request)
        for event in sse(*[TOKEN] * dice.randrange(5)):
            await asyncio.sleep(dice.random() * 0.01)
            await response.write(event)
        await response.write(DONE)
        return response

    limits, accounts = tmp_path / "limits.toml", TenantAccounts("", 1, 0)
    limits.write_text("[default]\nmu_per_minute = 1e6\nmu_in_flight = 1e6\n")
    pricing = Pricing(Estimator(Coefficients()), Quota(str(limits), accounts, 1, TenantLimits()))
    r = await rig(await serve(engine), pricing=pricing, **settings)

    async def ask() -> None:
        with contextlib.suppress(aiohttp.ClientError):
            async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as got:
                await got.read()

    async def disturb() -> None:
        while True:
            await asyncio.sleep(dice.random() * 0.02)
            r.relay.on_command(
                LoadReport("{}", "", dice.choice(["stalled", "dead", "progressing", "idle", "starting"]))
            )
            ids = [event.id for event in r.emitted.of(Admitted)]
            r.relay.on_command(
                AbortRequests(
                    tuple(dice.sample(ids, min(3, len(ids)))), dice.choice(["stream_stuck", "prompt_exceeds_kv_cache"])
                )
            )

    disturbance = asyncio.create_task(disturb())
    clients = [asyncio.create_task(ask()) for _ in range(60)]
    for client in dice.sample(clients, 15):
        await asyncio.sleep(dice.random() * 0.01)
        client.cancel()
    await asyncio.wait(clients, timeout=PATIENCE)
    disturbance.cancel()
    r.relay.on_command(LoadReport("{}", "", "idle"))
    await r.emitted.wait(Settled, len(r.emitted.of(Admitted)))
    admitted, settled = (Counter(f.id for f in r.emitted.of(kind)) for kind in (Admitted, Settled))
    assert admitted == settled
    assert set(settled.values()) == {1}
    assert not {f.outcome for f in r.emitted.of(Settled)} & {"lost"}
    before = len(settled)
    again = [asyncio.create_task(ask()) for _ in range(20)]
    await asyncio.gather(*again)
    assert [f.outcome for f in r.emitted.of(Settled)[before:]] == ["ok"] * 20
    # one request is always admitted where nothing is in flight, and only there
    assert isinstance(
        accounts.take("default", TenantLimit(mu_in_flight=1e-6), 1.0, 1.0, time.monotonic()), TenantCharge
    )
