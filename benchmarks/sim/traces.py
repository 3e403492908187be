"""Arrival traces: real ones from a folder, a synthetic one where that is absent.

Rules: a trace is a tuple of arrivals, numbers only; a folder without any known file is an error that says so.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

MAX_PROMPT_TOKENS = 600_000  # tokens; longer prompts of a trace are cut to it


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace: seconds since the trace began, prompt and output tokens."""

    at: float
    prompt: int
    output: int


class Trace(tuple[Arrival, ...]):
    """Arrivals in order of time. Hashed by identity: what is derived from a trace is cached by it."""

    __slots__ = ()
    __hash__ = object.__hash__


def load(folder: Path | None) -> dict[str, Trace]:
    """The traces of `folder` by name; the synthetic one where no folder is given.

    Raises ValueError where it holds none.
    """
    if folder is None or not folder.is_dir():
        return {"synthetic": synthetic()}
    found = {file: read(folder / file) for file, read in READERS.items() if (folder / file).is_file()}
    if not found:
        raise ValueError(f"no known trace in {folder}; expected one of: {', '.join(READERS)}")
    return {file.split(".")[0]: trace for file, trace in found.items()}


@lru_cache
def synthetic(hours: float = 1.0, per_second: float = 3.0) -> Trace:
    """Poisson arrivals; log-normal prompts (median 1,500) and outputs (median 120), shaped like chat services."""
    rng = random.Random(0)
    rows, at = [], 0.0
    while at < hours * 3600:
        rows.append((at, int(rng.lognormvariate(7.3, 1.2)), int(rng.lognormvariate(4.8, 0.9))))
        at += rng.expovariate(per_second)
    return arrivals(rows)


def arrivals(rows: Iterable[tuple[float, int, int]]) -> Trace:
    """Rows of (seconds, prompt, output) as a trace that begins at 0, with at least one token each."""
    ordered = sorted(rows)
    first = ordered[0][0] if ordered else 0.0
    return Trace(
        Arrival(at - first, min(max(1, prompt), MAX_PROMPT_TOKENS), max(1, output)) for at, prompt, output in ordered
    )


def _azure(path: Path) -> Trace:
    with gzip.open(path, "rt") as file:
        rows = csv.DictReader(file)
        return arrivals(
            (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows
        )


def _seconds(stamp: str) -> float:
    whole, _, part = stamp.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{part or 0}")


def _mooncake(path: Path) -> Trace:
    with gzip.open(path, "rt") as file:
        rows = (json.loads(line) for line in file)
        return arrivals((row["timestamp"] / 1000, row["input_length"], row["output_length"]) for row in rows)


READERS: dict[str, Callable[[Path], Trace]] = {
    "azure-2023-code.csv.gz": _azure,
    "azure-2023-conversation.csv.gz": _azure,
    "mooncake-conversation.jsonl.gz": _mooncake,
}
