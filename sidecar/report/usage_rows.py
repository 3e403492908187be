"""Pure: the rows of usage records.

A row holds the sums of one span of time, tenant, model, outcome, source and rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final, NamedTuple

from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Settlement

MINUTE_S, QUARTER_S, HOUR_S, DAY_S = 60, 900, 3600, 86_400
TOLD, ESTIMATED, UNKNOWN = "told", "estimated", "unknown"
IDLE: Final = "idle"  # the outcome of GPU time that no request used
NO_CLIENT: Final = ""  # its tenant and model: client labels are never empty


# Older than --usage-days, over --usage-bytes, not written for too long.
EVICTION_REASONS: Final = ("age", "size", "memory")


class Rate(NamedTuple):
    """What a row was priced by: the coefficients' fingerprint, the engine's GPUs, and the price of an hour of one."""

    fingerprint: str = ""
    gpus: int = 1
    dollars_per_gpu_hour: float = 0.0


class UsageKey(NamedTuple):
    """`at` is the start of `span` seconds, since 1970. `source`: whether the engine reported the tokens."""

    at: int
    span: int
    tenant: str
    model: str
    outcome: str
    source: str
    rate: Rate


@dataclass(slots=True)
class UsageSums:
    """Sums of usage. `gpu_seconds` is by the cost model; `seconds` is the time from admission to settlement.

    `input_tokens` includes cached tokens and those of media. `joules` is None if no GPU's power is known.
    """

    requests: int = 0
    mu: float = 0.0
    gpu_seconds: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    seconds: float = 0.0
    image_tokens: int = 0
    audio_tokens: int = 0
    video_tokens: int = 0
    dollars: float = 0.0
    joules: float | None = None

    def add(self, other: UsageSums) -> None:
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.joules = add_known(self.joules, other.joules)

    @property
    def is_billable(self) -> bool:
        return self.mu > 0 or self.gpu_seconds != 0


NAMES: Final = tuple(f.name for f in fields(UsageSums))
COUNTED: Final = NAMES[:-1]  # all but the last, which can be unknown


def add_known(a: float | None, b: float | None) -> float | None:
    """The sum of those that are known."""
    return b if a is None else a if b is None else a + b


@dataclass(slots=True)
class PendingUsage:
    """Settlements that are not on disk yet: their sums, and their request ids with the times of settlement.

    `until`: GPU time is counted until then (seconds since 1970); 0: not known.
    """

    sums: dict[UsageKey, UsageSums] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    until: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.sums or self.ids)

    def count(self, id: str, key: UsageKey, sums: UsageSums) -> None:
        """Add a request to its row, and subtract what it used from the idle time of its minute.

        So both rows add up to the time that passed.
        """
        self._row(key).add(sums)
        self.ids[id] = key.at
        if sums.gpu_seconds:
            idle = self._row(idle_key(key.at, key.rate))
            idle.gpu_seconds -= sums.gpu_seconds
            idle.dollars -= sums.dollars
            idle.joules = add_known(idle.joules, None if sums.joules is None else -sums.joules)

    def _row(self, key: UsageKey) -> UsageSums:
        row = self.sums.get(key)
        if row is None:
            row = self.sums[key] = UsageSums()
        return row

    def add(self, other: PendingUsage) -> None:
        for key, sums in other.sums.items():
            self._row(key).add(sums)
        self.ids |= other.ids
        self.until = max(self.until, other.until)


@dataclass(frozen=True, slots=True)
class Eviction:
    """Rows that were dropped, for one of EVICTION_REASONS; `first` and `last` are the starts of their spans."""

    why: str
    rows: int
    requests: int
    mu: float
    gpu_seconds: float
    first: int
    last: int

    @property
    def is_billable(self) -> bool:
        return self.mu > 0 or self.gpu_seconds != 0


def merge_evictions(evictions: list[Eviction]) -> list[Eviction]:
    """One eviction for each reason, of billable rows and of others."""
    merged: dict[tuple[str, bool], Eviction] = {}
    for one in evictions:
        key = one.why, one.is_billable
        if (so_far := merged.get(key)) is not None:
            merged[key] = Eviction(
                one.why,
                so_far.rows + one.rows,
                so_far.requests + one.requests,
                so_far.mu + one.mu,
                so_far.gpu_seconds + one.gpu_seconds,
                min(so_far.first, one.first),
                max(so_far.last, one.last),
            )
        else:
            merged[key] = one
    return list(merged.values())


def tokens_by_kind(sums: UsageSums) -> dict[str, int]:
    """The tokens of a row, each counted once: `new` are those of text that were not cached."""
    media = {"image": sums.image_tokens, "audio": sums.audio_tokens, "video": sums.video_tokens}
    new = sums.input_tokens - sums.cached_tokens - sum(media.values())
    return {"new": new, "cached": sums.cached_tokens, "out": sums.output_tokens, **media}


def sums_of(settlement: Settlement, price: GpuPrice, unit_ms: float) -> UsageSums:
    """The sums that one settled request adds to its row. `unit_ms`: milliseconds of the engine of one MU."""
    work, mu = settlement.work, settlement.mu
    gpu_seconds = price.gpu_seconds(mu * unit_ms)
    left, media = work.uncached, []
    for tokens in (work.image_tokens, work.audio_tokens, work.video_tokens):
        media.append(min(tokens, left))  # encoder tokens are part of the uncached ones
        left -= media[-1]
    return UsageSums(
        requests=1,
        mu=mu,
        gpu_seconds=gpu_seconds,
        input_tokens=work.uncached + work.cached,
        cached_tokens=work.cached,
        output_tokens=settlement.delivered,
        images=work.images,
        seconds=settlement.settled.at - settlement.admitted.at,
        image_tokens=media[0],
        audio_tokens=media[1],
        video_tokens=media[2],
        dollars=price.dollars(gpu_seconds),
        joules=price.joules(gpu_seconds),
    )


def key_of(settlement: Settlement, rate: Rate, wall: float) -> UsageKey:
    """The row of a request that was settled at `wall` (seconds since 1970)."""
    minute = int(wall) // MINUTE_S * MINUTE_S
    source = TOLD if settlement.told else ESTIMATED
    return UsageKey(minute, MINUTE_S, settlement.tenant, settlement.model, settlement.settled.outcome, source, rate)


def rate_of(price: GpuPrice, fingerprint: str) -> Rate:
    return Rate(fingerprint, price.gpus, price.dollars_per_gpu_hour)


def idle_key(minute: int, rate: Rate) -> UsageKey:
    """The row of the GPU time of a minute that no request used."""
    return UsageKey(minute, MINUTE_S, NO_CLIENT, NO_CLIENT, IDLE, ESTIMATED, rate)


def idle_time(until: float, seconds: float, price: GpuPrice, fingerprint: str) -> PendingUsage:
    """The `seconds` before `until` (seconds since 1970) as idle time of all GPUs, by minute."""
    rate = rate_of(price, fingerprint)
    rows, start = {}, until - seconds
    while start < until:
        minute = int(start) // MINUTE_S * MINUTE_S
        end = min(until, minute + MINUTE_S)
        gpu_seconds = (end - start) * price.gpus
        rows[idle_key(minute, rate)] = UsageSums(
            gpu_seconds=gpu_seconds, dollars=price.dollars(gpu_seconds), joules=price.joules(gpu_seconds)
        )
        start = end
    return PendingUsage(rows, until=until)


def bound(sums: dict[UsageKey, UsageSums], most: int) -> tuple[dict[UsageKey, UsageSums], list[Eviction]]:
    """At most `most` rows: sum up to hours if there are more, then drop those without MU first, then the oldest."""
    if len(sums) <= most:
        return sums, []
    hours = PendingUsage()
    for key, one in sums.items():
        hours.add(PendingUsage({key._replace(at=key.at // HOUR_S * HOUR_S, span=HOUR_S): one}))
    by_worth = sorted(hours.sums.items(), key=lambda row: (row[1].is_billable, row[0].at), reverse=True)
    return dict(by_worth[:most]), evictions_of("memory", by_worth[most:])


def evictions_of(why: str, rows: list[tuple[UsageKey, UsageSums]]) -> list[Eviction]:
    """What is lost by dropping these rows, billable or not."""
    found = []
    for billable in (False, True):
        part = [(key, sums) for key, sums in rows if sums.is_billable is billable]
        if part:
            total, times = UsageSums(), [key.at for key, _ in part]
            for _, sums in part:
                total.add(sums)
            of = len(part), total.requests, total.mu, total.gpu_seconds, min(times), max(times)
            found.append(Eviction(why, *of))
    return found


def cut(sums: UsageSums, at: int, span: int, start: int, end: int) -> UsageSums:
    """The part of a row in [start, end), as if its work had been even; counts of adjacent parts add up to the row's."""
    low, high = max(start, at) - at, min(end, at + span) - at

    def part(total: float | None) -> float | None:
        if total is None:
            return None
        if isinstance(total, int):
            return total * high // span - total * low // span
        return total * (high - low) / span

    return UsageSums(*(part(getattr(sums, name)) for name in NAMES))  # type: ignore[arg-type]  # int stays int
