"""Questions to a sidecar's admin port, for commands of one look: blocking, bounded, without a library."""

from __future__ import annotations

import http.client
import json
from typing import Any, Final

from sidecar.errors import SidecarError

TIMEOUT_S: Final = 3.0
MAX_ANSWER_BYTES: Final = 4 << 20
# Where a server that listens everywhere is asked.
LOOPBACKS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class NoAnswer(SidecarError):
    """The admin port does not answer, or not as a sidecar does."""

    code = "no_answer"


def place(admin: tuple[str, int]) -> str:
    """HOST:PORT as it is asked."""
    host = LOOPBACKS.get(admin[0], admin[0])
    return f"[{host}]:{admin[1]}" if ":" in host else f"{host}:{admin[1]}"


def fetch(admin: tuple[str, int], path: str) -> tuple[int, bytes]:
    """GET a path: HTTP status and body. Raises OSError and HTTPException."""
    connection = http.client.HTTPConnection(LOOPBACKS.get(admin[0], admin[0]), admin[1], timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(MAX_ANSWER_BYTES)
    finally:
        connection.close()


def fetch_status(admin: tuple[str, int]) -> dict[str, Any]:
    """The sidecar's /status (report.status_json). Raises NoAnswer, whose text says what to do."""
    try:
        status, body = fetch(admin, "/status")
    except TimeoutError:
        raise NoAnswer(f"no answer from {place(admin)} within {TIMEOUT_S:.0f} s; see the sidecar's log") from None
    except (OSError, http.client.HTTPException) as e:
        why = getattr(e, "strerror", None) or type(e).__name__
        remedy = "is `sidecar run` running, and is that its --admin address?"
        raise NoAnswer(f"no answer from {place(admin)} ({why.lower()}); {remedy}") from None
    try:
        content = json.loads(body) if status == 200 else None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("state"), str):
        remedy = "give the sidecar's --admin address, not the relay's; an older sidecar has no /status"
        raise NoAnswer(f"{place(admin)} answers /status with HTTP {status}, but not as a sidecar does; {remedy}")
    return content
