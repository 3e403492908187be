"""Pure: parses an engine's metrics page into an EngineSample. Reads Prometheus text and OpenMetrics.

- A vLLM page of 100 KB and more is parsed every second. So one search finds the lines of the required series, and only
  those are parsed.
- Counters, running and waiting are summed over label sets (data-parallel ranks, finish reasons). KV use and start time
  are the maximum. Each rank also has its own numbers.
- A series that is not on the page is None. Garbage is raised for a value that is not a finite number >= 0, for a
  required line that cannot be parsed, and for a page that is not a metrics page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

from sidecar.engines.engine_type import EngineKind, KvCapacity, Series
from sidecar.readings import EngineSample, RankSample

# After the name: labels (quoted values may hold braces, commas and escaped quotes), value, and what may follow it: a
# timestamp, an OpenMetrics exemplar. Possessive, so that no page can make it backtrack.
_REST: Final = re.compile(
    rb'(\{(?:[^"}\n]++|"(?:[^"\\\n]++|\\[^\n])*+")*+\})?+[ \t]*+([^ \t\r\n]++)'
    rb"(?:[ \t]++-?[0-9.]++)?+[ \t]*+(?:#[^\n]*+)?+\r?(?:\n|\Z)"
)
_NUMBER: Final = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_LINE: Final = re.compile(rb"\s*(#|[a-zA-Z_:][a-zA-Z0-9_:]*[ \t{])")

_LARGEST: Final = frozenset({"kv_usage", "started_wall"})
# Fields of EngineSample that RankSample has, too.
RANKED: Final = ("running", "waiting", "generation_tokens")
MAX_RANK_DIGITS: Final = 4

Samples = Mapping[str, list[tuple[bytes, float]]]  # stem of a series name -> its (labels, value)


class Garbage(ValueError):
    """A page of status 200 that is not valid. The message is short and contains nothing of the page."""


def parse(page: bytes, kind: EngineKind) -> EngineSample:
    """The engine's own numbers. Raises Garbage."""
    samples = _samples(page, kind)
    if not samples and page.strip() and not _LINE.match(page):
        raise Garbage("not a metrics page")
    chosen = {
        field: series for field, options in kind.series.items() if (series := _first(samples, options)) is not None
    }
    tokens = chosen.get("generation_tokens")
    awake = [value for _, value in _lines(samples, kind.awake)] if kind.awake else []
    return EngineSample(
        **{field: _value(samples, field, series) for field, series in chosen.items()},
        tokens_at_end=tokens is not None and tokens.at_end,
        sleeping=max(awake) == 0 if awake else None,
        kv_capacity_tokens=_capacity(samples, kind.capacity) if kind.capacity else None,
        ranks=_ranks(samples, kind) if kind.rank else (),
    )


def _samples(page: bytes, kind: EngineKind) -> Samples:
    """All samples of the kind's series. Formats differ in a counter's `_total`: both spellings are accepted."""
    names = [s.name for options in kind.series.values() for s in options]
    names += [source.name for source in (kind.awake, kind.capacity) if source]
    samples: dict[str, list[tuple[bytes, float]]] = {}
    page = b"\n" + page
    for match in _pattern(tuple(dict.fromkeys(map(_stem, names)))).finditer(page) if names else ():
        stem = _stem(match[1].decode())
        samples.setdefault(stem, []).append(_read(page, match.end(), stem))
    return samples


@cache
def _pattern(stems: tuple[str, ...]) -> re.Pattern[bytes]:
    """Finds lines that begin with one of the names; the newline in front makes the search fast.

    A colon may be written as `_`: prometheus_client 0.26 does so in OpenMetrics 1.0.0 unless the scraper asks
    otherwise.
    """
    names = b"|".join(re.escape(stem).replace("_", "[_:]").encode() for stem in stems)
    return re.compile(rb"\n(" + names + rb")(?:_total)?(?=[{ \t])")


def _stem(name: str) -> str:
    """The common part of the spellings of a name."""
    return name.removesuffix("_total").replace(":", "_")


def _first(samples: Samples, options: Iterable[Series]) -> Series | None:
    """The first series that the page has."""
    return next((series for series in options if _lines(samples, series)), None)


def _value(samples: Samples, field: str, series: Series) -> float:
    """The value of a series that the page has: its sum over label sets, or its largest."""
    values = [value for _, value in _lines(samples, series)]
    return max(values) if field in _LARGEST else math.fsum(values)


def _lines(samples: Samples, series: Series) -> list[tuple[bytes, float]]:
    return [line for line in samples.get(_stem(series.name), ()) if _matches(line[0], series)]


def _ranks(samples: Samples, kind: EngineKind) -> tuple[RankSample, ...]:
    """The numbers of each rank, from the first series of a field that is on the page and names ranks."""
    found: dict[int, dict[str, float]] = {}
    for field in RANKED:
        lines = (_lines(samples, series) for series in kind.series.get(field, ()))
        for labels, value in next(filter(None, lines), ()):
            rank = _label(labels, kind.rank)
            if rank.isdecimal() and len(rank) <= MAX_RANK_DIGITS:
                of_rank = found.setdefault(int(rank), {})
                of_rank[field] = of_rank.get(field, 0.0) + value
    return tuple(RankSample(rank, **found[rank]) for rank in sorted(found))


def _capacity(samples: Samples, capacity: KvCapacity) -> float | None:
    """Tokens in the largest rank's KV cache; None if the page has no such number."""
    lines = samples.get(_stem(capacity.name), ())
    sizes = [_product(labels, capacity.products) if capacity.products else value for labels, value in lines]
    return max((size for size in sizes if 0 < size < math.inf), default=None)


def _product(labels: bytes, products: Iterable[tuple[str, ...]]) -> float:
    """The first product whose labels are all numbers, else 0."""
    for names in products:
        parts = [_label(labels, name) for name in names]
        if all(_NUMBER.fullmatch(part.encode()) for part in parts):
            return math.prod(map(float, parts))
    return 0.0


def _label(labels: bytes, name: str) -> str:
    """A label's value; empty if it is missing or contains escapes."""
    match = re.search(rb"[{,]" + name.encode() + rb'="([^"\\]*)"', labels)
    return match[1].decode("ascii", "replace") if match else ""


def _matches(labels: bytes, series: Series) -> bool:
    if series.label:
        return _has(labels, series.label.encode())
    if series.parts:
        part = series.parts.encode() + b'="'
        return not _has(labels, part) or _has(labels, part + b'"')
    return True


def _has(labels: bytes, start: bytes) -> bool:
    """Whether a label pair begins so; the character before it excludes `no_priority=` for `priority=`."""
    return b"{" + start in labels or b"," + start in labels


def _read(page: bytes, at: int, name: str) -> tuple[bytes, float]:
    """Labels and value of the line whose name ends at `at`."""
    match = _REST.match(page, at)
    if not match:
        raise Garbage(f"unreadable line of {name}")
    if not _NUMBER.fullmatch(match[2]):
        raise Garbage(f"{name} is not a number")
    value = float(match[2])
    if not 0 <= value < math.inf:
        raise Garbage(f"{name} is negative or infinite")
    return match[1] or b"", value
