"""Tenants' limits in a whole sidecar: one account for all of its relay processes, and a file that changes under it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from sidecar.events import RequestSize
from sidecar.load import cost_model

from ..waiting import PATIENCE

ASK = {"model": "scripted", "prompt": "Say something.", "max_tokens": 8}


async def test_a_limit_is_one_for_all_relays_and_follows_its_file(start: Any, engine: Any, tmp_path: Path) -> None:
    """Of 60 requests over 60 connections to two relays, about ten are admitted; a new file admits more."""
    cost = cost_model.mu(RequestSize(4, output=8), cost_model.Coefficients())
    file = tmp_path / "limits.toml"
    file.write_text(f"default = {{mu_per_minute = 0.000001, burst_mu = {10 * cost}}}")
    sidecar = await start(engine.url, workers="2", tenant_limits=str(file))

    async def ask() -> int:
        connector = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as client,
            client.post(sidecar.relay + "/v1/completions", json=ASK) as answer,
        ):
            await answer.read()
            return answer.status

    statuses = await asyncio.gather(*(ask() for _ in range(60)))
    assert set(statuses) == {200, 429} and 8 <= statuses.count(200) <= 13
    (tmp_path / "next").write_text("[default]\nmu_per_minute = 600\n")
    (tmp_path / "next").replace(file)
    async with asyncio.timeout(PATIENCE):
        while await ask() != 200:  # noqa: ASYNC110  the file is looked at every two seconds
            await asyncio.sleep(0.2)
    rejected = 'sidecar_requests_total{model="scripted",outcome="rejected",tenant="default"}'
    await sidecar.until_metrics(rejected)


async def test_invented_names_hide_no_tenant(start: Any, engine: Any, tmp_path: Path) -> None:
    """Hundreds of invented tenants and models that get 404 are `other`; real ones have labels before and after.

    With room for one, a tenant with a limit has a label, too, and so has the model that the engine lists.
    """
    file = tmp_path / "limits.toml"
    file.write_text("[tenants.vip]\nmu_per_minute = 1000\n")
    sidecar = await start(engine.url, max_tenants="1", tenant_limits=str(file))

    async def ask(tenant: str, model: str) -> int:
        named = {"x-tenant-id": tenant}
        async with client.post(sidecar.relay + "/v1/completions", json=ASK | {"model": model}, headers=named) as answer:
            await answer.read()
            return answer.status

    async with aiohttp.ClientSession() as client:
        for first in range(0, 300, 20):
            asked = (ask(f"invented-{n}", f"made-up-{n}") for n in range(first, first + 20))
            assert set(await asyncio.gather(*asked)) == {404}
        assert [await ask(tenant, "scripted") for tenant in ("acme", "vip", "late")] == [200, 200, 200]
    page = await sidecar.until_metrics('sidecar_requests_total{model="scripted",outcome="ok",tenant="other"} 1.0')
    lines = [line for line in page.splitlines() if line.startswith("sidecar_requests_total{")]
    assert sorted(lines) == [
        'sidecar_requests_total{model="other",outcome="rejected",tenant="other"} 300.0',
        'sidecar_requests_total{model="scripted",outcome="ok",tenant="acme"} 1.0',
        'sidecar_requests_total{model="scripted",outcome="ok",tenant="other"} 1.0',
        'sidecar_requests_total{model="scripted",outcome="ok",tenant="vip"} 1.0',
    ]
