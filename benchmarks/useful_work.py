"""The useful-work matrix on the scripted engine next to the reference: `sidecar bench` with 512 tokens in, 128 out.

    python benchmarks/useful_work.py [--seconds N] [--dollars N] [--write]

The engine is simulated (20,000 prefill tokens per second, 10 ms per decode step, 64 sequences) in real time: about five
minutes in total. Compare ratios, not seconds: the reference ran on other hardware, for six minutes per row. `--write`
puts the table and a plot into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
from dataclasses import replace
from pathlib import Path

from sidecar.tools.bench import report
from sidecar.tools.bench.command import BenchSettings, bench
from sidecar.tools.bench.tally import BenchRow
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

HERE = Path(__file__).resolve().parent
# Of the reference: completed, dropped, p95 in seconds, dollars per 1k completed, SLO.
REFERENCE = {
    "steady-naive": (413, 2227, 60.3, 0.137976, "miss"),
    "steady-batched": (2670, 0, 1.61, 0.019752, "pass"),
    "burst-naive": (227, 2882, 120.0, 0.164137, "miss"),
    "burst-batched": (2570, 677, 10.91, 0.012768, "miss"),
}


def main() -> None:
    """Run, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the four runs")
    parser.add_argument(
        "--dollars", type=float, default=0.526, help="per GPU hour; the reference's figures fit this price"
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.seconds < 5:
        parser.error("--seconds must be at least 5")
    rows: list[BenchRow] = []
    asyncio.run(measure(args.seconds, args.dollars, rows))
    text = page(rows, args.seconds, args.dollars)
    print(text)
    if args.write:
        stem = HERE / "results" / f"useful-work-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".svg").write_text(report.plot(rows, "Useful work of the scripted engine, 512 in, 128 out"))


async def measure(seconds: float, dollars: float, rows: list[BenchRow]) -> None:
    """All four runs against a scripted engine."""
    chosen = BenchSettings(seconds=seconds, dollars_per_gpu_hour=dollars)
    async with ScriptedEngine(EngineSettings(listen=("127.0.0.1", 0))) as engine:
        await bench(replace(chosen, engine=engine.url), rows)


def page(rows: list[BenchRow], seconds: float, dollars: float) -> str:
    """The matrix next to the reference."""
    lines = [
        f"# Useful work on the scripted engine: 512 in, 128 out, {seconds:g} s a run, ${dollars:g} per GPU hour",
        "",
        "| profile | asked | completed | dropped | stalled | p50, s | p95, s | p99, s "
        "| first token p95, s | SLO | $ / 1k completed | $ / 1M tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(ours(r) for r in rows),
        "",
        "| reference | completed | share completed | here | dropped | p95, s | SLO | $ / 1k completed |",
        "|---|---|---|---|---|---|---|---|",
        *(theirs(r) for r in rows),
    ]
    return "\n".join(lines)


def ours(r: BenchRow) -> str:
    """One row of this run."""
    of = report.number
    return (
        f"| {r.profile} | {r.requests} | {r.completed} | {r.dropped} | {r.stalled} "
        f"| {of(r.p50, 2)} | {of(r.p95, 2)} | {of(r.p99, 2)} | {of(r.first_p95, 2)} "
        f"| {'pass' if r.slo_kept else 'miss'} "
        f"| {of(r.dollars_per_1k_completed, 4)} | {of(r.dollars_per_1m_tokens, 3)} |"
    )


def theirs(r: BenchRow) -> str:
    """One row of the reference, with both shares of completed requests."""
    completed, dropped, p95, dollars, slo = REFERENCE[r.profile]
    share, here = completed / (completed + dropped), r.completed / r.requests
    return f"| {r.profile} | {completed} | {share:.0%} | {here:.0%} | {dropped} | {p95:g} | {slo} | {dollars:.4f} |"


if __name__ == "__main__":
    main()
