"""The first requests to an engine, whose responses identify its kind (engines/registry.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.engines import registry
from sidecar.signals.http_body import read_body

LOADING_STATUSES: Final = (0, 500, 502, 503, 504)  # of the model list while the engine is loading
# A large vLLM metrics page is 1-2 MiB.
MAX_PAGE_BYTES: Final = 16 << 20


@dataclass(slots=True)
class ProbeAnswers:
    """Responses by path: the HTTP status, or 0 with the last reason in `error`; and the bodies of status 200."""

    pages: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    error: str = ""


async def probe_engine(
    session: aiohttp.ClientSession, engine: str, headers: Mapping[str, str], timeout_s: float
) -> ProbeAnswers:
    """Request what identifies the common kinds, and more if that is inconclusive."""
    answers = ProbeAnswers()
    await request_pages(answers, session, engine, registry.FIRST_PATHS, headers, timeout_s)
    if answers.status["/v1/models"] not in LOADING_STATUSES and registry.recognise(answers.pages) == "openai":
        await request_pages(answers, session, engine, registry.FURTHER_PATHS, headers, timeout_s)
    return answers


async def request_pages(
    answers: ProbeAnswers,
    session: aiohttp.ClientSession,
    engine: str,
    paths: Iterable[str],
    headers: Mapping[str, str],
    timeout_s: float,
) -> None:
    """Request these paths and add the responses to `answers`."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    for path in paths:
        try:
            async with session.get(engine + path, headers=headers, timeout=timeout) as response:
                if response.status == 200:
                    answers.pages[path] = await read_body(response, MAX_PAGE_BYTES)
                answers.status[path] = response.status
        except TimeoutError:
            answers.status[path], answers.error = 0, f"no answer in {timeout_s:.0f} s"
        except (aiohttp.ClientError, OSError, ValueError) as e:
            answers.status[path], answers.error = 0, f"no connection ({type(e).__name__})"
