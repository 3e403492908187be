"""The requests of a trace, accelerated or multiplied.

Numbers only. What the trace does not contain (tenants, max_tokens, the text) is not invented, except the number of text
bytes, which the estimator divides by a learned ratio.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sim import traces

BLOCK = 512  # tokens of a hashed prompt block in Mooncake's trace
BLOCKED = "mooncake-conversation.jsonl.gz"
BYTES = (4.2, 0.1)  # bytes per token of one prompt: median, spread of its logarithm


@dataclass(frozen=True, slots=True)
class Request:
    """One request: seconds since the trace began, tokens, bytes of its text, and the hashes of its prompt's blocks."""

    at: float
    prompt: int
    output: int
    text_bytes: int
    blocks: tuple[int, ...] = ()


def load(folder: Path) -> dict[str, list[Request]]:
    """The traces of `folder` by name. Raises ValueError if it contains none."""
    found = {
        name: [request(a.at, a.prompt, a.output, ()) for a in trace] for name, trace in traces.load(folder).items()
    }
    if (folder / BLOCKED).is_file():
        found[BLOCKED.split(".")[0]] = _blocked(folder / BLOCKED)
    return found


def synthetic(seconds: float, per_second: float, seed: int = 0) -> list[Request]:
    """Poisson arrivals with the sizes of a chat service; a third of the prompts continue an earlier one."""
    rng = random.Random(seed)
    found: list[Request] = []
    at = 0.0
    while (at := at + rng.expovariate(per_second)) < seconds:
        prompt, output = min(int(rng.lognormvariate(6.8, 1.0)) + 1, 16_000), int(rng.lognormvariate(4.6, 0.9)) + 1
        blocks = [rng.getrandbits(40) for _ in range(prompt // BLOCK)]
        if found and rng.random() < 1 / 3:
            blocks[: prompt // BLOCK // 2] = found[-1].blocks[: prompt // BLOCK // 2]
        found.append(request(at, prompt, output, tuple(blocks)))
    return found


def compressed(requests: Iterable[Request], factor: float) -> list[Request]:
    """The same requests, `factor` times as fast."""
    return [Request(r.at / factor, r.prompt, r.output, r.text_bytes, r.blocks) for r in requests]


def multiplied(requests: Iterable[Request], copies: int, seed: int, spread: float = 1.0) -> list[Request]:
    """Each request `copies` times within `spread` seconds: more similar users. Copies share no prefixes."""
    rng = random.Random(seed)
    all_ = [
        Request(
            r.at + (rng.random() * spread if n else 0.0),
            r.prompt,
            r.output,
            r.text_bytes,
            tuple((b, n) for b in r.blocks),
        )  # type: ignore[misc]
        for r in requests
        for n in range(copies)
    ]
    return sorted(all_, key=lambda r: r.at)


def _blocked(path: Path) -> list[Request]:
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    rows.sort(key=lambda row: row["timestamp"])
    return [
        request(
            row["timestamp"] / 1000, max(1, row["input_length"]), max(1, row["output_length"]), tuple(row["hash_ids"])
        )
        for row in rows
    ]


def request(at: float, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> Request:
    """A request whose text has about the usual number of bytes per token."""
    ratio = random.Random(f"{at}:{prompt}").lognormvariate(0.0, BYTES[1]) * BYTES[0]
    return Request(at, prompt, output, max(1, round(prompt * ratio)), blocks)
