"""Limits of tenants on the data path: a request is charged its estimate here, and its settlement corrects the charge.

Rules: a tenant without a limit is not charged. The file is read again when it changes, which is checked every
FILE_CHECK_INTERVAL_S. A bad file is logged once, and the last good one stays in
force; in a relay that restarted, that of the sidecar's start. Spill-over needs a load report: each one, once a second,
states how much capacity is idle, and each relay process may give away an even share of it until the next.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Final

from sidecar.errors import TenantLimited, UsageError
from sidecar.events import LoadReport
from sidecar.load.tenant_limits import TenantLimits
from sidecar.relay.pricing.tenant_accounts import TenantAccounts, TenantCharge
from sidecar.signals.limits_file import LimitsFile

FILE_CHECK_INTERVAL_S: Final = 2.0
LOAD_REPORT_STALE_S: Final = 5.0
OPENAI_LIMIT_TYPES: Final = {"mu_per_minute": "tokens", "mu_in_flight": "requests"}  # in OpenAI's errors
IN_FLIGHT_RETRY_S: Final = 1.0  # when to retry if open requests must end first

_log = logging.getLogger(__name__)


class Quota:
    """One per relay process. `path` is the file of limits, `limits` its content when the sidecar started."""

    def __init__(self, path: str, accounts: TenantAccounts, workers: int, limits: TenantLimits) -> None:
        self._file = LimitsFile(path)
        self._accounts = accounts
        self.close = accounts.close
        self._workers = workers
        self._limits = limits
        self._reload()
        self._spare = 0.0  # MU that may be given away
        self._reported_at = -math.inf

    def take(self, tenant: str, mu: float, high: float) -> TenantCharge | None:
        """Charge a request of `mu`, which may need `high`, to its tenant; None without limits. Raises TenantLimited."""
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
        if taken.what == "mu_per_minute":
            text = f"rate limit of {limit.mu_per_minute:g} model units per minute reached; this request needs {mu:.3g}"
        else:
            text = f"limit of {limit.mu_in_flight:g} model units in flight reached; this request may need {high:.3g}"
        wait = IN_FLIGHT_RETRY_S if taken.wait is None else taken.wait
        raise TenantLimited(text, wait, OPENAI_LIMIT_TYPES[taken.what])

    def settle(self, charge: TenantCharge | None, mu: float) -> None:
        """Correct the charge of a request that has ended and used `mu`."""
        if charge is not None:
            self._accounts.settle(charge, mu, time.monotonic())

    def on_load_report(self, load: LoadReport) -> None:
        """Take the spare capacity from a load report: what is idle below the threshold."""
        idle = max(0.0, self._limits.spill_over_below - load.utilization)
        self._spare = idle * load.mu_max_in_flight / self._workers
        self._reported_at = time.monotonic()

    async def watch(self) -> None:
        """Reload the file whenever it changes, until cancelled."""
        while True:
            await asyncio.sleep(FILE_CHECK_INTERVAL_S)
            await asyncio.to_thread(self.check_file)

    def check_file(self) -> None:
        """Read the file if it has changed."""
        if self._reload():
            _log.info("tenant limits reloaded")

    def _reload(self) -> bool:
        """Load the limits if the file changed. Returns whether there are new ones."""
        try:
            limits = self._file.read_changed()
        except UsageError as e:
            _log.error("%s; the previous limits stay in force", e)
            return False
        self._limits = limits or self._limits
        return limits is not None
