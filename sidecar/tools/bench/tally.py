"""Pure: the one outcome of each request, and the sums of a run.

Quantiles are over completed requests only, and the cost of the whole run is divided by these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Outcome = Literal["completed", "dropped", "stalled", "cancelled", "failed"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("completed", "dropped", "stalled", "cancelled", "failed")
# HTTP statuses of an overloaded engine.
DROP_STATUSES: Final = (429, 503)
# Share of requests that may fail to complete within the SLO.
MAX_LOST_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class BenchRecord:
    """One request: outcome, seconds from arrival to end and to the first token (None if there was none), tokens."""

    ended: Outcome
    seconds: float
    first: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One run. Seconds; dollars are None without a price or completed requests; `whole`: not interrupted."""

    profile: str
    rate: float
    elapsed: float
    requests: int
    completed: int
    dropped: int
    stalled: int
    cancelled: int
    failed: int
    tokens: int
    p50: float | None
    p95: float | None
    p99: float | None
    first_p50: float | None
    first_p95: float | None
    slo_kept: bool
    dollars_per_1k_completed: float | None
    dollars_per_1m_tokens: float | None
    whole: bool = True


def sum_up(
    profile: str, rate: float, elapsed: float, records: list[BenchRecord], slo: float, price: float, whole: bool = True
) -> BenchRow:
    """Sum up one run. `slo`: limit in seconds on the completed requests' p95; `price`: dollars per hour of all GPUs."""
    ends = Counter(record.ended for record in records)
    good = [record for record in records if record.ended == "completed"]
    seconds = sorted(record.seconds for record in good)
    firsts = sorted(record.first for record in good if record.first is not None)
    tokens = sum(record.tokens for record in good)
    p95, lost, spent = quantile(seconds, 0.95), len(records) - len(good), price * elapsed / 3600
    return BenchRow(
        profile=profile,
        rate=rate,
        elapsed=elapsed,
        requests=len(records),
        **{ended: ends[ended] for ended in OUTCOMES},
        tokens=tokens,
        p50=quantile(seconds, 0.5),
        p95=p95,
        p99=quantile(seconds, 0.99),
        first_p50=quantile(firsts, 0.5),
        first_p95=quantile(firsts, 0.95),
        slo_kept=p95 is not None and p95 <= slo and lost <= MAX_LOST_SHARE * len(records),
        dollars_per_1k_completed=spent / len(good) * 1e3 if price and good else None,
        dollars_per_1m_tokens=spent / tokens * 1e6 if price and tokens else None,
        whole=whole,
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank quantile; None if there are no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
