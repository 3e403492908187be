"""The scripted engine's `/metrics`: the names, labels and buckets of vLLM 0.32, in a registry of its own.

Counters advance only with a step that produced output, gauges only when the core publishes: a frozen core's page looks
like a real one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.exposition import choose_encoder

from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.scheduler import BLOCK_TOKENS, Scheduler, StepOutput


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


Series = TypeVar("Series", Gauge, Counter, Histogram)
LABELS = ("model_name", "engine")
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FIRST_TOKEN_BUCKETS = _floats(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
INTER_TOKEN_BUCKETS = _floats("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
REQUEST_BUCKETS = _floats("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
GARBAGE_PAGE = (
    b'vllm:num_requests_running{engine="0",model_name="\xff\xfe" NaN\x00\n<html>\nvllm:kv_cache_usage_perc NaN\n'
)


class BackendPage:
    """The page of backend `number` of `count` behind one port: its counters are a share of the registry's.

    It was started before the first one, by as many hours as its number.
    """

    def __init__(self, registry: CollectorRegistry, number: int, count: int) -> None:
        self._registry, self._number, self._share = registry, number, number / count

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if family.type in ("counter", "histogram"):
                family.samples = [s._replace(value=float(int(s.value * self._share))) for s in family.samples]
            elif family.name == "process_start_time_seconds":
                family.samples = [s._replace(value=s.value - 3600 * self._number) for s in family.samples]
            yield family


class EngineMetrics:
    """All series of one engine of `ranks` data-parallel ranks, each with a KV cache of `kv_tokens`."""

    def __init__(self, model: str, ranks: int, kv_tokens: int) -> None:
        self._labels = [(model, str(rank)) for rank in range(ranks)]
        self._kv_tokens = kv_tokens
        self.scrapes = 0  # metrics pages served
        self.restart()

    def restart(self) -> None:
        """Become the page of a new process: its counters are 0."""
        self.registry = CollectorRegistry()
        self._running = self._gauge("vllm:num_requests_running", "Number of requests in model execution batches.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._sleep = Gauge(
            "vllm:engine_sleep_state",
            "Engine sleep state; awake = 0 means engine is sleeping.",
            (*LABELS, "sleep_state"),
            registry=self.registry,
        )
        self._cache_config(self._kv_tokens // BLOCK_TOKENS)
        self._queries = self._counter("vllm:prefix_cache_queries", "Prefix cache queries, in number of queried tokens.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prefix cache hits, in number of cached tokens.")
        self._preemptions = self._counter("vllm:num_preemptions", "Cumulative number of preemption from the engine.")
        self._prompt = self._counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
        self._generation = self._counter("vllm:generation_tokens", "Number of generation tokens processed.")
        self._success = Counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._iterations = self._histogram(
            "vllm:iteration_tokens_total", "Histogram of number of tokens per engine_step.", ITERATION_BUCKETS
        )
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "Histogram of time to first token in seconds.", FIRST_TOKEN_BUCKETS
        )
        self._inter = self._histogram(
            "vllm:inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", INTER_TOKEN_BUCKETS
        )
        self._request = self._histogram(
            "vllm:e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", REQUEST_BUCKETS
        )
        self._published_preemptions = [0] * len(self._labels)
        start = Gauge(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            registry=self.registry,
        )
        start.set(time.time())
        for labels in self._labels:
            for reason in FINISH_REASONS:
                self._success.labels(*labels, reason)

    def step(self, rank: int, outputs: Rows[StepOutput]) -> None:
        """Count one step of the core that produced these outputs."""
        computed = sum(o.prompt - o.sequence.cached if o.prompt else o.tokens for o in outputs)
        self._iterations.labels(*self._labels[rank]).observe(computed)

    def output(self, rank: int, output: StepOutput, age: float, gap: float, before: int) -> None:
        """Count one sequence's output: `age` since arrival, `gap` since its last token, `before` earlier tokens."""
        labels = self._labels[rank]
        self._generation.labels(*labels).inc(output.tokens)
        if output.prompt:
            self._prompt.labels(*labels).inc(output.prompt)
            self._queries.labels(*labels).inc(output.prompt)
            self._hits.labels(*labels).inc(output.sequence.cached)
        if before:
            self._inter.labels(*labels).observe(gap)
        else:
            self._first.labels(*labels).observe(age)
        if output.done:
            self._success.labels(*labels, output.sequence.finish).inc()
            self._request.labels(*labels).observe(age)

    def generated(self, rank: int, tokens: int) -> None:
        """Count tokens of sequences that have no client."""
        self._generation.labels(*self._labels[rank]).inc(tokens)

    def gauges(self, rank: int, scheduler: Scheduler) -> None:
        """Publish the core's state."""
        labels = self._labels[rank]
        self._running.labels(*labels).set(len(scheduler.running))
        self._waiting.labels(*labels).set(len(scheduler.waiting))
        self._kv_usage.labels(*labels).set(scheduler.kv_usage())
        self._preemptions.labels(*labels).inc(scheduler.preemptions - self._published_preemptions[rank])
        self._published_preemptions[rank] = scheduler.preemptions

    def page(self, behaviour: Behaviour, accept: str) -> tuple[bytes, str]:
        """The page and its content type, as the scraper's Accept header asks."""
        self.scrapes += 1
        self._distort(behaviour)
        encode, content_type = choose_encoder(accept)
        backend = self.scrapes % behaviour.backends
        page: Any = BackendPage(self.registry, backend, behaviour.backends) if backend else self.registry
        return encode(page), content_type

    def _distort(self, behaviour: Behaviour) -> None:
        for labels in self._labels:
            for state in SLEEP_STATES:
                self._sleep.labels(*labels, state).set(
                    (state == "awake") != behaviour.sleeping and state != "discard_all"
                )
            if behaviour.gauges_zeroed or (behaviour.rank_zeroed and labels[1] == str(behaviour.dead_rank)):
                self._running.labels(*labels).set(0)
                self._waiting.labels(*labels).set(0)
            if behaviour.kv_usage is not None:
                self._kv_usage.labels(*labels).set(behaviour.kv_usage)

    def _cache_config(self, blocks: int) -> None:
        """vLLM's series of the cache configuration, with those of its labels that give the cache's size."""
        sizes = {
            "num_gpu_blocks": str(blocks),
            "block_size": str(BLOCK_TOKENS),
            "kv_cache_size_tokens": str(blocks * BLOCK_TOKENS),
        }
        config = Gauge(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            ("engine", *sizes),
            registry=self.registry,
        )
        for _, rank in self._labels:
            config.labels(rank, *sizes.values()).set(1)

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._show(Gauge(name, text, LABELS, registry=self.registry))

    def _counter(self, name: str, text: str) -> Counter:
        return self._show(Counter(name, text, LABELS, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._show(Histogram(name, text, LABELS, buckets=buckets, registry=self.registry))

    def _show(self, series: Series) -> Series:
        """Make the series exist from the start, as vLLM does."""
        for labels in self._labels:
            series.labels(*labels)
        return series
