"""The table of engines: complete, and each engine is recognised by its responses."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engines import sglang
from sidecar.engines.engine_type import EngineKind
from sidecar.engines.registry import FURTHER_PATHS, KINDS, identity, is_foreign, next_path, recognise
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
    paths = [kind.metrics_path, kind.contact_path, *kind.info_paths, *kind.identity_paths, *kind.model_paths]
    paths += [*(row.path for row in kind.canaries), *(sign.path for sign in kind.signs)]
    assert all(path.startswith("/") for path in paths) and kind.canaries
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


def asked(pages: dict[str, bytes], **status: int) -> list[str]:
    """The paths that are asked for of a server with these pages; other paths are 404."""
    met: dict[str, bytes] = {}
    said: dict[str, int] = {}
    while path := next_path(met, said):
        said[path] = 200 if path in pages else status.get(path.strip("/").replace("/", "_"), 404)
        met |= {path: pages[path]} if path in pages else {}
    return list(said)


@pytest.mark.parametrize(
    ("pages", "paths"),
    [
        ({"/v1/models": models("vllm"), "/metrics": VLLM_LINE}, ["/v1/models"]),
        ({"/v1/models": models("sglang")}, ["/v1/models"]),
        ({"/v1/models": models("llamacpp")}, ["/v1/models"]),
        ({"/v1/models": models("nvidia"), "/metrics": b"dynamo_requests 1\n"}, ["/v1/models", "/metrics"]),
        ({"/v1/models": models("m"), "/metrics": b"tgi_queue_size 1\n"}, ["/v1/models", "/metrics"]),
        ({"/v1/models": models("m")}, ["/v1/models", "/metrics", "/info"]),
        ({"/metrics": b"te_queue_size 0\n"}, ["/v1/models", "/metrics"]),
        ({}, ["/v1/models", "/metrics", *FURTHER_PATHS]),
    ],
    ids=["vllm", "sglang", "llama.cpp", "dynamo", "tgi", "tgi without metrics", "tei", "nothing"],
)
def test_no_more_is_asked_than_decides(pages: dict[str, bytes], paths: list[str]) -> None:
    """A recognised engine gets no further request, and one that names a foreign owner none for a page that it lacks."""
    assert asked(pages) == paths


def test_an_engine_that_loads_is_left_alone() -> None:
    """While the model list is 503 nothing else is asked."""
    assert asked({}, v1_models=503) == ["/v1/models"]


@pytest.mark.parametrize(
    ("body", "foreign"), [(models("nvidia"), True), (models("m"), False), (b'{"data": []}', False), (b"", False)]
)
def test_a_foreign_owner_decides(body: bytes, foreign: bool) -> None:
    """A list with an owner of no kind needs no second look; an empty one does."""
    assert is_foreign({"/v1/models": body} if body else {}) is foreign


def listed(**card: object) -> bytes:
    return json.dumps({"data": [{"id": "m", **card}, {"id": "other"}]}).encode()


@pytest.mark.parametrize(
    ("pages", "max_context", "slots"),
    [
        ({"/v1/models": listed(max_model_len=4096)}, 4096, 0),
        (
            {
                "/v1/models": listed(meta={"n_ctx_train": 131072}),
                "/props": b'{"default_generation_settings": {"n_ctx": 8192}, "total_slots": 1}',
            },
            8192,
            1,
        ),
        ({"/v1/models": listed(meta={"n_ctx_train": 131072})}, 131072, 0),
        ({"/info": b'{"max_total_tokens": 2048, "max_input_length": null}'}, 2048, 0),
        ({"/info": b'{"max_input_length": 512}'}, 512, 0),
        ({"/api/ps": b'{"models": [{"model": "a", "context_length": 4096}, {"context_length": 8192}, 3]}'}, 8192, 0),
        ({"/v1/models": listed(max_model_len="long"), "/props": b'{"total_slots": true}'}, 0, 0),
        ({"/v1/models": listed(status={"args": ["llama-server", "-np", "2"]})}, 0, 2),
        ({"/v1/models": listed(status={"args": ["--parallel", "1", "--port"]}), "/props": b"{}"}, 0, 1),
        ({"/v1/models": listed(status={"args": ["--parallel", "many"]})}, 0, 0),
        ({"/v1/models": listed(max_model_len=-1, meta=3), "/props": b'{"total_slots": 1e3}'}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_the_sizes_of_an_engine_are_read(pages: dict[str, bytes], max_context: int, slots: int) -> None:
    """The longest sequence and the slots are what the engine says, of any kind; what is no count is unknown."""
    found = identity(pages)
    assert (found.max_context, found.slots) == (max_context, slots)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ({"tp_size": 8, "pp_size": 1, "dp_size": 1}, 8),
        ({"tp_size": 4, "pp_size": 2, "dp_size": 2, "enable_dp_attention": False}, 16),
        ({"tp_size": 8, "pp_size": 1, "dp_size": 8, "enable_dp_attention": True}, 8),
        ({"tp_size": "8"}, 0),
        ({"tp_size": 10**6}, 0),
        ({}, 0),
    ],
)
def test_the_gpus_of_sglang_are_counted(said: dict[str, object], count: int) -> None:
    """Those of all its ranks; ranks of data-parallel attention share theirs."""
    assert identity({"/server_info": json.dumps(said).encode()}).gpu_count == count


@pytest.mark.parametrize(
    ("pages", "models_", "version"),
    [
        ({"/info": b'{"model_id": "a/b", "version": "1.9.3"}'}, ("a/b",), "1.9.3"),
        ({"/info": b'{"served_model_name": "s", "model_id": "a/b"}'}, ("s", "a/b"), ""),
        ({"/models": listed(), "/props": b'{"build_info": "b11549-abc"}'}, ("m", "other"), "b11549-abc"),
        ({"/v1/models": listed(), "/version": b'{"version": "0.33.0"}'}, ("m", "other"), "0.33.0"),
    ],
)
def test_models_and_version_are_read(pages: dict[str, bytes], models_: tuple[str, ...], version: str) -> None:
    """Each engine's own way of naming them."""
    assert (identity(pages).models, identity(pages).engine) == (models_, version)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["data", "id", "meta", "models", "owned_by"]), x),
    )
)
def test_any_json_is_an_identity(value: object) -> None:
    """Pages of any shape are read without an exception."""
    body = json.dumps(value).encode()
    pages = dict.fromkeys(
        ("/v1/models", "/models", "/info", "/props", "/version", "/server_info", "/api/ps", "/api/version"), body
    )
    identity(pages)
    next_path(pages, {"/v1/models": 200, "/metrics": 404})
