"""CPU of rendering requests with four 720p images, in cores, at given rates: the sidecar's renderer and vLLM's.

    .venv/bin/python benchmarks/render.py [--rates 10,35] [--seconds 10] [--rounds 3] [--no-vllm] [--write]

Both servers run at once and are asked in turn, interleaved, each at the same times. Their CPU time is that of all their
processes, from the kernel. Answers are compared before anything is timed. Images differ in every request, so that no
cache serves them. vLLM's environment: `python -m tests.vllm.environment`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import aiohttp
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sidecar.tools.synthetic_photos import photo  # noqa: E402
from tests.ports import free_port  # noqa: E402
from tests.vllm import environment  # noqa: E402
from tests.vllm.rendering import renderer  # noqa: E402

MODELS, MODEL = ROOT / "tests" / "render" / "models", "qwen2-vl"
PATH = "/v1/chat/completions/render"
IMAGES, PHOTOS = 4, 16
MAX_MODEL_LEN = 8192
QUESTION = "Describe what is in these pictures, please. " * 20


def bodies(count: int) -> list[bytes]:
    """Requests with four 720p JPEGs each; a comment at the end of each file makes it a new one."""
    files = [photo(1280, 720, seed) for seed in range(PHOTOS)]
    assert all(Image.open(io.BytesIO(file)).size == (1280, 720) for file in files)
    numbers = itertools.count()

    def part() -> dict[str, object]:
        number = next(numbers)
        data = files[number % PHOTOS] + b"%d" % number
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"},
        }

    made = []
    for _ in range(count):
        content = [*(part() for _ in range(IMAGES)), {"type": "text", "text": QUESTION}]
        body = {"model": "tiny", "mm_payload": "none", "messages": [{"role": "user", "content": content}]}
        made.append(json.dumps(body).encode())
    return made


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and all below it."""
    family = [process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


@contextlib.contextmanager
def ours(log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`sidecar render` with one worker."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "sidecar", "render", "--model", str(MODELS / MODEL), "--engine-model", MODEL),
        *("--max-model-len", str(MAX_MODEL_LEN), "--listen", f"127.0.0.1:{port}", "--workers", "1"),
    ]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def answer(http: aiohttp.ClientSession, url: str, body: bytes) -> tuple[float, object]:
    """Seconds until the answer, and the answer."""
    began = time.perf_counter()
    async with http.post(url + PATH, data=body, headers={"content-type": "application/json"}) as found:
        made = await found.json()
        assert found.status == 200, made
    return time.perf_counter() - began, made


async def load(url: str, process: psutil.Process, rate: float, seconds: float) -> tuple[float, float, int]:
    """Cores that a server used at a rate, the median latency, and the requests that it answered within the time."""
    requests = bodies(round(rate * seconds))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
        await answer(http, url, bodies(1)[0])
        before, began = cpu_seconds(process), time.perf_counter()
        tasks = []
        for number, body in enumerate(requests):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(answer(http, url, body)))
        taken = [await task for task in tasks]
        wall = time.perf_counter() - began
        used = cpu_seconds(process) - before
    # a server that is late uses its cores for longer: its work is related to the time that was offered
    return used / seconds, median(each for each, _ in taken), round(len(requests) / wall)


async def ready(url: str) -> None:
    """Wait until a server answers."""
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(f"{url}/health") as found:
                    if found.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise SystemExit("a server did not start")


async def compare(urls: list[str]) -> None:
    """Assert that all servers give the same answer."""
    body = bodies(1)[0]
    async with aiohttp.ClientSession() as http:
        found = [(await answer(http, url, body))[1] for url in urls]
    for made in found:
        assert isinstance(made, dict)
        del made["request_id"]
    assert all(made == found[0] for made in found), "the answers differ"


def measure(
    servers: dict[str, tuple[str, psutil.Process]], rates: list[float], seconds: float, rounds: int
) -> list[str]:
    """One row per rate and server; the servers take turns in every round."""
    lines = []
    for rate in rates:
        rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in servers}
        for number in range(rounds):
            print(f"{rate:g} requests/s, round {number + 1} of {rounds}", file=sys.stderr)
            for name, (url, process) in servers.items():
                rows[name].append(asyncio.run(load(url, process, rate, seconds)))
        for name, found in rows.items():
            cores, latency, answered = (median(column) for column in zip(*found, strict=True))
            each = cores / rate * 1e3
            lines.append(f"| {rate:g} | {name} | {cores:.3f} | {each:.1f} | {latency * 1e3:.0f} | {answered:g} |")
    return lines


def report(lines: list[str], command: str) -> str:
    return "\n".join(
        [
            f"# Rendering {IMAGES} JPEGs of 1280x720 a request, {time.strftime('%Y-%m-%d')}",
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
            f"`{command}`; load {os.getloadavg()[0]:.1f}.",
            "",
            "| requests/s | renderer | cores | CPU ms a request | median latency, ms | answered/s |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", default="10,35")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-vllm", action="store_true", help="the sidecar's renderer alone")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, process = stack.enter_context(ours(folder / "ours.log"))
        servers = {"`sidecar render --workers 1`": (url, process)}
        if not chosen.no_vllm and environment.complete():
            theirs = stack.enter_context(renderer(MODELS, MODEL, folder / "vllm.log", MAX_MODEL_LEN))
            servers["vLLM 0.32, `vllm launch render`"] = (theirs.url, theirs.root)
        asyncio.run(ready(url))
        asyncio.run(compare([url for url, _ in servers.values()]))
        lines = measure(servers, list(map(float, chosen.rates.split(","))), chosen.seconds, chosen.rounds)
    command = (
        f"python benchmarks/render.py --rates {chosen.rates} --seconds {chosen.seconds:g} --rounds {chosen.rounds}"
    )
    text = report(lines, command)
    print(text)
    if chosen.write:
        (Path(__file__).parent / "results" / f"render-{time.strftime('%Y-%m-%d')}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
