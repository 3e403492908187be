"""The first requests to an engine, whose responses identify its kind (engines/registry.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.engines import registry
from sidecar.signals.http_body import read_body

# A large vLLM metrics page is 1-2 MiB.
MAX_PAGE_BYTES: Final = 16 << 20
MISSING_STATUS: Final = 404


@dataclass(slots=True)
class ProbeAnswers:
    """Responses by path: the HTTP status, or 0 with the last reason in `error`; and the bodies of status 200.

    `unanswered`: the last request was taken, and got no answer.
    """

    pages: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    error: str = ""
    unanswered: bool = False


async def probe_engine(
    session: aiohttp.ClientSession,
    engine: str,
    headers: Mapping[str, str],
    timeout_s: float,
    missing: Iterable[str] = (),
) -> ProbeAnswers:
    """Request what identifies the engine, one path after the other, until nothing could decide more.

    `missing`: paths that were 404 before, which are not asked for again. /v1/models always is.
    """
    answers = ProbeAnswers(status=dict.fromkeys(missing, MISSING_STATUS))
    answers.status.pop("/v1/models", None)
    while path := registry.next_path(answers.pages, answers.status):
        await request_pages(answers, session, engine, (path,), headers, timeout_s)
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
        answers.unanswered = False
        try:
            async with session.get(engine + path, headers=headers, timeout=timeout) as response:
                if response.status == 200:
                    answers.pages[path] = await read_body(response, MAX_PAGE_BYTES)
                answers.status[path] = response.status
        except TimeoutError:
            answers.status[path], answers.error = 0, f"no answer in {timeout_s:.0f} s"
            answers.unanswered = True
        except (aiohttp.ClientError, OSError, ValueError) as e:
            answers.status[path], answers.error = 0, f"no connection ({type(e).__name__})"
