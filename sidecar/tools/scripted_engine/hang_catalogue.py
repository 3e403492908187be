"""Pure: the expected reaction to each test case of the verdict: hangs that must be found, alarms that must not kill.

docs/health.md is generated from these tables. The tests play every row with the scripted engine and compare the
reaction with `owed`; `faults` are rows of its fault table, none if the cause is outside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Owed = Literal["liveness", "readiness", "startup", "request", "report", "silence"]
OWED: Final[dict[Owed, str]] = {
    "liveness": "liveness fails: the engine is restarted",
    "readiness": "readiness fails first; liveness only after a longer window",
    "startup": "the start-up probe never passes, and says why",
    "request": "that one request is aborted with an error; no probe fails",
    "report": "a warning and a metric; no probe fails",
    "silence": "liveness never fails",
}


@dataclass(frozen=True, slots=True)
class HangCase:
    """One row. `reasons`: the correct reason codes, empty if silence is owed."""

    number: int
    text: str
    faults: tuple[str, ...]
    owed: Owed
    reasons: tuple[str, ...] = ()


MODES: Final = (
    HangCase(1, "The core is dead, the API answers 200.", ("freeze",), "liveness", ("no_progress",)),
    HangCase(2, "Running 0, waiting above 0, for minutes.", ("freeze_admission",), "liveness", ("admission_stalled",)),
    HangCase(3, "The head of the queue is larger than the KV cache; it recovers when that request is aborted.",
             ("oversized_head",), "request", ("prompt_exceeds_kv_cache",)),
    HangCase(4, "KV connector and memory pressure deadlock.", ("kv_deadlock",), "liveness", ("no_progress",)),
    HangCase(5, "Livelock at 100 % CPU.", ("livelock",), "liveness", ("livelock",)),
    HangCase(6, "A grammar freezes it: running 2 at 0 tokens/s.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(7, "One data-parallel rank stops.", ("one_rank",), "readiness", ("rank_silent",)),
    HangCase(8, "NCCL hangs at 100 % GPU.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(9, "Prefill at full speed, decode 0.", ("freeze_decode",), "readiness", ("decode_stalled",)),
    HangCase(10, "A collective deadlock during graph capture.", ("start_hang",), "startup", ("startup_stuck",)),
    HangCase(11, "The core dies, the parent process stays.", ("core_dead",), "liveness", ("no_progress",)),
    HangCase(12, "The API's loop is blocked for minutes, the engine is fine.", ("api_block",), "liveness",
             ("api_blocked",)),
    HangCase(13, "One chunk, then silence.", ("first_chunk_then_silence",), "readiness", ("decode_stalled",)),
    HangCase(14, "One single stream never ends.", ("one_stream",), "request", ("stream_stuck",)),
    HangCase(15, "The transfer from prefill to decode is stuck.", ("transfer_stuck",), "liveness", ("no_progress",)),
    HangCase(16, "A client's abort wedges the engine.", ("wedge_on_abort",), "liveness", ("no_progress",)),
    HangCase(17, "The first request after a long idle time hangs.", ("hang_after_idle",), "liveness", ("no_progress",)),
    HangCase(18, "A GPU fault, and the process lives on.", ("gpu_fault",), "liveness", ("gpu_fault",)),
    HangCase(19, "Start-up never ends.", ("start_hang",), "startup", ("startup_stuck",)),
    HangCase(20, "The loop iterates, nothing is delivered.", ("livelock",), "liveness", ("livelock",)),
    HangCase(21, "Very slow, yet alive: must not be killed before the cap.", ("slow",), "silence"),
    HangCase(22, "Speculative decoding stops near the maximum length.", ("stuck_near_limit",), "request",
             ("stream_stuck",)),
    HangCase(23, "Tokens advance, all garbage: to be reported, not killed.", ("gibberish",), "report",
             ("garbage_output",)),
)  # fmt: skip

ALARMS: Final = (
    HangCase(1, "`/health` takes 40 s under load.", ("slow_health",), "silence"),
    HangCase(2, "Image work blocks the API's loop.", ("api_block",), "silence"),
    HangCase(3, "1,280 requests at once.", (), "silence"),
    HangCase(4, "A probe limit of 1 s on a full engine.", ("slow_health",), "silence"),
    HangCase(5, "A canary that queues behind users.", (), "silence"),
    HangCase(6, "A limit of 2 s at the largest batch.", (), "silence"),
    HangCase(7, "A prefill of 600,000 tokens starves decodes for 82 s.", ("long_prefill",), "silence"),
    HangCase(8, "Cold kernels compile for 10-20 minutes.", ("jit",), "silence"),
    HangCase(9, "A one-token check takes over 20 s under load.", ("long_prefill",), "silence"),
    HangCase(10, "A profiler stops the world.", ("profile",), "silence"),
    HangCase(11, "A canary before the engine is ready.", (), "silence"),
    HangCase(12, "The node's CPUs are starved; a restarted watchdog forgot what it knew.", (), "silence"),
    HangCase(13, "Load becomes a storm of restarts.", (), "silence"),
    HangCase(14, "HTTP waits behind inference for 27 s while TCP connects at once.", ("serial_http",), "silence"),
    HangCase(15, "The tokenizer holds the GIL for 60 s.", ("api_block",), "silence"),
    HangCase(16, "Pause, sleep, weight update.", ("sleep", "pause", "weight_update"), "silence"),
    HangCase(17, "The sidecar itself was stopped, starved, restarted, or its clock jumped.", (), "silence"),
)  # fmt: skip
