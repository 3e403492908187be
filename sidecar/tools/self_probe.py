"""`sidecar probe self`: whether the sidecar's own /healthz answers, for containers without curl."""

from __future__ import annotations

import http.client

from sidecar.errors import UsageError
from sidecar.flags import address
from sidecar.settings import Settings
from sidecar.tools.admin_port import fetch


def ask(admin: str) -> tuple[bool, str]:
    """Ask the admin port at HOST:PORT (empty: the default); whether it is healthy, and a line that says so."""
    try:
        host, port = address.parse(admin) if admin else Settings().admin
    except ValueError:
        raise UsageError(f"--admin: {admin[:80]!r} is not {address.expected}") from None
    try:
        status, _ = fetch((host, port), "/healthz")
    except (OSError, http.client.HTTPException) as e:
        return False, f"no answer on port {port} ({type(e).__name__})"
    return status == 200, f"HTTP {status} on port {port}"
