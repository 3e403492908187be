"""Pure: limits of tenants, their file, and whether a request is admitted.

    spill_over_below = 0.7          # share of the engine's capacity below which tenants may exceed their limits

    [default]                       # each tenant without its own table; without it, they have no limits
    mu_per_minute = 60
    mu_in_flight = 4

    [tenants.acme]                  # replaces the default
    mu_per_minute = 600
    burst_mu = 100                  # size of the bucket; default: one minute's worth
    spill_over = true

Rules:
- The flow is a token bucket, refilled steadily up to `burst`. A request takes its estimate, and its settlement corrects
  it, which may leave a debt. So at every admission, the use so far is at most burst + rate * t.
- A request larger than the burst is admitted from a full bucket; otherwise it never would be. A bucket that lacks
  less than MIN_MU is full, and so is each of a smaller burst.
- The stock is the sum of the reservations (90th percentile) of open requests. A single request is always admitted,
  unless the limit is 0.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from sidecar.errors import UsageError

MAX_LIMITS_FILE_BYTES: Final = 1 << 20
MAX_TENANT_NAME_CHARS: Final = 64  # longer names are cut
NEVER_RETRY_AFTER_S: Final = 3600.0  # for a limit of 0, which never allows a request
_MAX_MU: Final = 1e9
MIN_MU: Final = 1e-7  # less than any request costs: a bucket that lacks less is full but for rounding


@dataclass(frozen=True, slots=True)
class TenantLimit:
    """One tenant's limits; None: no limit. `spill_over`: it may also use what others leave idle."""

    mu_per_minute: float | None = None
    mu_in_flight: float | None = None
    burst_mu: float | None = None
    spill_over: bool = False

    @property
    def rate(self) -> float:
        """MU per second."""
        return (self.mu_per_minute or 0.0) / 60

    @property
    def burst(self) -> float:
        """MU of a full bucket; infinite without a limit, so that one set later starts with a full bucket."""
        if self.mu_per_minute is None:
            return math.inf
        return self.mu_per_minute if self.burst_mu is None else self.burst_mu


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """The limits of all tenants."""

    default: TenantLimit = TenantLimit()
    tenants: Mapping[str, TenantLimit] = field(default_factory=dict)
    spill_over_below: float = 0.7

    def of(self, tenant: str) -> TenantLimit:
        return self.tenants.get(tenant, self.default)


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """MU that may still be used, as of `at` (monotonic seconds); below 0 is a debt."""

    level: float
    at: float


@dataclass(frozen=True, slots=True)
class LimitExceeded:
    """Why a request is not admitted, and seconds until it would be; None if that is unknown."""

    what: Literal["mu_per_minute", "mu_in_flight"]
    wait: float | None


def refill(bucket: TokenBucket, limit: TenantLimit, now: float) -> TokenBucket:
    """The bucket at `now`."""
    gained = limit.rate * max(0.0, now - bucket.at)
    return TokenBucket(min(limit.burst, bucket.level + gained), max(now, bucket.at))


def check(limit: TenantLimit, bucket: TokenBucket, in_flight: float, mu: float, high: float) -> LimitExceeded | None:
    """None if a request of `mu` that reserves `high` is admitted.

    `bucket` is refilled up to now; `in_flight` is what the tenant's open requests reserve.
    """
    if limit.mu_per_minute is not None:
        missing = min(mu, limit.burst) - bucket.level
        if missing > MIN_MU or limit.mu_per_minute == 0:
            return LimitExceeded("mu_per_minute", missing / limit.rate if limit.rate > 0 else NEVER_RETRY_AFTER_S)
    stock = limit.mu_in_flight
    if stock is not None and (stock == 0 or 0 < in_flight > stock - high):
        return LimitExceeded("mu_in_flight", None if stock > 0 else NEVER_RETRY_AFTER_S)
    return None


def charge(bucket: TokenBucket, limit: TenantLimit, mu: float) -> TokenBucket:
    """The bucket after taking out `mu`, or putting it back if negative."""
    if limit.mu_per_minute is None:
        return bucket
    return TokenBucket(min(limit.burst, bucket.level - mu), bucket.at)


def parse(text: str, name: str) -> TenantLimits:
    """Parse a file of limits, TOML or JSON. Raises UsageError with one line that names the place."""
    try:
        raw = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: neither TOML nor JSON: {str(error)[:100]}") from None
    _check_keys(raw, ("default", "tenants", "spill_over_below"), name)
    tenants = raw.get("tenants", {})
    if not isinstance(tenants, dict):
        raise UsageError(f"{name}: tenants must be a table with one table per tenant")
    for tenant in tenants:
        if not 0 < len(tenant) <= MAX_TENANT_NAME_CHARS:
            raise UsageError(f"{name}: tenant names have 1 to {MAX_TENANT_NAME_CHARS} characters, not {len(tenant)}")
    below = _number(raw.get("spill_over_below", TenantLimits().spill_over_below), "spill_over_below", name)
    if below is None or below > 1:
        raise UsageError(f"{name}: spill_over_below must be a share from 0 to 1")
    return TenantLimits(
        default=_limit(raw.get("default", {}), "default", name),
        tenants={tenant: _limit(value, f"tenants.{tenant}", name) for tenant, value in tenants.items()},
        spill_over_below=below,
    )


def _limit(raw: Any, place: str, name: str) -> TenantLimit:
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: {place} must be a table of limits")
    known = tuple(f.name for f in fields(TenantLimit))
    _check_keys(raw, known, f"{name}: {place}")
    spill_over = raw.get("spill_over", False)
    if not isinstance(spill_over, bool):
        raise UsageError(f"{name}: {place}.spill_over must be true or false")
    numbers = {key: _number(raw.get(key), f"{place}.{key}", name) for key in known if key != "spill_over"}
    if numbers["burst_mu"] is not None and numbers["mu_per_minute"] is None:
        raise UsageError(f"{name}: {place}.burst_mu needs {place}.mu_per_minute")
    return TenantLimit(**numbers, spill_over=spill_over)


def _check_keys(keys: Iterable[str], known: tuple[str, ...], place: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UsageError(f"{place}: unknown key {key[:64]!r}; the nearest valid key is {near[0]}")


def _number(value: Any, place: str, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name}: {place} must be a number of model units >= 0")
    if not 0 <= value <= _MAX_MU:
        raise UsageError(f"{name}: {place} must be from 0 to {_MAX_MU:.0f}, not {value:g}")
    return float(value)
