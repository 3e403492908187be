"""The metrics reader and the engine kinds, held against pages as the engines write them and against garbage."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engine.behaviour import Behaviour
from sidecar.engine.kinds import KINDS, canary, recognise
from sidecar.engine.pages import GARBAGE, Meters
from sidecar.engine.sample import Garbage, parse
from sidecar.facts import EngineSample, RankSample
from sidecar.settings import ENGINE_KINDS

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

PAGES = {
    "vllm": (
        VLLM_PAGE,
        EngineSample(
            7, 2, 0.75, 12345678, 99, 11, 1000, 1763731234.56, False, None, (RankSample(0, 3, 2, 99), RankSample(1, 4))
        ),
    ),
    "sglang": (
        b"""\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",priority="",tp_rank="0"} 5.0
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",priority="1",tp_rank="0"} 2.0
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",priority="9",tp_rank="0"} 3.0
sglang:num_running_reqs_offline_batch{model_name="m"} 50.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 1.0
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 0.28
sglang:prompt_tokens_total{model_name="m"} 100.0
sglang:generation_tokens_total{model_name="m"} 200.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m"} 150.0
sglang:realtime_tokens_total{mode="prefill_cache",model_name="m"} 9000.0
sglang:realtime_tokens_total{mode="decode",model_name="m"} 260.0
sglang:cuda_graph_passes_total{mode="decode_cuda_graph",model_name="m"} 30.0
sglang:cuda_graph_passes_total{mode="prefill_none",model_name="m"} 4.0
sglang:num_requests_total{model_name="m"} 8.0
""",
        EngineSample(5, 1, 0.28, 150, 260, 8, 34),
    ),
    "tgi": (
        b"""\
# TYPE tgi_request_success counter
tgi_request_success{method="generate"} 7
# TYPE tgi_batch_inference_count counter
tgi_batch_inference_count{method="decode"} 40
tgi_batch_inference_count{method="prefill"} 2
# TYPE tgi_queue_size gauge
tgi_queue_size 3
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 6
# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_bucket{le="+Inf"} 7
tgi_request_generated_tokens_sum 700
tgi_request_generated_tokens_count 7
tgi_request_input_length_sum 1400
""",
        EngineSample(6, 3, None, 1400, 700, 7, 42),
    ),
    "llamacpp": (
        b"""\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 512
llamacpp:tokens_predicted_total 64
llamacpp:n_decode_total 70
llamacpp:requests_processing 1
llamacpp:requests_deferred 2
""",
        EngineSample(1, 2, None, 512, 64, None, 70),
    ),
    "openai": (b"anything_at_all 1\n", EngineSample()),
}


@pytest.mark.parametrize("name", PAGES)
def test_each_kind_reads_its_own_page(name: str) -> None:
    """A page as that engine writes it gives its numbers: ranks summed, KV use the largest, look-alike names left alone."""
    page, sample = PAGES[name]
    assert parse(page, KINDS[name]) == sample


def test_a_row_for_every_kind_of_the_setting() -> None:
    """--engine-kind and the table name the same kinds, and each row knows its own name and real sample fields."""
    assert {*KINDS, "auto"} == set(ENGINE_KINDS)
    assert all(kind.name == name for name, kind in KINDS.items())
    fields = set(EngineSample.__dataclass_fields__)
    assert all(set(kind.series) <= fields for kind in KINDS.values())


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
    """Labels with braces and escaped quotes, timestamps, exemplars, tabs and CR read alike, also without a last newline."""
    assert parse(line, VLLM).running == 4
    assert parse(b"# EOF\n" + line + b"\n", VLLM).running == 4


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"-1", b"1_0", b"0x1", b"", b"four", b"1 2 3", b"1e999", b"1.2.3"])
def test_a_value_that_cannot_be_believed(value: bytes) -> None:
    """A wanted line whose value is not a finite number >= 0 makes the whole page Garbage."""
    with pytest.raises(Garbage, match="num_requests_running"):
        parse(b'vllm:num_requests_running{engine="0"} ' + value + b"\n", VLLM)


@pytest.mark.parametrize(
    "page", [b"<html>busy</html>", b'{"error": 1}', GARBAGE, b"vllm:num_requests_running{engine=\n"]
)
def test_a_page_that_is_no_metrics_page(page: bytes) -> None:
    """HTML, JSON and a torn line are Garbage, and the reason says nothing of the page's content."""
    with pytest.raises(Garbage) as e:
        parse(page, VLLM)
    assert len(str(e.value)) < 80 and "busy" not in str(e.value)


def test_a_page_without_our_series_is_absent() -> None:
    """An engine that does not publish (an empty page, other series only) gives None everywhere, not zeros and no error."""
    assert parse(b"", VLLM) == EngineSample()
    assert parse(b"# HELP python_info x\npython_info 1\n", VLLM) == EngineSample()


def test_a_sleeping_engine_is_read_from_its_page() -> None:
    """vLLM's sleep-state gauge tells sleep without the development endpoints."""
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
    """The KV cache's tokens come from vLLM's info gauge, the larger of its two forms; what is no number is absent."""
    assert parse(page, VLLM).kv_capacity_tokens == tokens
    assert parse(b"sglang:max_total_num_tokens 4096\n", KINDS["sglang"]).kv_capacity_tokens == 4096


def test_ranks_are_told_apart() -> None:
    """Each rank's running, waiting and generated tokens stand beside their sums; a label that is no number is no rank."""
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
    meters = Meters(model, 1, 16_384)
    meters._kv_usage.labels(model, "0").set(value)
    for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
        assert parse(meters.page(Behaviour(), accept)[0], VLLM).kv_usage == value


@pytest.mark.parametrize(
    ("owner", "page", "kind"),
    [
        ("vllm", b"", "vllm"),
        ("sglang", b"", "sglang"),
        ("llamacpp", b"", "llamacpp"),
        ("scripted", VLLM_PAGE, "scripted"),
        ("my-org", VLLM_PAGE, "vllm"),
        ("my-org", PAGES["sglang"][0], "sglang"),
        ("my-org", PAGES["tgi"][0], "tgi"),
        ("my-org", b"# vllm: mentioned\nx{name=\"vllm:num_requests_running\"} 1\n", "openai"),
        ("", b"", "openai"),
    ],
)  # fmt: skip
def test_recognise(owner: str, page: bytes, kind: str) -> None:
    """The owner of the models decides, then the series of the page; a mere mention of an engine does not."""
    models = json.dumps({"object": "list", "data": [{"id": "m", "owned_by": owner}]}).encode()
    assert recognise({"/v1/models": models, "/metrics": page}) == kind


@given(st.binary(max_size=100))
def test_recognise_takes_any_bytes(noise: bytes) -> None:
    """Whatever an engine answers, recognition gives a row of the table."""
    assert recognise({"/v1/models": noise, "/metrics": noise, "/version": noise}) in KINDS
    assert recognise({}) == "openai"


@pytest.mark.parametrize("body", [b'{"data": 3}', b'{"data": [{"owned_by": []}]}', b"[[[", b'{"data": {"a": 1}}'])
def test_recognise_takes_odd_json(body: bytes) -> None:
    """JSON of another shape than a model list says nothing."""
    assert recognise({"/v1/models": body}) == "openai"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_canary_asks_for_one_streamed_token(kind: object) -> None:
    """Every kind's canary is a stream of one token, with no priority, and JSON."""
    path, body = canary(kind, "m")  # type: ignore[arg-type]
    assert path.startswith("/v1/")
    assert (body["model"], body["max_tokens"], body["stream"]) == ("m", 1, True)
    assert "priority" not in json.loads(json.dumps(body))
