"""The metrics reader, held against pages as the engines write them and against garbage."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engines.metrics_parser import Garbage, parse
from sidecar.engines.registry import KINDS
from sidecar.readings import EngineSample, RankSample
from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.metrics import GARBAGE_PAGE, EngineMetrics

VLLM = KINDS["vllm"]

VLLM_PAGE = b"""\
# HELP python_info Python platform information.
# TYPE python_info gauge
python_info{implementation="CPython",major="3",minor="12",patchlevel="9",version="3.12.9"} 1.0
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.76373123456e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/model"} 3.0
vllm:num_requests_running{engine="1",model_name="org/model"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="org/model"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="org/model",reason="capacity"} 77.0
# TYPE vllm:engine_sleep_state gauge
vllm:engine_sleep_state{engine="0",model_name="org/model",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="org/model",sleep_state="weights_offloaded"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="org/model"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="org/model"} 0.75
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="org/model"} 1.2345678e+07
vllm:prompt_tokens_created{engine="0",model_name="org/model"} 1.76373123456e+09
vllm:prompt_tokens_by_source_total{engine="0",model_name="org/model",source="local_compute"} 5.0
vllm:generation_tokens_total{engine="0",model_name="org/model"} 99.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="org/model"} 5.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="org/model"} 6.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="org/model"} 900.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="org/model"} 1000.0
vllm:iteration_tokens_total_count{engine="0",model_name="org/model"} 1000.0
vllm:iteration_tokens_total_sum{engine="0",model_name="org/model"} 4000.0
"""


def test_ranks_are_summed() -> None:
    """Counters, running and waiting are summed over ranks, KV use is the largest, look-alike names are left alone."""
    ranks = (RankSample(0, 3, 2, 99), RankSample(1, 4))
    assert parse(VLLM_PAGE, VLLM) == EngineSample(7, 2, 0.75, 12345678, 99, 11, 1000, 1763731234.56, False, None, ranks)


@pytest.mark.parametrize(
    "line",
    [
        b"vllm:num_requests_running 4",
        b"vllm:num_requests_running\t4.0",
        b"vllm:num_requests_running{} 4\r",
        b'vllm:num_requests_running{model_name="a}b{c",engine="0"} 4.0 1763731234567',
        b'vllm:num_requests_running{model_name="say \\"hi\\", }\\\\"} 4e0',
        b'vllm:num_requests_running{engine="0"} 4 # {trace_id="}"} 9.0 1.5',
    ],
)
def test_the_forms_of_a_line(line: bytes) -> None:
    """Braces and escaped quotes in labels, timestamps, exemplars, tabs, CR and a missing last newline are accepted."""
    assert parse(line, VLLM).running == 4
    assert parse(b"# EOF\n" + line + b"\n", VLLM).running == 4


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"-1", b"1_0", b"0x1", b"", b"four", b"1 2 3", b"1e999", b"1.2.3"])
def test_a_value_that_cannot_be_believed(value: bytes) -> None:
    """A wanted line whose value is not a finite number >= 0 makes the whole page Garbage."""
    with pytest.raises(Garbage, match="num_requests_running"):
        parse(b'vllm:num_requests_running{engine="0"} ' + value + b"\n", VLLM)


@pytest.mark.parametrize(
    "page", [b"<html>busy</html>", b'{"error": 1}', GARBAGE_PAGE, b"vllm:num_requests_running{engine=\n"]
)
def test_a_page_that_is_no_metrics_page(page: bytes) -> None:
    """HTML, JSON and a truncated line are Garbage, and the reason contains nothing of the page."""
    with pytest.raises(Garbage) as e:
        parse(page, VLLM)
    assert len(str(e.value)) < 80 and "busy" not in str(e.value)


def test_a_page_without_our_series_is_absent() -> None:
    """A page without known series gives None everywhere, not zeros and no error."""
    assert parse(b"", VLLM) == EngineSample()
    assert parse(b"# HELP python_info x\npython_info 1\n", VLLM) == EngineSample()


def test_a_sleeping_engine_is_read_from_its_page() -> None:
    """vLLM's sleep-state gauge reports sleep without the development endpoints."""
    page = b'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 0.0\n'
    assert parse(page, VLLM).sleeping is True


@pytest.mark.parametrize(
    ("page", "tokens"),
    [
        (b'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0', 1600),
        (b'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="2000",num_gpu_blocks="100"} 1.0', 2000),
        (b'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="None",num_gpu_blocks="100"} 1.0', 1600),
        (b'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0', None),
        (b'vllm:cache_config_info{block_size="16",num_gpu_blocks="1e999"} 1.0', None),
        (b'vllm:cache_config_info{num_gpu_blocks_override="7"} 1.0', None),
    ],
)
def test_the_capacity_is_read_from_labels(page: bytes, tokens: float | None) -> None:
    """The KV cache size comes from vLLM's info gauge, that of one rank if present; what is no number is absent."""
    assert parse(page, VLLM).kv_capacity_tokens == tokens
    assert parse(b"sglang:max_total_num_tokens 4096\n", KINDS["sglang"]).kv_capacity_tokens == 4096


@pytest.mark.parametrize(
    ("kind", "page", "working"),
    [
        ("vllm", b"vllm:generation_tokens_total 5\nvllm:iteration_tokens_total_count 9\n", 5),
        ("sglang", b'sglang:realtime_tokens_total{mode="decode"} 7\nsglang:generation_tokens_total 5\n', 7),
        ("sglang", b"sglang:generation_tokens_total 5\nsglang:cuda_graph_passes_total 9\n", 9),
        ("sglang", b"sglang:generation_tokens_total 5\n", None),
        ("tgi", b"tgi_request_generated_tokens_sum 5\ntgi_batch_inference_count 9\n", 9),
        ("llamacpp", b"llamacpp:tokens_predicted_total 5\nllamacpp:n_decode_total 9\n", 9),
    ],
)
def test_what_moves_while_an_engine_generates(kind: str, page: bytes, working: float | None) -> None:
    """Its tokens, or its steps where tokens count only when a request ends; None where nothing moves until then."""
    assert parse(page, KINDS[kind]).working == working


def test_ranks_are_told_apart() -> None:
    """Each rank has its own running, waiting and generated tokens; a label that is no number is no rank."""
    page = b"".join(
        b'vllm:generation_tokens_total{engine="%s",model_name="a,engine=\\"9\\""} %d\n' % (rank, tokens)
        for rank, tokens in ((b"0", 5), (b"1", 7), (b"10", 1), (b"x", 2), (b"9" * 5000, 3))
    )
    sample = parse(page, VLLM)
    assert sample.generation_tokens == 18
    assert sample.ranks == tuple(RankSample(rank, generation_tokens=n) for rank, n in ((0, 5), (1, 7), (10, 1)))


@given(st.binary(max_size=300))
def test_any_bytes_give_a_sample_or_garbage(noise: bytes) -> None:
    """No input makes the reader raise anything but Garbage, alone or after wanted names."""
    for page in (
        noise,
        b"vllm:num_requests_running" + noise,
        b'vllm:kv_cache_usage_perc{a="' + noise,
        b'vllm:cache_config_info{block_size="' + noise + b'",num_gpu_blocks="3"} 1',
        VLLM_PAGE + noise,
    ):
        for kind in KINDS.values():
            with suppress(Garbage):
                assert isinstance(parse(page, kind), EngineSample)


@given(st.floats(0, 1e15), st.text(st.characters(blacklist_categories=["Cs"]), max_size=30))
def test_what_prometheus_client_writes_is_read_back(value: float, model: str) -> None:
    """Whatever the model's name, a page of the client library is read to the exact value."""
    meters = EngineMetrics(model, 1, 16_384)
    meters._kv_usage.labels(model, "0").set(value)
    for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
        assert parse(meters.page(Behaviour(), accept)[0], VLLM).kv_usage == value
