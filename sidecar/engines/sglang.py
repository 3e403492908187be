"""SGLang 0.5: srt/observability/metrics_collector.py, srt/entrypoints/http_server.py, srt/managers/scheduler.py.

- Series: with --enable-metrics only. Its prompt and generation totals move when a request ends; realtime_tokens moves
  while it runs. With priority scheduling the queue gauges are broken down by `priority`, the total is at "". Each rank
  is a `dp_rank`. Its multi-process registry has no process_start_time_seconds.
- Priority: the highest value goes first with --enable-priority-scheduling, the lowest with
  --schedule-low-priority-values-first; with neither, a priority can be rejected. /server_info reports the flags. It can
  take the place of a running request (--priority-scheduling-preemption-threshold), which is then computed again.
- /health makes the engine generate a token and sleeps a second: it is never requested.
- GPUs: tp_size, pp_size and dp_size of /server_info; with enable_dp_attention the ranks of dp share those of tp.
- Pause: it is not published. /ready is 503 while paused, but also after a failed health check of its own. So a pause
  call that passes the relay is the only sign. The same holds for memory released by /release_memory_occupation.
- With --disaggregation-mode a request without `bootstrap_room` is 400 (srt/managers/scheduler.py): its own health check
  and its warm-up name a host that stands for no transfer, and so does the canary (canary_request.py).
"""

from __future__ import annotations

import json
from typing import Final

from sidecar.engines.canary_rows import CHAT, CLASSIFY_V1, COMPLETIONS, EMBEDDINGS, RERANK, TRANSCRIPTION
from sidecar.engines.engine_type import EngineKind, KindMark, KvCapacity, Series, plain

FIRST_PRIORITY: Final = 1 << 30


def priority(server_info: bytes) -> int | None:
    """The priority that puts a canary first, from the JSON of /server_info; None if priorities are off or unknown."""
    try:
        flags = json.loads(server_info)
        if flags["enable_priority_scheduling"] is not True:
            return None
        return -FIRST_PRIORITY if flags.get("schedule_low_priority_values_first") is True else FIRST_PRIORITY
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


SGLANG: Final = EngineKind(
    "sglang",
    {
        **plain(
            kv_usage="sglang:token_usage",
            finished="sglang:num_requests_total",
            iterations="sglang:cuda_graph_passes_total",
            cached_tokens="sglang:cached_tokens_total",
            cache_queries="sglang:prompt_tokens_total",
        ),
        "running": (Series("sglang:num_running_reqs", parts="priority"),),
        "waiting": (Series("sglang:num_queue_reqs", parts="priority"),),
        "prompt_tokens": (
            Series("sglang:realtime_tokens_total", 'mode="prefill_compute"'),
            Series("sglang:prompt_tokens_total"),
        ),
        "generation_tokens": (
            Series("sglang:realtime_tokens_total", 'mode="decode"'),
            Series("sglang:generation_tokens_total", at_end=True),
        ),
    },
    has_plugin=True,
    capacity=KvCapacity("sglang:max_total_num_tokens"),
    rank="dp_rank",
    canaries=(COMPLETIONS, CHAT, EMBEDDINGS, RERANK, CLASSIFY_V1, TRANSCRIPTION),
    info_paths=("/server_info", "/get_server_info"),
    identity_paths=("/server_info",),
    read_priority=priority,
    owner="sglang",
    prefix="sglang:",
    marks=tuple(
        KindMark(path, {"model_path": None, "is_generation": None}) for path in ("/model_info", "/get_model_info")
    ),
)
