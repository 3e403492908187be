"""llama.cpp's server: tools/server/README.md and server.cpp, 2026.

- Series: with --metrics only (501 without). Its KV gauge was removed in 2025, and is read from older versions.
  prompt_tokens_total leaves out what was cached, prompt_tokens_cached_total (of late) counts that (seen).
  tokens_predicted_total moves when a request ends, n_decode_total with each batch that was computed (seen).
  The page can be rendered by the decoding loop: then it waits for a batch and hangs with it; /health does not.
- Sleep: with --sleep-idle-seconds the model is unloaded after that time, /props reports it, and any request wakes it.
  /health, /props and /models do not, nor does /metrics in newer versions. It did in older ones, so a sleeping server is
  not scraped. A canary is a request: each comes only after as long again as the server had been idle, so that it sleeps
  after three times its idle time at most. While it sleeps readiness passes, since only traffic wakes it.
- --api-key leaves /health open, older versions also /v1/models (seen). It has no priorities.
- Router mode (no model given): /v1/models lists all models with their `status`, and a POST loads the one that it names.
  GETs without a model load none (seen): /metrics is 400, /props the router's own.
- Cache: a request goes to the idle slot whose prompt begins as its own does (server-context.cpp, get_available_slot).
  With most models the smallest prompt shares its first token with every other one, so a canary would take the slot of a
  user even where another is empty, and cut its cached prompt to one token; `cache_prompt: false` cuts it as well.
  `id_slot` binds it to one slot. A request that is bound to a slot at work waits for it, so it is bound only while
  nothing runs. With one slot each canary costs the user's prompt (seen) unless --cache-ram holds it.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.canary_rows import CHAT, COMPLETIONS, EMBEDDINGS, RERANK, TRANSCRIPTION
from sidecar.engines.engine_type import EngineKind, KindMark, KindSign, Series, plain

LLAMACPP: Final = EngineKind(
    "llamacpp",
    {
        **plain(
            running="llamacpp:requests_processing",
            waiting="llamacpp:requests_deferred",
            kv_usage="llamacpp:kv_cache_usage_ratio",
            prompt_tokens="llamacpp:prompt_tokens_total",
            iterations="llamacpp:n_decode_total",
            cached_tokens="llamacpp:prompt_tokens_cached_total",
        ),
        "generation_tokens": (Series("llamacpp:tokens_predicted_total", at_end=True),),
    },
    contact_path="/health",
    is_fcfs=True,
    steps_compute=True,
    page_hangs=True,
    signs=(KindSign("/props", "is_sleeping", "engine_sleeping"),),
    wakes=True,
    canaries=(COMPLETIONS, CHAT, EMBEDDINGS, RERANK, TRANSCRIPTION),
    idle_fields={"id_slot": 0},
    slots_cache=True,
    identity_paths=("/props",),
    owner="llamacpp",
    prefix="llamacpp:",
    marks=(KindMark("/props", {"default_generation_settings": None}),),
)
