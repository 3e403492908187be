"""`sidecar probe self`: whether the sidecar's own /healthz answers, for containers without curl."""

from __future__ import annotations

import http.client
from typing import Final

from sidecar.errors import UsageError
from sidecar.flags import address
from sidecar.settings import Settings

TIMEOUT_S: Final = 3.0
# Where a server that listens everywhere is asked.
LOOPBACKS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ask(admin: str) -> tuple[bool, str]:
    """Ask the admin port at HOST:PORT (empty: the default); whether it is healthy, and a line that says so."""
    try:
        host, port = address.parse(admin) if admin else Settings().admin
    except ValueError:
        raise UsageError(f"--admin: {admin[:80]!r} is not {address.expected}") from None
    connection = http.client.HTTPConnection(LOOPBACKS.get(host, host), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as e:
        return False, f"no answer on port {port} ({type(e).__name__})"
    finally:
        connection.close()
    return status == 200, f"HTTP {status} on port {port}"
