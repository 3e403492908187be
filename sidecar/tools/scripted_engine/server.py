"""The scripted engine: an OpenAI-compatible server that behaves like vLLM, in simulated time, with faults on command.

It runs in `sidecar engine`, in the demo and in the tests. One process, one event loop: a task per data-parallel rank,
one for the faults of the process itself (a closed port, a crash), and the HTTP server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from aiohttp import web

from sidecar.errors import StartError
from sidecar.flags import address, flag, integer, number, one_of, text
from sidecar.tools.scripted_engine.api import EngineParts, application
from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.condition import EngineCondition
from sidecar.tools.scripted_engine.core import EngineCore
from sidecar.tools.scripted_engine.faults import FAULTS, Faults
from sidecar.tools.scripted_engine.metrics import EngineMetrics
from sidecar.tools.scripted_engine.scheduler import SchedulerLimits
from sidecar.tools.scripted_engine.served_models import ServedModels

# As in vLLM's API server.
BACKLOG = 2048
# Open streams are cut at the end, as by a killed engine.
SHUTDOWN_TIMEOUT_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of `sidecar engine`. The default speeds are those of an 8B model on one H100, rounded."""

    listen: tuple[str, int] = flag(("127.0.0.1", 8000), address, "Where the engine listens", heading="Server")
    served_model: str = flag("scripted", text, "Name of the model it serves")
    prefill_tokens_per_second: float = flag(
        20_000.0, number(1, 1_000_000_000, "tokens per second"), "Speed of prefill", heading="Speed and scheduling"
    )
    decode_step_ms: float = flag(10.0, number(0, 60_000, "milliseconds"), "Time of one decode step")
    max_batch: int = flag(64, integer(1, 4096), "Most running sequences")
    max_waiting: int = flag(2048, integer(1, 100_000), "Most waiting sequences before requests are refused")
    full_status: int = flag(503, integer(400, 599), "Status of requests beyond --max-waiting")
    scheduling: str = flag("fcfs", one_of("fcfs", "priority"), "Order of waiting requests, as vLLM's policies")
    adapters: int = flag(
        0, integer(0, 1000), "LoRA adapters that it serves as models: adapter-1, adapter-2, ...", heading="Models"
    )
    max_adapters: int = flag(1, integer(1, 1000), "Most adapters in the batch; requests for others wait")
    models: int = flag(1, integer(1, 1000), "Models that it serves, one loaded at a time: NAME, NAME-2, ...")
    model_load_seconds: float = flag(5.0, number(0, 3600, "seconds"), "Time to load one of several models")
    model_status: str = flag("none", one_of("none", "listed"), "Whether /v1/models says which of several is loaded")
    answer_tokens: int = flag(
        0,
        integer(0, 1_000_000),
        "Tokens of an answer without a limit; 0: a seeded number",
        heading="Speed and scheduling",
    )
    kv_tokens: int = flag(131_072, integer(64, 100_000_000), "Tokens that the KV cache holds")
    chunked_prefill_tokens: int = flag(2048, integer(1, 1_000_000), "Token budget of one step")
    data_parallel: int = flag(1, integer(1, 64), "Ranks, each with a core of its own")
    image_ms: float = flag(
        15.0,
        number(0, 10_000, "milliseconds"),
        "Own preprocessing of an image that is no BMP, per megapixel, on one thread",
    )
    load_seconds: float = flag(0.0, number(0, 86_400, "seconds"), "Length of start-up", heading="Start-up and faults")
    load_port: str = flag("open", one_of("open", "refused"), "The port during start-up: open with 503, or refused")
    seed: int = flag(0, integer(0, 2**63), "Seed of lengths and texts")
    fault: str = flag("", one_of("", *FAULTS), "A fault that is active from the start")

    def limits(self) -> SchedulerLimits:
        """The sizes and speeds of one rank."""
        return SchedulerLimits(
            self.prefill_tokens_per_second,
            self.decode_step_ms / 1000,
            self.max_batch,
            self.max_waiting,
            self.kv_tokens,
            self.chunked_prefill_tokens,
            self.max_adapters,
        )


class ScriptedEngine:
    """The engine as an async context manager: it listens from entry to exit.

    `faults` are also at /faults, `cores` are its ranks. The `crash` fault calls `on_exit` with the exit code; by
    default the port closes, all connections break and `exit_code` is set. `restarts` counts those of the `restart`
    faults.
    """

    def __init__(
        self,
        settings: EngineSettings | None = None,
        sock: socket.socket | None = None,
        on_exit: Callable[[int], object] | None = None,
    ) -> None:
        self.settings = settings or EngineSettings(listen=("127.0.0.1", 0))
        self.faults = Faults(self._initial_behaviour())
        self.cores: tuple[EngineCore, ...] = ()
        self.exit_code: int | None = None
        self.restarts = 0
        self.models = ServedModels(
            self.settings.served_model,
            self.settings.models,
            self.settings.model_load_seconds,
            status=self.settings.model_status == "listed",
            adapters=self.settings.adapters,
        )
        self._activity = EngineCondition()
        self._sock = sock
        self._on_exit = on_exit
        self._metrics: EngineMetrics | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._site: web.SockSite | None = None
        self._preprocessor = ThreadPoolExecutor(1, "preprocess")

    @property
    def url(self) -> str:
        host, port = self._address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def open(self) -> int:
        """Requests that are neither done nor aborted."""
        return sum(core.open for core in self.cores)

    @property
    def listening(self) -> bool:
        """Whether the port accepts connections."""
        return self._site is not None

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true; checked after each step, admission, abort and change of the port."""
        await self._activity.until(ready)

    async def __aenter__(self) -> ScriptedEngine:
        self._sock = self._sock or bind_socket(self.settings.listen)
        self._address = self._sock.getsockname()
        if self.settings.fault:
            self.faults.start(self.settings.fault)
        settings, limits = self.settings, self.settings.limits()
        metrics = self._metrics = EngineMetrics(settings.served_model, settings.data_parallel, settings.kv_tokens)
        ranks = range(settings.data_parallel)
        self.cores = tuple(EngineCore(rank, limits, self.faults, metrics, self._activity) for rank in ranks)
        self._runner = web.AppRunner(
            application(self._parts(metrics)),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await self._runner.setup()
        if self.faults.behaviour.port_open:
            await self._open()
        if self.settings.load_seconds:
            loop = asyncio.get_running_loop()
            self._loaded = loop.call_later(self.settings.load_seconds, self.faults.rebase, Behaviour())
        jobs = (*(core.run() for core in self.cores), self._apply_process_faults())
        self._tasks = [asyncio.create_task(job) for job in jobs]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.settings.load_seconds:
            self._loaded.cancel()
        await self._runner.cleanup()
        if self._sock:
            self._sock.close()
        self.faults.clear()
        self._preprocessor.shutdown(wait=False, cancel_futures=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def wait(self) -> None:
        """Run until one of the engine's tasks fails, and raise its exception."""
        await asyncio.gather(*self._tasks)

    def _initial_behaviour(self) -> Behaviour:
        if not self.settings.load_seconds:
            return Behaviour()
        return Behaviour(loading=True, port_open=self.settings.load_port == "open")

    @property
    def scrapes(self) -> int:
        """Number of metrics pages served."""
        return self._metrics.scrapes if self._metrics else 0

    def _parts(self, metrics: EngineMetrics) -> EngineParts:
        settings = self.settings
        return EngineParts(
            self.models,
            settings.seed,
            settings.kv_tokens,
            settings.answer_tokens,
            settings.scheduling == "priority",
            settings.full_status,
            settings.image_ms / 1e9,
            self.cores,
            self.faults,
            metrics,
            self._preprocessor,
        )

    async def _apply_process_faults(self) -> None:
        """Open or close the port, restart or exit, as the faults demand."""
        while self.exit_code is None:
            await self.faults.until(
                lambda behaviour: (
                    behaviour.exit_code is not None
                    or behaviour.restart is not None
                    or behaviour.port_open != bool(self._site)
                )
            )
            behaviour = self.faults.behaviour
            if behaviour.exit_code is not None:
                await self._exit(behaviour.exit_code)
            elif behaviour.restart is not None:
                await self._restart(*behaviour.restart)
            elif behaviour.port_open:
                await self._open()
            else:
                await self._close()

    async def _exit(self, code: int) -> None:
        if self._on_exit:
            self._on_exit(code)
        self.exit_code = code
        await self._close()

    async def _restart(self, down: float, fault: str) -> None:
        """Close the port, and open it after `down` seconds as a new process that has this fault, or none."""
        await self._close()
        self.faults.clear()
        await asyncio.sleep(down)
        for core in self.cores:
            core.restart()
        if self._metrics:
            self._metrics.restart()
        if fault:
            self.faults.start(fault)
        self.restarts += 1
        await self._open()

    async def _open(self) -> None:
        sock = self._sock or bind_socket(self._address[:2])
        self._sock = None  # the site closes it
        self._listener = sock
        self._site = web.SockSite(self._runner, sock, backlog=BACKLOG)
        await self._site.start()
        self._activity.notify()

    async def _close(self) -> None:
        if self._site:
            # asyncio leaks a connection that is being accepted while its server closes: let those in first.
            asyncio.get_running_loop().remove_reader(self._listener)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await self._site.stop()
        self._site = None
        for connection in list(self._runner.server.connections if self._runner.server else ()):
            connection.force_close()
        self._activity.notify()


def bind_socket(where: tuple[str, int]) -> socket.socket:
    """A TCP socket bound to `where`, not yet listening: connections are refused. Raises StartError."""
    host, port = where
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        raise StartError(f"--listen: cannot listen on {host}:{port}: {e.strerror}; choose another port") from None
    return sock


async def serve(settings: EngineSettings, sock: socket.socket | None = None) -> None:
    """Run the engine until it is cancelled. The `crash` fault ends the process."""
    async with ScriptedEngine(settings, sock, on_exit=os._exit) as engine:
        print(f"scripted engine at {engine.url} (model {settings.served_model})", flush=True)
        await engine.wait()


async def _until_signalled(settings: EngineSettings) -> None:
    task = asyncio.create_task(serve(settings))
    for number_ in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number_, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


def main(settings: EngineSettings) -> int:
    """Run `sidecar engine`. Returns the exit code. Raises StartError if the port is taken."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_until_signalled(settings))
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop if it is installed: it supports CPython only."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop  # type: ignore[no-any-return]
