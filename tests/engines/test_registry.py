"""The table of engines: complete, and each engine is recognised by its responses."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engines import sglang
from sidecar.engines.engine_type import EngineKind
from sidecar.engines.registry import FURTHER_PATHS, KINDS, recognise
from sidecar.flags import ENGINE_KINDS
from sidecar.readings import EngineSample


def test_a_row_for_every_kind_of_the_setting() -> None:
    """--engine-kind and the table name the same kinds, and each row knows its own name and real sample fields."""
    assert {*KINDS, "auto"} == set(ENGINE_KINDS)
    assert all(kind.name == name for name, kind in KINDS.items())
    known = {field.name for field in fields(EngineSample)}
    assert all(set(kind.series) <= known for kind in KINDS.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_row_is_whole(kind: EngineKind) -> None:
    """Paths begin with a slash, a canary can be sent, and a rest has a reason code that the verdict knows."""
    paths = [kind.metrics_path, kind.contact_path, *kind.canary_paths, *kind.info_paths, *(s.path for s in kind.signs)]
    assert all(path.startswith("/") for path in paths) and kind.canary_paths
    assert {sign.means for sign in kind.signs} <= {"engine_sleeping", "engine_paused"}
    assert (kind.read_priority is None) == (not kind.info_paths)


def models(owner: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": "m", "owned_by": owner}]}).encode()


VLLM_LINE = b'vllm:num_requests_running{engine="0"} 1\n'


@pytest.mark.parametrize(
    ("pages", "kind"),
    [
        ({"/v1/models": models("vllm")}, "vllm"),
        ({"/v1/models": models("sglang")}, "sglang"),
        ({"/v1/models": models("llamacpp")}, "llamacpp"),
        ({"/v1/models": models("scripted"), "/metrics": VLLM_LINE}, "scripted"),
        ({"/v1/models": models("my-org"), "/metrics": VLLM_LINE}, "vllm"),
        ({"/metrics": b"vllm_num_requests_running 1\n"}, "vllm"),
        ({"/metrics": b"tgi_queue_size 1\n"}, "tgi"),
        ({"/v1/models": models("my-org"), "/metrics": b'# vllm:\nx{name="vllm:num_requests_running"} 1\n'}, "openai"),
        ({"/version": b'{"version": "0.32.0"}'}, "vllm"),
        ({"/version": b'{"version": "1", "major": "1"}', "/info": b'{"router": "text-generation-router"}'}, "tgi"),
        ({"/info": b'{"router": "another"}'}, "openai"),
        ({"/props": b'{"default_generation_settings": {}, "is_sleeping": false}'}, "llamacpp"),
        ({"/model_info": b'{"model_path": "m", "is_generation": true}', "/version": b'{"version": "1"}'}, "sglang"),
        ({"/get_model_info": b'{"model_path": "m", "is_generation": true}'}, "sglang"),
        ({"/v1/models": models("")}, "openai"),
        ({}, "openai"),
    ],
)
def test_recognise(pages: dict[str, bytes], kind: str) -> None:
    """The owner of the models decides, then the series of the page, then marks; a mention of an engine does not."""
    assert recognise(pages) == kind


@given(st.binary(max_size=100))
def test_recognise_takes_any_bytes(noise: bytes) -> None:
    """Any responses are recognised as a row of the table."""
    assert recognise(dict.fromkeys(("/v1/models", "/metrics", *FURTHER_PATHS), noise)) in KINDS


@pytest.mark.parametrize(
    "body", [b'{"data": 3}', b'{"data": [{"owned_by": []}]}', b"[[[", b'{"data": {"a": 1}}', b"[" * 5000, b"3"]
)
def test_recognise_takes_odd_json(body: bytes) -> None:
    """JSON of an unexpected shape is ignored."""
    assert recognise(dict.fromkeys(("/v1/models", *FURTHER_PATHS), body)) == "openai"


@pytest.mark.parametrize(
    ("flags", "priority"),
    [
        ({"enable_priority_scheduling": True}, sglang.FIRST_PRIORITY),
        ({"enable_priority_scheduling": True, "schedule_low_priority_values_first": False}, sglang.FIRST_PRIORITY),
        ({"enable_priority_scheduling": True, "schedule_low_priority_values_first": True}, -sglang.FIRST_PRIORITY),
        ({"enable_priority_scheduling": False}, None),
        ({}, None),
        ([1], None),
    ],
)
def test_sglang_says_which_way_its_priorities_go(flags: object, priority: int | None) -> None:
    """The canary's priority follows the server's flags; there is none if priorities are off or unknown."""
    assert sglang.priority(json.dumps(flags).encode()) == priority
    assert sglang.priority(b"no JSON") is None
