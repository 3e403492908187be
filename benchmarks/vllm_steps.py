"""What writing its steps costs a real vLLM: tokens per second with the plug-in and without, one after the other.

    python benchmarks/vllm_steps.py [--rounds N] [--streams N] [--tokens N] [--write]

Two engines of the environment of `make test-vllm`, on the CPU with a tiny model, where a step takes least and its
report weighs most. The rounds alternate; a row is the median and the quartiles over the rounds. `--write` keeps
the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sidecar.launch import engine_plugin
from tests.vllm import client, environment, processes

SCRIPT = Path(processes.__file__).with_name("tiny_models.py")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if not environment.complete():
        parser.error("the real vLLM is not installed: python tests/vllm/environment.py makes its environment")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place = Path(folder)
        made = [str(environment.python()), str(SCRIPT), "text", str(place / "model")]
        subprocess.run(made, check=True, env=os.environ | processes.ENGINE_ENV)
        environs = {"without": {}, "with": {"PYTHONPATH": engine_plugin.write(str(place))}}
        engines = {
            name: stack.enter_context(processes.engine(place / "model", place / f"{name}.log", environ=environ))
            for name, environ in environs.items()
        }
        found: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(args.rounds + 1):
            for name in list(engines) if number % 2 else list(engines)[::-1]:
                rate = asyncio.run(tokens_per_second(engines[name].url, args.streams, args.tokens))
                if number:  # the first round warms up
                    found[name].append(rate)
    text = page(args, found)
    print(text)
    if args.write:
        stem = f"vllm-steps-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        (Path(__file__).parent / "results" / f"{stem}.md").write_text(text + "\n")


def page(args: argparse.Namespace, found: dict[str, list[float]]) -> str:
    """The table."""
    machine, load = platform.processor() or platform.machine(), os.getloadavg()[0]
    lines = [
        f"vLLM {environment.VERSION}, {args.streams} streams of {args.tokens} tokens, {args.rounds} rounds, {machine}, "
        f"load average {load:.1f}\n",
        "| plug-in | tokens/s, median | quartiles |",
        "|---|---|---|",
    ]
    for name, rates in found.items():
        low, middle, high = statistics.quantiles(rates, n=4)
        lines.append(f"| {name} | {middle:.0f} | {low:.0f} to {high:.0f} |")
    ratios = [a / b for a, b in zip(found["with"], found["without"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    lines.append(f"\nwith / without, round by round: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    return "\n".join(lines)


async def tokens_per_second(url: str, streams: int, tokens: int) -> float:
    """Of some streams at once."""
    body = client.completion("Go on.", max_tokens=tokens)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client.stream(session, f"{url}/v1/completions", body) for _ in range(streams)))
        return streams * tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
