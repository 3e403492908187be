"""Ranges of usage records: they add up at every boundary, in every time zone, whatever the rows' spans."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.report.usage_query import read
from sidecar.report.usage_rows import DAY_S, HOUR_S, PendingUsage, Rate, UsageKey, UsageSums
from sidecar.report.usage_store import UsageStore

START = 1_800_000_000  # a full hour of UTC
ZONES = ["UTC", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe", "America/St_Johns"]


def write(folder: Path, rows: dict[tuple[int, int], int]) -> Path:
    """A file with (start, span) -> requests."""
    sums = {
        UsageKey(at, span, "a", "m", "ok", "told", Rate()): UsageSums(n, mu=float(n), output_tokens=3 * n)
        for (at, span), n in rows.items()
    }
    store = UsageStore(folder, 3660, 1 << 30)
    store.write(PendingUsage(sums), min(at for at, _ in rows))
    return store.path


def requests(path: Path, since: int, until: int) -> int:
    return sum(sums.requests for _, sums in read(path, since, until, ()))


def test_two_days_lose_nothing(tmp_path: Path) -> None:
    """A request a second for 48 hours, an hour of it summed up: 172,800, from any second of a minute on."""
    path = write(
        tmp_path, {(START, HOUR_S): 3600} | {(at, 60): 60 for at in range(START + HOUR_S, START + 2 * DAY_S, 60)}
    )
    assert requests(path, START, START + 2 * DAY_S) == 172_800
    assert requests(path, START + 17, START + 2 * DAY_S) == 172_800 - 17
    assert requests(path, START + 30 * 60, START + HOUR_S) == 1800


spans = st.sampled_from([60, 900, HOUR_S])


@given(
    st.dictionaries(st.tuples(st.integers(0, 59), spans), st.integers(0, 10_000), min_size=1, max_size=12),
    st.lists(st.integers(-100, 61 * HOUR_S), min_size=1, max_size=6),
    st.sampled_from(ZONES),
    st.sampled_from([(), ("day",), ("tenant", "hour"), ("model",)]),
)
def test_adjacent_ranges_add_up(
    tmp_path_factory: pytest.TempPathFactory,
    rows: dict[tuple[int, int], int],
    cuts: list[int],
    zone: str,
    by: tuple[str, ...],
) -> None:
    """Wherever the time is cut, the parts are the whole: of counts exactly, and in each group."""
    path = write(
        tmp_path_factory.mktemp("usage"), {(START + HOUR_S * n, span): count for (n, span), count in rows.items()}
    )
    ends = [START - DAY_S, *(START + cut for cut in sorted(set(cuts))), START + 4 * DAY_S]
    tz = ZoneInfo(zone)
    whole = dict(read(path, ends[0], ends[-1], by, tz))
    parts: dict[tuple[object, ...], UsageSums] = {}
    for since, until in pairwise(ends):
        for key, sums in read(path, since, until, by, tz):
            parts.setdefault(key, UsageSums()).add(sums)
    assert sum(sums.requests for sums in whole.values()) == sum(rows.values())
    for key, sums in whole.items():
        assert (parts[key].requests, parts[key].output_tokens) == (sums.requests, sums.output_tokens)
        assert parts[key].mu == pytest.approx(sums.mu)


@pytest.mark.parametrize("zone", ZONES)
def test_days_are_those_of_the_calendar(tmp_path: Path, zone: str) -> None:
    """Each minute of a fortnight in which clocks change is on its own day, in rows of a quarter of an hour too."""
    start = int(datetime(2026, 10, 20, tzinfo=UTC).timestamp())
    times, tz = range(start, start + 16 * DAY_S, 900), ZoneInfo(zone)
    path = write(tmp_path, dict.fromkeys(((at, 900) for at in times), 15))
    wanted: dict[str, int] = {}
    for at in range(start, start + 16 * DAY_S, 60):
        day = datetime.fromtimestamp(at, tz).date().isoformat()
        wanted[day] = wanted.get(day, 0) + 1
    assert {key[0]: sums.requests for key, sums in read(path, start, start + 16 * DAY_S, ("day",), tz)} == wanted


def test_an_hour_that_comes_twice_is_two(tmp_path: Path) -> None:
    """The offset distinguishes the two hours around the end of summer time."""
    start = int(datetime(2026, 10, 25, 0, tzinfo=UTC).timestamp())
    path = write(tmp_path, dict.fromkeys(((start + HOUR_S * n, HOUR_S) for n in range(2)), 7))
    hours = [key[0] for key, _ in read(path, start, start + DAY_S, ("hour",), ZoneInfo("Europe/Berlin"))]
    assert sorted(hours) == ["2026-10-25T02:00+01:00", "2026-10-25T02:00+02:00"]
