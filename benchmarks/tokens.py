"""Cost and benefit of counting prompt tokens: the relay's counter against its learned ratio, on real texts.

    .venv/bin/python benchmarks/tokens.py --tokenizer DIR --texts DIR [--texts DIR ...] [--longest 60000]

The tokenizer's DIR contains a tokenizer.json. Every file of at least 200 characters below the folders of texts (.md
.txt .py .js .json .html) is a prompt, in an order from a fixed seed. By length, it prints median and 90th percentile of
the wait for a count in milliseconds (without the timeout, plus the share that would have missed it), and the errors of
the count and of the learned ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path

from sidecar.events import Usage
from sidecar.load import cost_model
from sidecar.load.body_scan import scan
from sidecar.load.estimator import Estimator
from sidecar.load.request_shape import describe
from sidecar.relay.pricing import tokenizer

KINDS = (".md", ".txt", ".py", ".js", ".json", ".html")
LENGTHS = ((200, 1000), (1000, 4096), (4096, 16_000), (16_000, 1 << 30))  # characters
# Characters, milliseconds, CPU milliseconds, error of the count, error of the ratio.
Row = tuple[int, float, float, float, float]


def texts(folders: list[Path], most: int, longest: int) -> list[str]:
    """At most `most` files below the folders, each cut to `longest` characters."""
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in KINDS and f.is_file())
    random.Random(0).shuffle(files)
    read = (f.read_text(errors="replace")[:longest] for f in files[: 4 * most])
    return [text for text in read if len(text) >= LENGTHS[0][0]][:most]


async def rows(folder: str, prompts: list[str]) -> list[Row]:
    """One row per prompt."""
    counter = tokenizer.load_counter(folder)
    if counter is None:
        raise SystemExit(f"no usable {tokenizer.TOKENIZER_FILE} in {folder}, or the extra `tokenizer` is not installed")
    patient = tokenizer.TokenCounter(counter._encode, 60.0)
    estimator, found = Estimator(cost_model.Coefficients()), []
    for prompt in prompts:
        payload = {"model": "m", "prompt": prompt}
        began, used = time.perf_counter(), time.process_time()
        seen = scan(json.dumps(payload).encode())
        assert seen is not None
        counted = await patient.count(seen.found)
        took, cpu = 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - used)
        shape, true = describe(seen, "completions", 0), len(counter._encode([prompt])[0])
        assert counted is not None
        errors = abs(counted.tokens / true - 1), abs(estimator.text_tokens("t", shape) / true - 1)
        found.append((len(prompt), took, cpu, *errors))
        estimator.learn("t", shape, Usage(true, 1))
    counter.close()
    patient.close()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer")
    parser.add_argument("--texts", type=Path, action="append")
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=60_000)
    parser.add_argument(
        "--write",
        action="store_true",
        help="accepted by all benchmarks; here nothing is written, because the results depend on the texts",
    )
    chosen = parser.parse_args()
    if not chosen.tokenizer or not chosen.texts:
        print("nothing measured: give --tokenizer DIR and --texts DIR")
        return
    found = asyncio.run(rows(chosen.tokenizer, texts(chosen.texts, chosen.most, chosen.longest)))
    print("characters | prompts | ms p50 | ms p90 | CPU ms p50 | late | error of count | error of ratio")
    for low, high in LENGTHS:
        group = [row for row in found if low <= row[0] < high]
        if len(group) < 2:
            continue
        ms = statistics.quantiles((row[1] for row in group), n=10)
        late = statistics.fmean(row[1] > 1e3 * tokenizer.COUNT_TIMEOUT_S for row in group)
        cpu = statistics.median(row[2] for row in group)
        count, ratio = (statistics.fmean(row[n] for row in group) for n in (3, 4))
        name = f"{low} to {high}" if high < 1 << 30 else f"{low} and more"
        print(f"{name} | {len(group)} | {ms[4]:.2f} | {ms[8]:.2f} | {cpu:.2f} | {late:.1%} | {count:.1%} | {ratio:.1%}")


if __name__ == "__main__":
    main()
