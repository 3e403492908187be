"""Faults of the scripted engine: a literal table, each row a set of changes to a healthy `Behaviour`.

The rows are the hang modes and false-alarm causes that verdicts are tested against (`hang_catalogue`). Several faults
may be active at once: their changes apply in the order in which they started.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.condition import EngineCondition


@dataclass(frozen=True, slots=True)
class FaultParameter:
    """The number that a fault takes: name, default, bounds, and the changes that a value makes."""

    name: str
    default: float
    low: float
    high: float
    make: Callable[[float], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One row: a one-line description, and its changes to Behaviour."""

    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    parameter: FaultParameter | None = None


def _stopped(**more: Any) -> dict[str, Any]:
    return {"stepping": False, **more}


def _restart_parameter(fault: str) -> FaultParameter:
    return FaultParameter("down", 1, 0, 3600, lambda v: {"restart": (v, fault)})


FAULTS: Final[Mapping[str, Fault]] = {
    "freeze": Fault("the core stops; HTTP answers, /health returns 200, the gauges read running 0 and waiting 0",
                    _stopped(gauges_zeroed=True)),
    "freeze_busy": Fault("the core stops inside a step; HTTP answers, the gauges keep their last values (running N at "
                         "0 tokens/s)", _stopped()),
    "gpu_fault": Fault("a GPU fault: as freeze_busy; the XID comes from the driver", _stopped()),
    "freeze_admission": Fault("no waiting request is admitted: running falls to 0, waiting grows",
                              {"admitting": False}),
    "oversized_head": Fault("a prompt larger than the KV cache blocks the queue until it is aborted",
                            {"oversized": True}),
    "kv_deadlock": Fault("KV use reads 100 % and no running sequence can advance",
                         {"prefilling": False, "decoding": False, "admitting": False, "kv_usage": 1.0}),
    "livelock": Fault("steps iterate, nothing is computed or delivered",
                      {"prefilling": False, "decoding": False, "empty_steps": True}),
    "one_rank": Fault("one data-parallel rank (`rank`) stops; partial only with --data-parallel over 1",
                      parameter=FaultParameter("rank", 0, 0, 63, lambda v: {"dead_rank": int(v)})),
    "rank_zero": Fault("as one_rank, and the gauges of that rank read 0",
                       parameter=FaultParameter("rank", 0, 0, 63,
                                                lambda v: {"dead_rank": int(v), "rank_zeroed": True})),
    "freeze_decode": Fault("prefill continues and yields first tokens, decoding stops",
                           {"decoding": False}),
    "transfer_stuck": Fault("prefills finish, their first token never arrives (prefill to decode transfer)",
                            {"first_token": False}),
    "stuck_near_limit": Fault("no sequence generates its last token, except those of up to `short` tokens in total",
                              parameter=FaultParameter("short", 0, 0, 1e9,
                                                       lambda v: {"last_token": False, "short": int(v)})),
    "start_hang": Fault("start-up never ends: /health and completions return 503", {"loading": True}),
    "core_dead": Fault("the core died, the API process remains: completions return 500, /health 503",
                       _stopped(error=500, health_status=503)),
    "api_block": Fault("the API's event loop is blocked: no HTTP response and no chunk, the core continues",
                       {"answering": False}),
    "hide": Fault("after the role chunk a stream delivers nothing until `tokens` tokens are generated (0: all), then "
                  "all at once; the generation counter rises",
                  parameter=FaultParameter("tokens", 0, 0, 1e9, lambda v: {"hidden": v or math.inf})),
    "withhold_tools": Fault("as hide, only for requests with `tools`", {"hides_tools": True}),
    "first_chunk_then_silence": Fault("each stream gets one piece, then silence; the core continues",
                                      {"max_pieces": 1}),
    "one_stream": Fault("one sequence never advances, all others do", {"stuck_one": True}),
    "wedge_on_abort": Fault("the next client abort freezes the core", {"on_abort": "freeze_busy"}),
    "hang_after_idle": Fault("the first request after `idle` seconds without work freezes the core",
                             parameter=FaultParameter("idle", 30, 0, 86_400,
                                                      lambda v: {"after_idle": (v, "freeze_busy")})),
    "zombies": Fault("sequences without a client fill the batch forever: users wait, the counter rises",
                     {"zombies": True}),
    "slow_grammar": Fault("a request with a grammar waits `duration` seconds, and later ones overtake it",
                          parameter=FaultParameter("duration", 5, 0, 3600, lambda v: {"grammar_seconds": v})),
    "slow": Fault("every step takes `factor` times as long: alive, must not be killed",
                  parameter=FaultParameter("factor", 20, 1, 1e6, lambda v: {"step_factor": v})),
    "gibberish": Fault("tokens advance, their text is garbage: report, do not kill", {"text": "!"}),
    "slow_health": Fault("/health answers after `delay` seconds",
                         parameter=FaultParameter("delay", 40, 0, 3600, lambda v: {"health_delay": v})),
    "long_prefill": Fault("every prefill takes `duration` seconds, regardless of size; decodes starve meanwhile",
                          parameter=FaultParameter("duration", 60, 0, 3600, lambda v: {"prefill_seconds": v})),
    "jit": Fault("the next step takes `duration` seconds longer, once, first or in service (kernels are compiled)",
                 parameter=FaultParameter("duration", 60, 0, 3600, lambda v: {"first_step_seconds": v})),
    "serial_http": Fault("one HTTP request at a time: health and metrics wait behind inference",
                         {"serial": True}),
    "sleep": Fault("the engine sleeps (POST /sleep, /wake_up): /is_sleeping is true, requests wait",
                   _stopped(sleeping=True)),
    "pause": Fault("the engine is paused (POST /pause, /resume): /is_paused is true, requests wait",
                   _stopped(paused=True)),
    "weight_update": Fault("weights are being replaced (POST /update_weights): the core waits for it",
                           _stopped()),
    "memory_released": Fault("the memory is released (POST /release_memory_occupation, /resume_memory_occupation): a "
                             "request ends the process", _stopped(memory_released=True)),
    "profile": Fault("a profiler stops the world (POST /start_profile, /stop_profile)", _stopped()),
    "error_500": Fault("all work fails with 500", {"error": 500}),
    "refuse_all": Fault("all work is refused at once with `status`, and /health returns 200",
                        parameter=FaultParameter("status", 503, 400, 599, lambda v: {"error": int(v)})),
    "worker_lost": Fault("the front lost its worker: all work gets `status`, no model is listed, /health returns 200",
                         parameter=FaultParameter("status", 404, 400, 599,
                                                  lambda v: {"error": int(v), "lists_models": False})),
    "refuse_canary": Fault("completions of one token, and all other routes, are refused (a P/D pair without its "
                           "bootstrap room); longer completions are served",
                           {"one_token": False, "serves": ("/v1/chat/completions", "/v1/completions")}),
    "rerank_only": Fault("only /v1/rerank is served, other work gets 404", {"serves": ("/v1/rerank",)}),
    "embeddings_only": Fault("only /v1/embeddings is served, other work gets 404", {"serves": ("/v1/embeddings",)}),
    "audio_only": Fault("only /v1/audio is served, other work gets 500", {"serves": ("/v1/audio/",),
                                                                         "unserved_status": 500}),
    "images_only": Fault("only /v1/images is served, other work gets 404", {"serves": ("/v1/images/",)}),
    "half_deaf": Fault("one of two API processes hangs: half of the new connections, by chance, get no answer",
                       {"deaf": True}),
    "no_pnm": Fault("an image in PNM is refused with 500, as vLLM's Rust front end refuses it", {"pnm": False}),
    "garbage_metrics": Fault("/metrics returns 200 with garbage", {"metrics": "garbage"}),
    "no_metrics": Fault("/metrics returns 404", {"metrics": "none"}),
    "slow_metrics": Fault("/metrics takes `delay` seconds",
                          parameter=FaultParameter("delay", 3, 0, 3600, lambda v: {"metrics_delay": v})),
    "several_backends": Fault("the metrics pages are those of `count` backends in turn",
                              parameter=FaultParameter("count", 3, 1, 64, lambda v: {"backends": int(v)})),
    "crash": Fault("the process exits with code 1 at once", {"exit_code": 1}),
    "refuse": Fault("the port closes and all connections break, the process lives; permanent without `seconds`",
                    {"port_open": False}),
    "restart": Fault("the port closes for `down` seconds, then a new process serves; ends all faults",
                     parameter=_restart_parameter("")),
    "restart_silent": Fault("as restart, and the new process accepts connections and answers nothing",
                            parameter=_restart_parameter("api_block")),
    "restart_loading": Fault("as restart, and the start-up of the new process never ends (503)",
                             parameter=_restart_parameter("start_hang")),
}  # fmt: skip


class FaultError(ValueError):
    """An unknown fault or parameter; the message lists what is valid."""


class Faults:
    """The active faults and the resulting behaviour. Lives on one event loop."""

    def __init__(self, baseline: Behaviour | None = None) -> None:
        self.behaviour = self._baseline = baseline or Behaviour()
        self._active: dict[str, Mapping[str, Any]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._changes = EngineCondition()

    @property
    def active(self) -> tuple[str, ...]:
        """Kinds in the order in which they started."""
        return tuple(self._active)

    def start(self, kind: str, seconds: float | None = None, **parameters: float) -> None:
        """Start a fault, for `seconds` or until it is cleared. Raises FaultError."""
        changes = changes_of(kind, parameters)
        if seconds is not None and not 0 < seconds <= 86_400:
            raise FaultError("seconds must be over 0 and at most 86400")
        self._remove(kind)
        self._active[kind] = changes
        if seconds is not None:
            self._timers[kind] = asyncio.get_running_loop().call_later(seconds, self.clear, kind)
        self._apply()

    def clear(self, kind: str | None = None) -> None:
        """Clear one fault, or all of them. Clearing an inactive fault is no error."""
        for each in (kind,) if kind else self.active:
            self._remove(each)
        self._apply()

    def rebase(self, baseline: Behaviour) -> None:
        """Replace the behaviour that the faults change (start-up has finished)."""
        self._baseline = baseline
        self._apply()

    async def until(self, ready: Callable[[Behaviour], bool]) -> None:
        """Wait until `ready(behaviour)` is true; return at once if it already is."""
        await self._changes.until(lambda: ready(self.behaviour))

    async def change(self) -> None:
        """Wait for the next change of behaviour."""
        await self._changes.next()

    def _remove(self, kind: str) -> None:
        self._active.pop(kind, None)
        timer = self._timers.pop(kind, None)
        if timer:
            timer.cancel()

    def _apply(self) -> None:
        behaviour = self._baseline
        for changes in self._active.values():
            behaviour = replace(behaviour, **changes)
        self.behaviour = behaviour
        self._changes.notify()


def changes_of(kind: str, parameters: Mapping[str, float]) -> Mapping[str, Any]:
    """The changes of a fault with these parameters. Raises FaultError."""
    fault = FAULTS.get(kind)
    if fault is None:
        raise FaultError(f"unknown fault {kind[:40]!r}; expected one of {', '.join(FAULTS)}")
    parameter = fault.parameter
    for name, value in parameters.items():
        if parameter is None or name != parameter.name:
            valid = f"seconds and {parameter.name}" if parameter else "seconds"
            raise FaultError(f"{kind} does not take {name[:40]!r}; it takes {valid}")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not parameter.low <= value <= parameter.high
        ):
            raise FaultError(f"{kind}: {name} must be a number from {parameter.low:g} to {parameter.high:g}")
    if parameter is None:
        return fault.changes
    return {**fault.changes, **parameter.make(parameters.get(parameter.name, parameter.default))}
