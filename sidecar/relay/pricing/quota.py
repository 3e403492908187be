"""Limits of tenants on the data path: a request takes its estimate here, and its settlement corrects it.

Rules: without a limit for a tenant nothing is taken. The file is read again when it changes (a ConfigMap changes by its symlink, so its
time is looked at every LOOK seconds); a bad one is named once, and the last good one stays, in a relay that was started again that of the
sidecar's start. Spill-over needs a load report: each one, once a second, says how much is idle, of which each relay process may give
away its even share until the next.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from pathlib import Path
from typing import Final

from sidecar.errors import TenantLimited, UsageError
from sidecar.events import LoadReport
from sidecar.load.tenant_limits import MAX_LIMITS_FILE_BYTES, LimitExceeded, TenantLimit, TenantLimits, parse
from sidecar.relay.pricing.tenant_accounts import TenantAccounts, TenantCharge

FILE_CHECK_INTERVAL_S: Final = 2.0  # seconds
LOAD_REPORT_STALE_S: Final = 5.0  # seconds that a load report holds
OPENAI_LIMIT_TYPES: Final = {"mu_per_minute": "tokens", "mu_in_flight": "requests"}  # in OpenAI's errors
IN_FLIGHT_RETRY_S: Final = 1.0  # seconds after which to try again where open requests must end first

_log = logging.getLogger(__name__)


class Quota:
    """One per relay process. `path` is the file of limits, `limits` what it said when the sidecar started."""

    def __init__(self, path: str, accounts: TenantAccounts, workers: int, limits: TenantLimits) -> None:
        self._path = Path(path)
        self._accounts = accounts
        self._workers = workers
        self._stamp = _file_stamp(self._path)
        self._limits = limits
        self._reload()
        self._spare = 0.0  # MU that may be given away
        self._reported_at = -math.inf

    def take(self, tenant: str, mu: float, high: float) -> TenantCharge | None:
        """Charge a request of `mu`, which may need `high`, to its tenant; None where that has no limits. Raises TenantLimited."""
        limit = self._limits.of(tenant)
        if limit.mu_per_minute is None and limit.mu_in_flight is None:
            return None
        now = time.monotonic()
        taken = self._accounts.take(tenant, limit, mu, high, now)
        if isinstance(taken, TenantCharge):
            return taken
        if limit.spill_over and now - self._reported_at < LOAD_REPORT_STALE_S and mu <= self._spare:
            self._spare -= mu
            return self._accounts.spill(tenant, limit, high, now)
        raise limit_error(taken, limit, mu, high)

    def settle(self, charge: TenantCharge | None, mu: float) -> None:
        """A request has ended; it used `mu`."""
        if charge is not None:
            self._accounts.settle(charge, mu, time.monotonic())

    def on_load_report(self, load: LoadReport) -> None:
        """A load report: what is idle below the threshold may be given away."""
        idle = max(0.0, self._limits.spill_over_below - load.utilization)
        self._spare = idle * load.mu_max_in_flight / self._workers
        self._reported_at = time.monotonic()

    async def watch(self) -> None:
        """Read the file again whenever it changes, until cancelled."""
        while True:
            await asyncio.sleep(FILE_CHECK_INTERVAL_S)
            await asyncio.to_thread(self.check_file)

    def check_file(self) -> None:
        """Read the file if it has changed."""
        stamp = _file_stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if self._reload():
            _log.info("the tenants' limits were read again")

    def _reload(self) -> bool:
        """Whether the file is good, and so in force."""
        try:
            self._limits = read_limits(str(self._path))
        except UsageError as e:
            _log.error("%s; the limits that were read before stay in force", e)
            return False
        return True

    def close(self) -> None:
        """Let go of the accounts."""
        self._accounts.close()


def read_limits(path: str) -> TenantLimits:
    """The limits in a file. Raises UsageError."""
    name = f"--tenant-limits {path}"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_LIMITS_FILE_BYTES + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise UsageError(f"{name}: cannot be read ({why})") from None
    if len(raw) > MAX_LIMITS_FILE_BYTES:
        raise UsageError(f"{name}: larger than {MAX_LIMITS_FILE_BYTES} bytes")
    return parse(text, name)


def limit_error(why: LimitExceeded, limit: TenantLimit, mu: float, high: float) -> TenantLimited:
    """What the client is told."""
    if why.what == "mu_per_minute":
        text = f"rate limit of {limit.mu_per_minute:g} model units per minute reached; this request needs {mu:.3g}"
    else:
        text = f"limit of {limit.mu_in_flight:g} model units in flight reached; this request may need {high:.3g}"
    return TenantLimited(text, IN_FLIGHT_RETRY_S if why.wait is None else why.wait, OPENAI_LIMIT_TYPES[why.what])


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file; None where it is away."""
    try:
        at = path.stat()
    except OSError:
        return None
    return at.st_ino, at.st_mtime_ns, at.st_size
