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
