"""Pure: the expected reaction to each test case of the verdict: hangs that must be found, alarms that must not kill.

docs/health.md is generated from these tables. The tests play every row with the scripted engine and compare the
reaction with `owed`; `faults` are rows of its fault table, none if the cause is outside the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Owed = Literal["liveness", "readiness", "startup", "request", "report", "silence", "ready"]
OWED: Final[dict[Owed, str]] = {
    "liveness": "liveness fails: the engine is restarted",
    "readiness": "readiness fails first; liveness only after a longer window",
    "startup": "the start-up probe never passes, and says why",
    "request": "that one request is aborted with an error; no probe fails",
    "report": "a warning and a metric; no probe fails",
    "silence": "liveness never fails",
    "ready": "no probe fails, and every request is served",
}


@dataclass(frozen=True, slots=True)
class HangCase:
    """One row. `reasons`: the correct reason codes, empty if no probe may fail, or no liveness probe."""

    number: int
    text: str
    faults: tuple[str, ...]
    owed: Owed
    reasons: tuple[str, ...] = ()


MODES: Final = (
    HangCase(1, "The core is dead, the API answers 200.", ("freeze",), "liveness", ("no_progress",)),
    HangCase(2, "Running 0, waiting above 0, for minutes.", ("freeze_admission",), "liveness",
             ("admission_stalled", "no_progress")),
    HangCase(3, "The head of the queue is larger than the KV cache; it recovers when that request is aborted.",
             ("oversized_head",), "request", ("prompt_exceeds_kv_cache",)),
    HangCase(4, "KV connector and memory pressure deadlock.", ("kv_deadlock",), "liveness", ("no_progress",)),
    HangCase(5, "Livelock at 100 % CPU.", ("livelock",), "liveness", ("livelock",)),
    HangCase(6, "A grammar freezes it: running 2 at 0 tokens/s.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(7, "One data-parallel rank stops.", ("one_rank",), "readiness", ("rank_silent",)),
    HangCase(8, "NCCL hangs at 100 % GPU.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(9, "Prefill at full speed, decode 0.", ("freeze_decode",), "readiness", ("decode_stalled",)),
    HangCase(10, "A collective deadlock during graph capture.", ("start_hang",), "startup", ("startup_stuck",)),
    HangCase(11, "The core dies, the parent process stays.", ("core_dead",), "liveness",
             ("no_progress", "canary_lost", "refuses_work")),
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
    # where no canary passes
    HangCase(24, "It serves users, refuses every canary, and freezes.", ("refuse_canary", "freeze_busy"), "liveness",
             ("no_progress",)),
    HangCase(25, "A server that only ranks freezes.", ("rerank_only", "freeze"), "liveness", ("no_progress",)),
    HangCase(26, "A server that only makes images freezes.", ("images_only", "freeze"), "liveness", ("no_progress",)),
    # refusals
    HangCase(27, "The core freezes with a full queue: more requests, and canaries, get 503.", ("freeze_busy",),
             "liveness", ("no_progress", "admission_stalled")),
    HangCase(28, "The same where a full queue answers 429.", ("freeze_busy",), "liveness",
             ("no_progress", "admission_stalled")),
    HangCase(29, "After a fault it refuses everything at once, and nothing runs.", ("refuse_all",), "liveness",
             ("refuses_work",)),
    HangCase(30, "The front lost its worker: everything gets 404, no model is listed.", ("worker_lost",), "liveness",
             ("refuses_work",)),
    HangCase(31, "The front lost its worker, which answers 500, and no user asks.", ("worker_lost",), "liveness",
             ("refuses_work", "canary_lost")),
    # hangs that come again
    HangCase(32, "It hangs again after a restart that helped.", ("freeze", "restart"), "liveness", ("no_progress",)),
    HangCase(33, "It hangs for the third time, each time after it had served.", ("freeze_busy", "restart"), "liveness",
             ("no_progress",)),
    HangCase(34, "It hangs again in another way than before.", ("livelock", "freeze", "restart"), "liveness",
             ("no_progress",)),
    # full queues
    HangCase(35, "It freezes with a hundred long prompts in its queue.", ("freeze_busy",), "liveness",
             ("no_progress",)),
    HangCase(36, "Transcription, which is short, freezes.", ("freeze",), "liveness", ("no_progress",)),
    HangCase(37, "A server that only embeds freezes.", ("embeddings_only", "freeze_busy"), "liveness",
             ("no_progress",)),
    # restarts inside the container
    HangCase(38, "It was restarted inside its container, and the new process answers nothing.", ("restart_silent",),
             "liveness", ("startup_stuck",)),
    HangCase(39, "It was restarted inside its container, and loads forever.", ("restart_loading",), "liveness",
             ("startup_stuck",)),
    HangCase(40, "It was restarted inside its container, and never generates a token.", ("restart", "freeze"),
             "liveness", ("startup_stuck",)),
    # work that moves for no client
    HangCase(41, "Zombies hold all slots, users give up one after the other.", ("zombies",), "readiness",
             ("work_unserved",)),
    HangCase(42, "Requests that did not come through the sidecar hold all slots, its users give up.", (), "readiness",
             ("work_unserved",)),
    HangCase(43, "It is frozen, and every user gives up before a silence becomes long.", ("freeze_busy",), "liveness",
             ("no_progress", "canary_lost")),
    # parts and averages
    HangCase(44, "One of two API processes hangs: half of the new connections get no answer.", ("half_deaf",),
             "readiness", ("connection_silent",)),
    HangCase(45, "A data-parallel rank stops while its gauge says that nothing runs.", ("rank_zero",), "readiness",
             ("rank_silent",)),
    # metrics pages, and words
    HangCase(46, "It freezes, and its metrics page takes 3 s.", ("freeze_busy", "slow_metrics"), "liveness",
             ("no_progress",)),
    HangCase(47, "It freezes behind a port with the counters of several backends.",
             ("freeze_busy", "several_backends"), "liveness", ("no_progress",)),
    HangCase(48, "A frozen core with requests in its queue: everything stops, not just admission.", ("freeze_busy",),
             "liveness", ("no_progress",)),
    HangCase(49, "It freezes while it is idle.", ("freeze",), "liveness", ("no_progress", "canary_lost")),
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
    # silence on the wire
    HangCase(18, "Tool calls that the engine's parser withholds until they are whole.", ("withhold_tools",), "ready"),
    HangCase(19, "Reasoning that is hidden from the client, next to streams that move.", ("hide",), "ready"),
    HangCase(20, "A withheld tool call of an engine without counters, as long as the client allowed.",
             ("withhold_tools", "no_metrics"), "ready"),
    # orders other than that of arrival
    HangCase(21, "Priorities: interactive requests overtake batch work.", (), "ready"),
    HangCase(22, "A request for an adapter waits until the batch has a place for it.", (), "ready"),
    HangCase(23, "A grammar is compiled while later requests are served.", ("slow_grammar",), "ready"),
    # figures of our own
    HangCase(24, "Forty whole answers, then a long one on an engine with one slot.", (), "ready"),
    HangCase(25, "Streams whose tokens come all at once, then a long one.", ("hide",), "ready"),
    HangCase(26, "Many short embeddings, then a long one.", (), "ready"),
    # limits that no client set
    HangCase(27, "Whole answers without a limit are far longer than any before.", (), "ready"),
    HangCase(28, "A stream without a limit that is hidden for far longer than any before.", ("hide",), "ready"),
    HangCase(29, "A whole answer without a limit on an engine without counters.", ("no_metrics",), "ready"),
    # unknown work
    HangCase(30, "Images are generated, and nothing else is answered meanwhile.", ("serial_http",), "ready"),
    HangCase(31, "A stream in Ollama's form, and nothing else is answered meanwhile.", ("serial_http",), "ready"),
    HangCase(32, "Speech comes as raw audio, and nothing else is answered meanwhile.", ("serial_http",), "ready"),
    # kernels that are compiled in service
    HangCase(33, "The whole engine stands still in service while a kernel is compiled.", ("jit",), "silence"),
    HangCase(34, "It does so again and again.", ("jit",), "silence"),
    HangCase(35, "The first request after an idle time compiles.", ("jit",), "silence"),
    # unknown speed
    HangCase(36, "The first long prompt of an engine far slower than its coefficients say.", (), "ready"),
    HangCase(37, "The first long embedding of such an engine.", (), "ready"),
    HangCase(38, "The first long prompt of such an engine after its restart.", ("restart",), "silence"),
    # canaries that cannot pass
    HangCase(39, "An audio server answers 500 to completions.", ("audio_only",), "ready"),
    HangCase(40, "A server that only ranks answers 404 to completions.", ("rerank_only",), "ready"),
    HangCase(41, "An engine refuses every canary and serves every user.", ("refuse_canary",), "ready"),
    # canaries that do harm
    HangCase(42, "The engine's memory is released for longer than the cap: a request would end it.",
             ("memory_released",), "silence"),
    HangCase(43, "Models are loaded on demand: no canary evicts the users'.", (), "ready"),
    HangCase(44, "Models are loaded on demand, and none is used: no canary loads one.", (), "silence"),
    # work that did not come through the sidecar
    HangCase(45, "A long prompt that did not come through the sidecar keeps the engine silent.", (), "silence"),
    HangCase(46, "The same, and the sidecar's judge is restarted meanwhile.", (), "silence"),
    HangCase(47, "Streams that did not come through the sidecar fill the batch, its users wait.", (), "ready"),
    # metrics pages as they are
    HangCase(48, "The metrics page takes 3 s.", ("slow_metrics",), "ready"),
    HangCase(49, "The metrics pages of several backends come in turn.", ("several_backends",), "ready"),
    HangCase(50, "The metrics page is never answered.", ("slow_metrics",), "ready"),
)  # fmt: skip


def numbers_of(fault: str, cases: Iterable[HangCase]) -> tuple[int, ...]:
    """The numbers of the cases that a fault plays."""
    return tuple(case.number for case in cases if fault in case.faults)
