"""The first questions to an engine, from whose answers its kind is told (engines/registry.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.engines import registry
from sidecar.signals.http_body import whole

LOADING_STATUS: Final = (0, 500, 502, 503, 504)  # of the model list: not there yet
MAX_PAGE: Final = 16 << 20  # a large vLLM page is 1-2 MiB


@dataclass(slots=True)
class ProbeAnswers:
    """What an engine answered, by path: HTTP status, or 0 with the reason in `why`; and the bodies of status 200."""

    pages: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    why: str = ""


async def probe_engine(
    session: aiohttp.ClientSession, engine: str, headers: Mapping[str, str], seconds: float
) -> ProbeAnswers:
    """Ask what tells the common cases apart, and look closer where that says nothing. Each question has `seconds`."""
    met = ProbeAnswers()
    await ask(met, session, engine, registry.FIRST_LOOK, headers, seconds)
    if met.status["/v1/models"] not in LOADING_STATUS and registry.recognise(met.pages) == "openai":
        await ask(met, session, engine, registry.CLOSER_LOOK, headers, seconds)
    return met


async def ask(
    met: ProbeAnswers,
    session: aiohttp.ClientSession,
    engine: str,
    paths: Iterable[str],
    headers: Mapping[str, str],
    seconds: float,
) -> None:
    """Add the answers of these paths."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    for path in paths:
        try:
            async with session.get(engine + path, headers=headers, timeout=timeout) as answer:
                body = await whole(answer, MAX_PAGE) if answer.status == 200 else b""
                met.status[path] = answer.status
                if answer.status == 200:
                    met.pages[path] = body
        except TimeoutError:
            met.status[path], met.why = 0, f"no answer in {seconds:.0f} s"
        except (aiohttp.ClientError, OSError, ValueError) as e:
            met.status[path], met.why = 0, f"no connection ({type(e).__name__})"
