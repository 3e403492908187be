"""The sidecar's gain with a real vLLM: photographs sent directly, and through the sidecar inline and by shared memory.

    python benchmarks/vllm_images.py [--rounds N] [--executor uni|mp] [--own-cores] [--write]

The environment is that of `make test-vllm`, or tests/vllm/environment.py. One vLLM on a CPU has a tiny Qwen2-VL whose
images are limited to 448 x 448, so that the vision tower is cheap and preprocessing shows; its image cache is off. Its
worker runs in the core's process, as on one GPU: the CPU's default, a separate worker, polls for a second after each
step, which occupies a core and counts as the engine's CPU time (`--executor mp` shows that). Engine, sidecar and client
share this machine's cores; with `--own-cores` the engine always has one to itself, and sidecar and client the rest.

Rules: the ways alternate in every round, and a row is the median over the rounds. Answers with log-probabilities are
compared before anything is timed. Every photograph of a block is another file (a comment is inserted), so that no cache
helps unless a row says so. CPU seconds are those of the process tree. `--write` keeps the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import datetime
import io
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sidecar.images import vllm_plugin
from sidecar.images.shm_cache import SHM_DIR
from sidecar.kernels import families
from sidecar.tools import synthetic_photos
from tests.vllm import client, environment, processes

PATH = "/v1/chat/completions"
LIMIT = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": LIMIT,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
SIZES = {"1080p": (1920, 1080), "12 MP": (4000, 3000)}
REPEATED = {"720p": (1280, 720), **SIZES}
REQUESTS = {"1080p": 32, "12 MP": 24}  # of one block
AT_ONCE = 8
DIRECT, INLINE, SHM = "vLLM alone", "sidecar, inline", "sidecar, shm"
SIDECARS = {INLINE: "inline", SHM: "shm"}
SMALL, TEXT = "vLLM alone, image already resized", "vLLM alone, no image"
FLAGS = {"canary-interval": "300", "silence-floor": "60", "log-level": "warning"}
DECODE = """
import sys, time, statistics, torch
from sidecar.images import file_headers as headers
from sidecar.images.worker.decode import decode
from sidecar.images.protocol import ImageLimits
torch.set_num_threads(1)
data, limits, taken = open(sys.argv[1], "rb").read(), ImageLimits(20 << 20, 50_000_000), []
for _ in range(9):
    start = time.thread_time()
    decode(data, headers.read(data), limits)
    taken.append(time.thread_time() - start)
print(statistics.median(taken))
"""
# vLLM refuses "uni" on a CPU, for the sake of OMP settings that ENGINE_ENV makes itself, unless this is said.
EXECUTORS = {"uni": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, "mp": {}}
_names = itertools.count()


@dataclass
class Row:
    """One way's blocks: requests per second, and CPU seconds per request of engine, sidecar and client."""

    rate: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    sidecar: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Cores:
    """Who runs where."""

    engine: set[int]
    others: set[int]

    @classmethod
    def shared(cls) -> Cores:
        every = os.sched_getaffinity(0)
        return cls(every, every)

    @classmethod
    def own(cls) -> Cores:
        """One for the engine; the rest for sidecar and client. Raises SystemExit where there is only one."""
        first, *rest = sorted(os.sched_getaffinity(0))
        if not rest:
            raise SystemExit("--own-cores needs two cores")
        return cls({first}, {*rest})

    def __str__(self) -> str:
        if self.engine == self.others:
            return f"{len(self.engine)} cores for engine, sidecar and client together"
        return f"one core for the engine alone, {len(self.others)} for sidecar and client together"


@dataclass(frozen=True)
class Way:
    """Where requests go, and whose CPU time counts as the sidecar's."""

    url: str
    sidecar: psutil.Process | None = None


def another(jpeg: bytes) -> bytes:
    """The same photograph as another file: with a comment that no other has."""
    note = b"%016d" % next(_names)
    return jpeg[:2] + b"\xff\xfe" + (2 + len(note)).to_bytes(2) + note + jpeg[2:]


def body(image: bytes | None, media: str = "image/jpeg", **more: Any) -> bytes:
    """A chat request for one token about one image."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is in this picture?"}]
    if image is not None:
        url = f"data:{media};base64,{base64.b64encode(image).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    asked = client.completion(**({"max_tokens": 1} | more)) | {"messages": [{"role": "user", "content": content}]}
    return json.dumps(asked).encode()


def resized(jpeg: bytes) -> bytes:
    """What the sidecar hands over inline: the image in its final size, as PPM."""
    import torch

    from sidecar.images import file_headers
    from sidecar.images.protocol import ImageLimits
    from sidecar.images.worker.decode import decode
    from sidecar.images.worker.tensors import ppm, resize

    torch.set_num_threads(1)
    spec = families.from_config(PROCESSOR)
    header = file_headers.read(jpeg)
    assert spec is not None and header is not None
    pixels = decode(jpeg, header, ImageLimits(20 << 20, 50_000_000))
    return bytes(ppm(resize(pixels, spec.geometry(*pixels.shape[-2:]), spec)))


async def ask(http: aiohttp.ClientSession, url: str, data: bytes) -> dict[str, Any]:
    """One answer, without what is new in each. A sidecar that still starts is waited for."""
    for _ in range(300):
        async with http.post(url + PATH, data=io.BytesIO(data), headers={"content-type": "application/json"}) as answer:
            whole = await answer.json()
            if answer.status == 200:
                return {name: value for name, value in whole.items() if name not in client.OWN}
            if answer.status != 503:
                raise SystemExit(f"{answer.status}: {whole}")
        await asyncio.sleep(0.2)
    raise SystemExit("the sidecar's image workers never became ready")


def cpu(root: psutil.Process | None) -> float:
    """CPU seconds of a process and all below it."""
    total = 0.0
    for process in [root, *root.children(recursive=True)] if root else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def block(http: aiohttp.ClientSession, way: Way, engine: psutil.Process, bodies: list[bytes], row: Row) -> None:
    """All requests of one block, AT_ONCE at a time."""
    before, start = (cpu(engine), cpu(way.sidecar), time.process_time()), time.perf_counter()
    waiting = iter(bodies)

    async def client_loop() -> None:
        for data in waiting:
            await ask(http, way.url, data)

    await asyncio.gather(*(client_loop() for _ in range(AT_ONCE)))
    took = time.perf_counter() - start
    row.rate.append(len(bodies) / took)
    row.engine.append((cpu(engine) - before[0]) / len(bodies))
    row.sidecar.append((cpu(way.sidecar) - before[1]) / len(bodies))
    row.client.append((time.process_time() - before[2]) / len(bodies))


async def throughput(
    http: aiohttp.ClientSession, ways: dict[str, Way], engine: psutil.Process, rounds: int
) -> dict[str, dict[str, Row]]:
    """Size -> way -> its blocks."""
    rows: dict[str, dict[str, Row]] = {}
    for size, (width, height) in SIZES.items():
        jpeg = synthetic_photos.photo(width, height, seed=1)
        small = body(resized(jpeg), "image/x-portable-pixmap")
        asked = body(jpeg, max_tokens=8, logprobs=True, top_logprobs=3)
        checks = [await ask(http, way.url, asked) for way in ways.values()]
        assert all(answer == checks[0] for answer in checks), "the answers differ: nothing is timed"
        rows[size] = {way: Row() for way in (*ways, SMALL, TEXT)}
        for turn in range(rounds + 1):
            for way, row in rows[size].items():
                count = REQUESTS[size] if turn else AT_ONCE  # the first turn warms up
                fixed = {SMALL: small, TEXT: body(None)}.get(way)
                bodies = [fixed or body(another(jpeg)) for _ in range(count)]
                await block(http, ways.get(way, ways[DIRECT]), engine, bodies, row if turn else Row())
    return rows


async def repeated(
    http: aiohttp.ClientSession, sidecar: processes.Sidecar, rounds: int
) -> dict[str, tuple[float, float]]:
    """Size -> mean seconds of the sidecar for an image that is new to it, and for one that it has cached."""
    found: dict[str, tuple[float, float]] = {}
    for size, (width, height) in REPEATED.items():
        jpeg = synthetic_photos.photo(width, height, seed=2)
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            bodies = [body(another(jpeg)) for _ in range(6)]
            for seconds in taken:
                seconds.append(await _image_seconds(http, sidecar, bodies))
        found[size] = (statistics.median(taken[0]), statistics.median(taken[1]))
    return found


async def _image_seconds(http: aiohttp.ClientSession, sidecar: processes.Sidecar, bodies: list[bytes]) -> float:
    """Mean time of an image in the sidecar, queueing included, by its own metrics; one request at a time."""
    page, labels = f"{sidecar.admin}/metrics", {"stage": "total"}

    async def reported() -> tuple[float, float]:
        name = "sidecar_image_seconds"
        return (
            await client.sample(http, page, f"{name}_count", **labels),
            await client.sample(http, page, f"{name}_sum", **labels),
        )

    count, total = await reported()
    for data in bodies:
        await ask(http, sidecar.url, data)
    await client.until(lambda: _reached(reported, count + len(bodies)), "all images reported")
    return ((await reported())[1] - total) / len(bodies)


async def _reached(reported: Any, count: float) -> bool:
    return bool((await reported())[0] >= count)


def decode_seconds(jpeg: bytes) -> float:
    """Decoding alone on one core, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(jpeg)
        file.flush()
        run = [sys.executable, "-c", DECODE, file.name]
        return float(subprocess.run(run, check=True, capture_output=True, text=True, cwd=processes.ROOT).stdout)


def limited(model: Path, folder: Path) -> Path:
    """The tiny model with small images, for engine and sidecar alike."""
    shutil.copytree(model, folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        config = json.loads((folder / name).read_text())
        config |= {"size": LIMIT, "min_pixels": LIMIT["shortest_edge"], "max_pixels": LIMIT["longest_edge"]}
        (folder / name).write_text(json.dumps(config))
    return folder


def tiny(folder: Path) -> Path:
    """The tiny Qwen2-VL of the tests, newly made."""
    script = processes.ROOT / "tests/vllm/tiny_models.py"
    environ = os.environ | processes.ENGINE_ENV
    subprocess.run(
        [str(environment.python()), str(script), "vision", str(folder)],
        check=True,
        env=environ,
        stderr=subprocess.DEVNULL,
    )
    return folder


@contextlib.asynccontextmanager
async def running(
    folder: Path, executor: str, cores: Cores
) -> AsyncIterator[tuple[dict[str, Way], psutil.Process, processes.Sidecar]]:
    """The engine and the sidecars next to it, each on its cores."""
    model = limited(tiny(folder / "made"), folder / "model")
    environ = processes.with_plugin(folder / "site") | EXECUTORS[executor]
    more = ("--mm-processor-cache-gb", "0", "--distributed-executor-backend", executor)
    with contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, cores.engine)  # inherited by what is started now
        engine = stack.enter_context(processes.engine(model, folder / "engine.log", environ=environ, more=more))
        os.sched_setaffinity(0, cores.others)
        assert not vllm_plugin.read_status(SHM_DIR).why, "images would go inline in the rows of shm"
        sidecars = {
            name: stack.enter_context(
                processes.sidecar(
                    engine.url,
                    folder / kind,
                    folder / f"{kind}.log",
                    model=str(model),
                    images=kind,
                    **FLAGS,
                )
            )
            for name, kind in SIDECARS.items()
        }
        ways = {DIRECT: Way(engine.url)} | {
            name: Way(sidecar.url, psutil.Process(sidecar.process.pid)) for name, sidecar in sidecars.items()
        }
        yield ways, engine.root, sidecars[INLINE]


def report(
    rows: dict[str, dict[str, Row]],
    again: dict[str, tuple[float, float]],
    loads: list[float],
    rounds: int,
    executor: str,
    cores: Cores,
) -> str:
    """Everything as Markdown."""
    lines = [
        "# A real vLLM and the sidecar on "
        f"{'the same cores' if cores.engine == cores.others else 'cores of their own'}: {cpu_name()}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"vLLM {environment.VERSION} on the CPU, tiny Qwen2-VL, images limited to 448 x 448, its image cache "
        f"off, executor {executor}; {cores}; "
        f"{AT_ONCE} requests at once, one token each, median of {rounds} interleaved rounds; "
        f"Python {platform.python_version()}. Load average before and after: {loads[0]:.1f}, {loads[1]:.1f} "
        "(the benchmark itself is "
        "about 3). The answers of all ways are equal, log-probabilities included.",
        "",
    ]
    for size, ways in rows.items():
        jpeg = synthetic_photos.photo(*SIZES[size], seed=1)
        lines += [
            f"## {size} JPEG, each another file",
            "",
            "| | requests/s | over vLLM alone | engine CPU ms/request | less engine CPU | sidecar CPU "
            "ms/request | client CPU ms/request |",
            "|---|---|---|---|---|---|---|",
            *(_line(name, row, ways[DIRECT]) for name, row in ways.items()),
            "",
            limit(SHM, decode_seconds(jpeg), len(cores.others), ways[DIRECT]),
            *([bounds(ways, len(cores.others))] if cores.engine != cores.others else []),
            "",
        ]
    lines += [
        "## Repeated images: time in the sidecar, by its own metrics (inline, one request at a time)",
        "",
        "| | first, ms | repeated, ms | faster |",
        "|---|---|---|---|",
        *(f"| {size} | {a * 1e3:.2f} | {b * 1e3:.2f} | {a / b:.0f}x |" for size, (a, b) in again.items()),
        "",
    ]
    return "\n".join(lines)


def _line(name: str, row: Row, base: Row) -> str:
    rate, engine, sidecar = (statistics.median(values) for values in (row.rate, row.engine, row.sidecar))
    faster = statistics.median(a / b for a, b in zip(row.rate, base.rate, strict=True))
    less = statistics.median(b / a if a else float("nan") for a, b in zip(row.engine, base.engine, strict=True))
    client = statistics.median(row.client)
    times = f"{engine * 1e3:.1f} | {less:.1f}x | {sidecar * 1e3:.1f} | {client * 1e3:.1f} |"
    return f"| {name} | {rate:.1f} | {faster:.2f}x | {times}"


def limit(way: str, seconds: float, cores: int, direct: Row) -> str:
    """What decoding alone allows, as an item of a list."""
    most = cores / seconds
    return (
        f"- Limit of {way}: decoding alone takes {seconds * 1e3:.1f} ms on one core, so {most:.0f} images/s "
        f"on {cores} that do nothing "
        f"else: {most / statistics.median(direct.rate):.1f}x vLLM alone."
    )


def bounds(ways: dict[str, Row], cores: int) -> str:
    """With --own-cores: the rates that CPU times alone allow, which other work on the machine disturbs less."""

    def seconds(way: str) -> tuple[float, float]:
        row = ways[way]
        return statistics.median(row.engine), (statistics.median(row.sidecar) + statistics.median(row.client)) / cores

    alone, resized = seconds(DIRECT)[0], seconds(SMALL)[0]
    found = ", ".join(
        f"{1 / max(seconds(way)):.1f} ({alone / max(seconds(way)):.1f}x, bound by the "
        f"{'engine' if seconds(way)[0] > seconds(way)[1] else 'sidecar'}) {way}"
        for way in SIDECARS
    )
    return (
        f"- By CPU time alone: the engine's core takes {1 / alone:.1f} requests/s by itself, and "
        f"{1 / resized:.1f} ({alone / resized:.1f}x) whose images come resized, "
        f"the most that any sidecar can give; with sidecar and client on {cores} core{'s' * (cores > 1)}: {found}."
    )


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor() or platform.machine()


async def measure(rounds: int, executor: str, cores: Cores) -> str:
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        kept = aiohttp.TCPConnector(keepalive_timeout=2)  # vLLM closes idle connections after 5 s
        async with (
            running(Path(folder), executor, cores) as (ways, engine, sidecar),
            aiohttp.ClientSession(connector=kept) as http,
        ):
            rows = await throughput(http, ways, engine, rounds)
            again = await repeated(http, sidecar, rounds)
    loads.append(os.getloadavg()[0])
    return report(rows, again, loads, rounds, executor, cores)


def main() -> None:
    """Print the tables; write them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--executor", choices=EXECUTORS, default="uni")
    parser.add_argument(
        "--own-cores", action="store_true", help="one core for the engine, the rest for sidecar and client"
    )
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    if not environment.complete():
        print(
            "the real vLLM is not installed: `make test-vllm` makes its environment (12 GB of disk); nothing "
            "is measured"
        )
        return
    text = asyncio.run(measure(chosen.rounds, chosen.executor, Cores.own() if chosen.own_cores else Cores.shared()))
    print(text)
    if chosen.write:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        folder = Path(__file__).parent / "results"
        kind = "own-cores-" if chosen.own_cores else ""
        (folder / f"vllm-images-{kind}{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}.md").write_text(text)


if __name__ == "__main__":
    main()
