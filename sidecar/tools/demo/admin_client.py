"""A client of a sidecar's admin port, for commands that run next to it.

A request without an answer returns None and never raises. Verdict times are seconds on the wall clock.
"""

from __future__ import annotations

import json
from typing import Any, Final, Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

REQUEST_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class AdminClient:
    """One session to one admin port, open inside `async with`."""

    def __init__(self, url: str) -> None:
        self._http = aiohttp.ClientSession(url, timeout=REQUEST_TIMEOUT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def load(self) -> dict[str, Any] | None:
        """`GET /load`."""
        return await self._json("/load")

    async def changes(self, after: float) -> list[dict[str, Any]]:
        """The verdict changes since a wall-clock time, oldest first."""
        answer = await self._json("/verdicts")
        return [v for v in reversed(answer["verdicts"]) if v["since"] > after] if answer else []

    async def model_units(self) -> dict[str, float] | None:
        """MU settled since the sidecar's start, by outcome, from its metrics page."""
        page = await self._get("/metrics")
        return None if page is None else units_by_outcome(page)

    async def _json(self, path: str) -> dict[str, Any] | None:
        try:
            answer = json.loads(await self._get(path) or "null")
        except ValueError:
            return None
        return answer if isinstance(answer, dict) else None

    async def _get(self, path: str) -> str | None:
        try:
            async with self._http.get(path) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None


def units_by_outcome(page: str) -> dict[str, float] | None:
    """`sidecar_mu_total` summed over tenants and models. None if the text is no metrics page."""
    units: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "sidecar_mu_total":
                    outcome = sample.labels["outcome"]
                    units[outcome] = units.get(outcome, 0.0) + sample.value
    except (ValueError, KeyError):
        return None
    return units
