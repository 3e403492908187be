"""What differs between engines, as one literal table: series names, the canary, where sleep can be read.

A row names only what the engine publishes; what it does not publish stays absent (None in EngineSample), never 0. An engine
that cannot be told apart is `openai`: nothing is read from its metrics, and its canary is what any OpenAI-compatible server
takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Series:
    """Sample lines of a metrics page: those of `name`, with the label pair `label` where one is given.

    Instead, `parts` may name a label whose non-empty values break a total down: such lines are left out, the total stays.
    """

    name: str
    label: str = ""
    parts: str = ""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Where the tokens of the KV cache stand: the value of `name`, or the product of labels, the largest of `products`.

    The largest, because a request is ended that exceeds it: one that might fit must not be.
    """

    name: str
    products: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine. `series` maps a field of EngineSample to what it is read from: the first that the page has.

    The engine sleeps while `awake` is 0. `sleep_paths` are (path, key): JSON objects whose key is true while it sleeps or is
    paused; any of them may be missing (404) on a given engine.
    """

    name: str
    series: Mapping[str, tuple[Series, ...]] = field(default_factory=dict)
    metrics_path: str = "/metrics"
    awake: Series | None = None
    capacity: Capacity | None = None
    rank: str = ""  # the label that numbers data-parallel ranks
    sleep_paths: tuple[tuple[str, str], ...] = ()
    canary_path: str = "/v1/completions"
    honours_uuid: bool = False  # an image part's `uuid` is its cache key
    owner: str = ""  # `owned_by` in /v1/models
    prefix: str = ""  # of its series' names; the first row whose prefix is on the page wins


def _plain(**names: str) -> dict[str, tuple[Series, ...]]:
    return {field_: (Series(name),) for field_, name in names.items()}


# vLLM 0.32: vllm/v1/metrics/loggers.py. Counters appear as NAME_total, and `iteration_tokens_total` is a histogram.
_VLLM_SERIES: Final = _plain(
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    kv_usage="vllm:kv_cache_usage_perc",
    prompt_tokens="vllm:prompt_tokens_total",
    generation_tokens="vllm:generation_tokens_total",
    finished="vllm:request_success_total",
    iterations="vllm:iteration_tokens_total_count",
    started_wall="process_start_time_seconds",
)
_VLLM_AWAKE: Final = Series("vllm:engine_sleep_state", 'sleep_state="awake"')
# kv_cache_size_tokens counts groups of layers, as the scheduler does; the product stands in where a version lacks it.
_VLLM_CAPACITY: Final = Capacity(
    "vllm:cache_config_info", (("kv_cache_size_tokens",), ("num_gpu_blocks", "block_size"))
)

KINDS: Final[dict[str, EngineKind]] = {
    "scripted": EngineKind(
        "scripted",
        _VLLM_SERIES,
        awake=_VLLM_AWAKE,
        capacity=_VLLM_CAPACITY,
        rank="engine",
        sleep_paths=(("/is_sleeping", "is_sleeping"),),
        honours_uuid=True,
        owner="scripted",
    ),
    # /is_sleeping and /is_paused exist only with VLLM_SERVER_DEV_MODE=1; the sleep-state gauge exists always.
    "vllm": EngineKind(
        "vllm",
        _VLLM_SERIES,
        awake=_VLLM_AWAKE,
        capacity=_VLLM_CAPACITY,
        rank="engine",
        sleep_paths=(("/is_sleeping", "is_sleeping"), ("/is_paused", "is_paused")),
        honours_uuid=True,
        owner="vllm",
        prefix="vllm:",
    ),
    # SGLang (srt/observability/metrics_collector.py) publishes with --enable-metrics only. Its prompt and generation totals
    # move when a request ends; realtime_tokens moves while it runs. With priority scheduling its queue gauges are broken down.
    "sglang": EngineKind(
        "sglang",
        {
            **_plain(
                kv_usage="sglang:token_usage",
                finished="sglang:num_requests_total",
                iterations="sglang:cuda_graph_passes_total",
                started_wall="process_start_time_seconds",
            ),
            "running": (Series("sglang:num_running_reqs", parts="priority"),),
            "waiting": (Series("sglang:num_queue_reqs", parts="priority"),),
            "prompt_tokens": (
                Series("sglang:realtime_tokens_total", 'mode="prefill_compute"'),
                Series("sglang:prompt_tokens_total"),
            ),
            "generation_tokens": (
                Series("sglang:realtime_tokens_total", 'mode="decode"'),
                Series("sglang:generation_tokens_total"),
            ),
        },
        capacity=Capacity("sglang:max_total_num_tokens"),
        rank="dp_rank",
        owner="sglang",
        prefix="sglang:",
    ),
    # TGI's token counts are sums of per-request histograms: they move when a request ends. Only
    # tgi_batch_inference_count moves with each forward pass. It has no KV gauge.
    "tgi": EngineKind(
        "tgi",
        _plain(
            running="tgi_batch_current_size",
            waiting="tgi_queue_size",
            prompt_tokens="tgi_request_input_length_sum",
            generation_tokens="tgi_request_generated_tokens_sum",
            finished="tgi_request_success",
            iterations="tgi_batch_inference_count",
        ),
        prefix="tgi_",
    ),
    # llama.cpp publishes with --metrics only; its KV gauge was removed in 2025. It sleeps on idle: a request wakes it.
    "llamacpp": EngineKind(
        "llamacpp",
        _plain(
            running="llamacpp:requests_processing",
            waiting="llamacpp:requests_deferred",
            kv_usage="llamacpp:kv_cache_usage_ratio",
            prompt_tokens="llamacpp:prompt_tokens_total",
            generation_tokens="llamacpp:tokens_predicted_total",
            iterations="llamacpp:n_decode_total",
        ),
        sleep_paths=(("/props", "is_sleeping"),),
        owner="llamacpp",
        prefix="llamacpp:",
    ),
    "openai": EngineKind("openai", canary_path="/v1/chat/completions"),
}


def canary(kind: EngineKind, model: str) -> tuple[str, dict[str, Any]]:
    """Path and JSON body of the request for one token: the smallest prompt there is, as a stream.

    Completions need no chat template, so base models and vision models take them alike; an unknown engine is only sure to
    have chat. No priority is set: under vLLM's default scheduling policy one is an error.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0, "stream": True}
    if kind.canary_path == "/v1/completions":
        return kind.canary_path, {**body, "prompt": "1"}
    return kind.canary_path, {**body, "messages": [{"role": "user", "content": "1"}]}


def recognise(pages: Mapping[str, bytes]) -> str:
    """Which row of KINDS an engine is, from what it answered with 200: path ("/v1/models", "/metrics", "/version") -> body.

    The owner of its models decides, then the series on its metrics page; "openai" where neither says anything.
    """
    owners = _owners(pages.get("/v1/models", b""))
    for name, kind in KINDS.items():
        if kind.owner in owners:
            return name
    page = pages.get("/metrics", b"")
    for name, kind in KINDS.items():
        if kind.prefix and _has_series(page, kind.prefix.encode()):
            return name
    return "openai"


def _owners(body: bytes) -> set[str]:
    """All `owned_by` of a model list; empty where the body is no such list."""
    try:
        cards = json.loads(body)["data"]
        return {card["owned_by"] for card in cards} - {""}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def _has_series(page: bytes, prefix: bytes) -> bool:
    """Whether a line of the page begins with the prefix (its colon may be `_`); a mention inside a line does not count."""
    return any(page.startswith(p) or b"\n" + p in page for p in (prefix, prefix.replace(b":", b"_")))
