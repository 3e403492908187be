"""Pure: what tenants may use. A file of limits -> Limits; (limit, bucket, request, now) -> admitted, or refused and until when.

    spill_over_below = 0.7          # share of the engine's capacity; below it, tenants that may spill over get more than their own

    [default]                       # every tenant without a table of its own, each alone; without it they have no limit
    mu_per_minute = 60
    mu_in_flight = 4

    [tenants.acme]                  # in place of the default, not on top of it
    mu_per_minute = 600
    burst_mu = 100                  # most that is saved up; default: a minute's worth
    spill_over = true

The flow is a token bucket: it refills steadily up to `burst`, a request takes its estimate out, and its settlement puts back or takes
what the estimate was wrong by, which may leave a debt. So whenever a request is admitted, what was used so far is at most
burst + rate * t. A request larger than the burst is admitted from a full bucket: else it never could be. The stock is a sum of
reservations (90th percentile) of open requests; one request alone is always admitted, unless the limit is 0.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from sidecar.errors import UsageError

MAX_LIMITS_FILE_BYTES: Final = 1 << 20  # of the file
MAX_TENANT_NAME_CHARS: Final = 64  # characters of a tenant's name; longer ones are cut to that
NEVER_RETRY_AFTER_S: Final = 3600.0  # seconds to wait for what a limit of 0 will never allow
_MAX_MU: Final = 1e9


@dataclass(frozen=True, slots=True)
class TenantLimit:
    """One tenant's limits; None: none. `spill_over`: what others leave idle may be used on top."""

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
        """MU that a full bucket holds; without end where nothing is taken from it, so that a limit that is set later finds it full."""
        if self.mu_per_minute is None:
            return math.inf
        return self.mu_per_minute if self.burst_mu is None else self.burst_mu


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """All of a file."""

    default: TenantLimit = TenantLimit()
    tenants: Mapping[str, TenantLimit] = field(default_factory=dict)
    spill_over_below: float = 0.7

    def of(self, tenant: str) -> TenantLimit:
        """The limits of one tenant."""
        return self.tenants.get(tenant, self.default)


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """MU that may still be used, as of `at` (monotonic seconds); below 0 is a debt."""

    level: float
    at: float


@dataclass(frozen=True, slots=True)
class LimitExceeded:
    """Why a request is not admitted, and seconds until it would be; None where nobody can know."""

    what: Literal["mu_per_minute", "mu_in_flight"]
    wait: float | None


def refill(bucket: TokenBucket, limit: TenantLimit, now: float) -> TokenBucket:
    """The bucket at `now`."""
    gained = limit.rate * max(0.0, now - bucket.at)
    return TokenBucket(min(limit.burst, bucket.level + gained), max(now, bucket.at))


def check(limit: TenantLimit, bucket: TokenBucket, in_flight: float, mu: float, high: float) -> LimitExceeded | None:
    """None where a request of `mu` that reserves `high` is admitted. `bucket` is as of now, `in_flight` what others of it reserve."""
    if limit.mu_per_minute is not None:
        missing = min(mu, limit.burst) - bucket.level
        if missing > 0 or limit.mu_per_minute == 0:
            return LimitExceeded("mu_per_minute", missing / limit.rate if limit.rate > 0 else NEVER_RETRY_AFTER_S)
    most = limit.mu_in_flight
    if most is not None and (most == 0 or 0 < in_flight > most - high):
        return LimitExceeded("mu_in_flight", None if most > 0 else NEVER_RETRY_AFTER_S)
    return None


def charge(bucket: TokenBucket, limit: TenantLimit, mu: float) -> TokenBucket:
    """The bucket after `mu` was taken out, or put back where it is negative."""
    if limit.mu_per_minute is None:
        return bucket
    return TokenBucket(min(limit.burst, bucket.level - mu), bucket.at)


# --- the file ---


def parse(text: str, name: str) -> TenantLimits:
    """The limits of a file, TOML or JSON. Raises UsageError with one line that names the place."""
    raw = _read(text, name)
    for key in raw:
        _check_key(key, ("default", "tenants", "spill_over_below"), name)
    tenants = raw.get("tenants", {})
    if not isinstance(tenants, dict):
        raise UsageError(f"{name}: tenants must be a table of tenants")
    for tenant in tenants:
        if not 0 < len(tenant) <= MAX_TENANT_NAME_CHARS:
            raise UsageError(f"{name}: a tenant's name has 1 to {MAX_TENANT_NAME_CHARS} characters, not {len(tenant)}")
    below = _number(raw.get("spill_over_below", TenantLimits().spill_over_below), "spill_over_below", name)
    if below is None or below > 1:
        raise UsageError(f"{name}: spill_over_below must be a share from 0 to 1")
    return TenantLimits(
        default=_limit(raw.get("default", {}), "default", name),
        tenants={tenant: _limit(value, f"tenants.{tenant}", name) for tenant, value in tenants.items()},
        spill_over_below=below,
    )


def _read(text: str, name: str) -> dict[str, Any]:
    try:
        raw = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: neither TOML nor JSON: {str(error)[:100]}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: expected tables `default` and `tenants`")
    return raw


def _limit(raw: Any, place: str, name: str) -> TenantLimit:
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: {place} must be a table of limits")
    known = tuple(f.name for f in fields(TenantLimit))
    for key in raw:
        _check_key(key, known, f"{name}: {place}")
    spill_over = raw.get("spill_over", False)
    if not isinstance(spill_over, bool):
        raise UsageError(f"{name}: {place}.spill_over must be true or false")
    numbers = {key: _number(raw.get(key), f"{place}.{key}", name) for key in known if key != "spill_over"}
    if numbers["burst_mu"] is not None and numbers["mu_per_minute"] is None:
        raise UsageError(f"{name}: {place}.burst_mu needs {place}.mu_per_minute")
    return TenantLimit(**numbers, spill_over=spill_over)


def _check_key(key: str, known: tuple[str, ...], place: str) -> None:
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
