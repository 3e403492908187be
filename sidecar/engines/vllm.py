"""vLLM 0.32, and the scripted engine, which behaves like it.

- Series: vllm/v1/metrics/loggers.py. Counters appear as NAME_total, and `iteration_tokens_total` is a histogram. Each
  rank is an `engine`. kv_cache_size_tokens is the size of one rank. num_gpu_blocks is the sum of all ranks (observed),
  so it is too large; it is used for versions without the former.
- Priority: the lowest value goes first with --scheduling-policy priority. 0.32 accepts and ignores one under fcfs
  (observed); for versions that reject it the canary is sent again without.
- Sleep: the gauge is on every page. /is_sleeping and /is_paused exist only with VLLM_SERVER_DEV_MODE=1, both query the
  core, and both are true whether it sleeps or is paused (observed): only the gauge distinguishes the two.
- /version is open even if /v1/models requires an API key, and contains only a version.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sidecar.engines.canary_rows import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    POOLING,
    RERANK,
    SCORE,
    TRANSCRIPTION_BOUNDED,
)
from sidecar.engines.engine_type import EngineKind, KindMark, KindSign, KvCapacity, Series, plain

FIRST_PRIORITY: Final = -(1 << 30)

VLLM: Final = EngineKind(
    "vllm",
    plain(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_usage="vllm:kv_cache_usage_perc",
        prompt_tokens="vllm:prompt_tokens_total",
        generation_tokens="vllm:generation_tokens_total",
        finished="vllm:request_success_total",
        iterations="vllm:iteration_tokens_total_count",
        cached_tokens="vllm:prefix_cache_hits_total",
        cache_queries="vllm:prefix_cache_queries_total",
        started_wall="process_start_time_seconds",
    ),
    contact_path="/version",
    is_fcfs=True,
    has_plugin=True,
    awake=Series("vllm:engine_sleep_state", 'sleep_state="awake"'),
    capacity=KvCapacity("vllm:cache_config_info", (("kv_cache_size_tokens",), ("num_gpu_blocks", "block_size"))),
    rank="engine",
    signs=(
        KindSign("/is_paused", "is_paused", "engine_paused"),
        KindSign("/is_sleeping", "is_sleeping", "engine_sleeping"),
    ),
    canaries=(COMPLETIONS, CHAT, EMBEDDINGS, RERANK, CLASSIFY, SCORE, POOLING, TRANSCRIPTION_BOUNDED),
    identity_paths=("/version", "/metrics"),
    priority=FIRST_PRIORITY,
    owner="vllm",
    prefix="vllm:",
    marks=(KindMark("/version", {"version": None}),),
)

SCRIPTED: Final = replace(VLLM, name="scripted", owner="scripted", prefix="", marks=(), has_plugin=False)
