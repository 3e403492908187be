"""Images next to a real vLLM, at the limits that models publish: by itself, and with each hand-off of the sidecar.

    python benchmarks/vllm_images.py [--rounds N] [--own-cores] [--models NAMES] [--cases NAMES] [--write]

The environment is that of `make test-vllm`, or tests/vllm/environment.py. vLLM runs on the CPU with tiny models that
have the image processors of Qwen2.5-VL and Qwen3-VL, sizes included. Their towers have no layers, because a tower of
any size on a CPU would hide everything else: what is left is what an API process does with an image, and the way of its
tensors to the core. The cache of processed images is off; each request has other files. The plug-in comes by PYTHONPATH
from a state directory. Engine, sidecar and client share this machine's cores; with `--own-cores` the engine has one to
itself, and sidecar and client the rest.

Rules: the ways alternate in every round, and a row is the median over the rounds. Answers with log-probabilities are
compared before anything is timed. CPU seconds are those of vLLM's API process, of its core, and of the sidecar's
processes, without what these take when nothing is asked of them. `--write` keeps the table in benchmarks/results/.
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
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import one_core
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sidecar.images import vllm_plugin
from sidecar.images.shm_cache import SHM_DIR
from sidecar.kernels import families
from sidecar.launch import engine_plugin
from sidecar.tools import synthetic_photos
from tests.vllm import client, environment, processes

PATH = "/v1/chat/completions"
# processor settings of published models, on a tiny model of the same kind
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-VL": ("vision", {"min_pixels": 3136, "max_pixels": 12_845_056}),
    "Qwen3-VL": ("qwen3", {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}),
}
# case -> files of one request: format, width, height
CASES: dict[str, list[tuple[str, int, int]]] = {
    "720p": [("JPEG", 1280, 720)],
    "1080p": [("JPEG", 1920, 1080)],
    "12 MP": [("JPEG", 4000, 3000)],
    "screenshot, 1080p PNG": [("PNG", 1920, 1080)],
    "4 x 720p": [("JPEG", 1280, 720)] * 4,
    "16 x 720p": [("JPEG", 1280, 720)] * 16,
}
REQUESTS = {"720p": 24, "1080p": 16, "12 MP": 4, "screenshot, 1080p PNG": 12, "4 x 720p": 6, "16 x 720p": 3}
AT_ONCE = 4
CALIBRATED_S, IDLE_S = 30.0, 10.0
DIRECT, INLINE, SHM, AUTO = "vLLM alone", "inline", "shm, pixels", "auto, with the plug-in"
SIDECARS = {INLINE: "inline", SHM: "shm", AUTO: "auto"}
FLAGS = {"canary-interval": "300", "silence-floor": "60", "log-level": "warning"}
TOWER = {"depth": 0, "deepstack_visual_indexes": []}
LAYERS = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_position_embeddings": 32_768}
ENGINE = (
    *("--load-format", "dummy", "--max-model-len", "24576", "--max-num-batched-tokens", "24576"),
    *("--mm-processor-cache-gb", "0", "--distributed-executor-backend", "uni"),
)
# vLLM refuses "uni" on a CPU, for the sake of OMP settings that ENGINE_ENV makes itself, unless this is said.
EXECUTOR = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_names = itertools.count()


@dataclass
class Row:
    """One way's blocks: requests per second, and CPU seconds per request of API process, core and sidecar."""

    rate: list[float] = field(default_factory=list)
    api: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)
    sidecar: list[float] = field(default_factory=list)

    @property
    def outside_the_core(self) -> list[float]:
        """API process and sidecar: what the hand-off can change."""
        return [a + b for a, b in zip(self.api, self.sidecar, strict=True)]


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
    idle: float = 0.0  # CPU seconds per second that it takes anyway


def another(file: bytes) -> bytes:
    """The same picture as another file: with a comment or a text that no other has."""
    note = b"%016d" % next(_names)
    if file[:2] == b"\xff\xd8":
        return file[:2] + b"\xff\xfe" + (2 + len(note)).to_bytes(2) + note + file[2:]
    chunk = b"tEXt" + b"Comment\0" + note
    return file[:33] + (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + file[33:]


def body(files: list[bytes], **more: Any) -> bytes:
    """A chat request for one token about some images."""
    content: list[dict[str, Any]] = []
    for file in files:
        media = "jpeg" if file[:2] == b"\xff\xd8" else "png"
        url = f"data:image/{media};base64,{base64.b64encode(file).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": "What is in this picture?"})
    asked = client.completion(**({"max_tokens": 1} | more)) | {"messages": [{"role": "user", "content": content}]}
    return json.dumps(asked).encode()


def picture(kind: str, width: int, height: int) -> bytes:
    """A photograph as JPEG, or a screenshot as PNG."""
    if kind == "JPEG":
        return synthetic_photos.photo(width, height, seed=1)
    return one_core.screenshot(width, height)


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


def cpu(processes: list[psutil.Process]) -> float:
    """CPU seconds of some processes."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def tree(root: psutil.Process | None) -> list[psutil.Process]:
    return [root, *root.children(recursive=True)] if root else []


async def block(http: aiohttp.ClientSession, way: Way, engine: psutil.Process, bodies: list[bytes], row: Row) -> None:
    """All requests of one block, AT_ONCE at a time."""
    groups = [engine], engine.children(recursive=True), tree(way.sidecar)
    before, start = [cpu(group) for group in groups], time.perf_counter()
    waiting = iter(bodies)

    async def client_loop() -> None:
        for data in waiting:
            await ask(http, way.url, data)

    await asyncio.gather(*(client_loop() for _ in range(AT_ONCE)))
    took = time.perf_counter() - start
    row.rate.append(len(bodies) / took)
    spent = [(cpu(group) - earlier) / len(bodies) for group, earlier in zip(groups, before, strict=True)]
    spent[-1] -= way.idle * took / len(bodies)
    for column, seconds in zip((row.api, row.core, row.sidecar), spent, strict=True):
        column.append(seconds)


async def throughput(
    http: aiohttp.ClientSession, ways: dict[str, Way], engine: psutil.Process, cases: list[str], rounds: int
) -> dict[str, dict[str, Row]]:
    """Case -> way -> its blocks."""
    rows: dict[str, dict[str, Row]] = {}
    for case in cases:
        files = [picture(*numbers) for numbers in CASES[case]]
        asked = body(files, max_tokens=4, logprobs=True, top_logprobs=3)
        checks = [await ask(http, way.url, asked) for way in ways.values()]
        assert all(answer == checks[0] for answer in checks), "the answers differ: nothing is timed"
        rows[case] = {way: Row() for way in ways}
        for turn in range(rounds + 1):
            for way, row in rows[case].items():
                count = REQUESTS[case] if turn else min(AT_ONCE, REQUESTS[case])  # the first turn warms up
                bodies = [body([another(file) for file in files]) for _ in range(count)]
                await block(http, ways[way], engine, bodies, row if turn else Row())
    return rows


def model_of(name: str, folder: Path) -> Path:
    """A tiny model with the processor of a published one, and a tower without layers."""
    kind, limits = MODELS[name]
    script = processes.ROOT / "tests/vllm/tiny_models.py"
    environ = os.environ | processes.ENGINE_ENV
    subprocess.run(
        [str(environment.python()), str(script), kind, str(folder)], check=True, env=environ, stderr=subprocess.DEVNULL
    )
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        config = json.loads((folder / file).read_text())
        if file.startswith("pre"):
            config = {key: value for key, value in config.items() if key not in ("size", "min_pixels", "max_pixels")}
            config |= limits
            edges = {"shortest_edge": limits.get("min_pixels"), "longest_edge": limits.get("max_pixels")}
            config.setdefault("size", edges)
        (folder / file).write_text(json.dumps(config))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {key: value for key, value in TOWER.items() if key in config["vision_config"]}
    config["text_config"] |= LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.asynccontextmanager
async def running(name: str, folder: Path, cores: Cores) -> AsyncIterator[tuple[dict[str, Way], psutil.Process]]:
    """The engine and the sidecars next to it, each on its cores."""
    model = model_of(name, folder / "model")
    environ = {"PYTHONPATH": engine_plugin.write(str(folder))} | EXECUTOR
    with contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, cores.engine)  # inherited by what is started now
        engine = stack.enter_context(processes.engine(model, folder / "engine.log", environ=environ, more=ENGINE))
        os.sched_setaffinity(0, cores.others)
        spec = families.from_dir(str(model))
        assert spec is not None and not vllm_plugin.read_offer(SHM_DIR, spec).why, "no tensors would be handed over"
        sidecars = {
            way: stack.enter_context(
                processes.sidecar(
                    engine.url, folder / kind, folder / f"{kind}.log", model=str(model), images=kind, **FLAGS
                )
            )
            for way, kind in SIDECARS.items()
        }
        await asyncio.sleep(CALIBRATED_S)  # the image workers load and measure
        roots = {way: psutil.Process(sidecar.process.pid) for way, sidecar in sidecars.items()}
        before, start = {way: cpu(tree(root)) for way, root in roots.items()}, time.perf_counter()
        await asyncio.sleep(IDLE_S)
        took = time.perf_counter() - start
        idle = {way: (cpu(tree(root)) - before[way]) / took for way, root in roots.items()}
        ways = {way: Way(sidecar.url, roots[way], idle[way]) for way, sidecar in sidecars.items()}
        yield {DIRECT: Way(engine.url)} | ways, engine.root


def report(tables: dict[str, dict[str, dict[str, Row]]], loads: list[float], rounds: int, cores: Cores) -> str:
    """Everything as Markdown."""
    lines = [
        "# Images next to a real vLLM, on "
        f"{'the same cores' if cores.engine == cores.others else 'cores of their own'}: {cpu_name()}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"vLLM {environment.VERSION} on the CPU, tiny models whose towers have no layers, image processors with the "
        f"settings of the models named, its cache of processed images off; {cores}; {AT_ONCE} requests at once, one "
        f"token each, every file another one, median of {rounds} interleaved rounds; Python "
        f"{platform.python_version()}. Load average before and after: {loads[0]:.1f}, {loads[1]:.1f}. The answers of "
        "all ways are equal, log-probabilities included.",
        "",
    ]
    for name, rows in tables.items():
        lines += [
            f"## {name}",
            "",
            "| | requests/s | over vLLM alone | CPU ms/request: API process | core | sidecar | API process and sidecar "
            "over without |",
            "|---|---|---|---|---|---|---|",
        ]
        for case, ways in rows.items():
            lines += [_line(f"{case}: {way}", row, ways[DIRECT]) for way, row in ways.items()]
        lines.append("")
    return "\n".join(lines)


def _line(name: str, row: Row, base: Row) -> str:
    faster = statistics.median(a / b for a, b in zip(row.rate, base.rate, strict=True))
    total = statistics.median(a / b for a, b in zip(row.outside_the_core, base.api, strict=True))
    times = " | ".join(f"{statistics.median(column) * 1e3:.0f}" for column in (row.api, row.core, row.sidecar))
    return f"| {name} | {statistics.median(row.rate):.1f} | {faster:.2f} | {times} | {total:.2f} |"


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor() or platform.machine()


async def measure(names: list[str], cases: list[str], rounds: int, cores: Cores) -> str:
    loads, tables = [os.getloadavg()[0]], {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            kept = aiohttp.TCPConnector(keepalive_timeout=2)  # vLLM closes idle connections after 5 s
            async with (
                running(name, Path(folder), cores) as (ways, engine),
                aiohttp.ClientSession(connector=kept, timeout=aiohttp.ClientTimeout(total=300)) as http,
            ):
                tables[name] = await throughput(http, ways, engine, cases, rounds)
    loads.append(os.getloadavg()[0])
    return report(tables, loads, rounds, cores)


def main() -> None:
    """Print the tables; write them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
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
    cores = Cores.own() if chosen.own_cores else Cores.shared()
    text = asyncio.run(measure(chosen.models.split(","), chosen.cases.split(";"), chosen.rounds, cores))
    print(text)
    if chosen.write:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        folder = Path(__file__).parent / "results"
        kind = "own-cores-" if chosen.own_cores else ""
        (folder / f"vllm-images-{kind}{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}.md").write_text(text)


if __name__ == "__main__":
    main()
