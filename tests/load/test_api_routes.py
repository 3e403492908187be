"""Which requests are work, and of which API."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import SHORT_ROUTES
from sidecar.load.api_routes import APIS, WORKING_METHODS, api_of, of_form, path_class

# As servers name them: vLLM 0.32, SGLang 0.5, TGI 3, llama.cpp b11549, TEI 1.8, Ollama 0.12.
SERVED = [
    ("/v1/chat/completions", "chat"),
    ("/openai/v1/chat/completions", "chat"),
    ("/v1/chat/completions/batch", "chat"),
    ("/v1/completions", "completions"),
    ("/completions", "completions"),
    ("/v1/responses", "responses"),
    ("/v1/messages", "messages"),
    ("/v1/embeddings", "embeddings"),
    ("/embedding", "embeddings"),
    ("/v2/embed", "embeddings"),
    ("/api/embed", "embeddings"),
    ("/api/embeddings", "embeddings"),
    ("/encode", "embeddings"),
    ("/inference/v1/generate", "generate"),
    ("/generate", "generate"),
    ("/generate_stream", "generate"),
    ("/vertex_generate", "generate"),
    ("/invocations", "generate"),
    ("/", "generate"),
    ("", "generate"),
    ("/completion", "llamacpp_completion"),
    ("/infill", "llamacpp_completion"),
    ("/api/chat", "ollama_chat"),
    ("/api/generate", "ollama_generate"),
    ("/v1/chat", "cohere_chat"),
    ("/cohere/v2/chat", "cohere_chat"),
    ("/v2/rerank", "rerank"),
    ("/reranking", "rerank"),
    ("/score", "score"),
    ("/generative_scoring", "score"),
    ("/pooling", "pooling"),
    ("/classify", "classify"),
    ("/v1/audio/transcriptions", "transcription"),
    ("/v1/audio/translations", "transcription"),
    ("/v1/audio/speech", "speech"),
    ("/v1/images/generations", "images"),
    ("/v1/systemone", "decisions"),
    ("/v1/decisions", "decisions"),
]
NO_WORK = [
    ("/tokenize", "tokenizer"),
    ("/v1/messages/count_tokens", "tokenizer"),
    ("/v1/chat/completions/render", "tokenizer"),
    ("/v1/responses/resp_1/cancel", "control"),
    ("/v1/files", "files"),
    ("/v1/nothing", "other"),
]


@pytest.mark.parametrize(("path", "route"), SERVED)
@pytest.mark.parametrize("method", [*WORKING_METHODS, "DELETE", "GET"])
def test_work_is_recognized_by_the_end_of_the_path(path: str, route: str, method: str) -> None:
    """Every path of an engine is its API, under any prefix, with any method and a body."""
    for prefix in ("", "/prefix") if len(path) > 1 else ("",):
        api = api_of(method, prefix + path, has_body=True)
        assert api is not None
        assert api.route == route
    assert api_of("GET", path, has_body=False) is None


@pytest.mark.parametrize(("path", "named"), NO_WORK)
def test_neighbours_of_work_are_classed(path: str, named: str) -> None:
    """What an API process does itself is no work, and has a label."""
    assert api_of("POST", path, has_body=True) is None
    assert path_class(path) == named


@given(st.sampled_from([path for path, _ in SERVED if len(path) > 1]), st.data())
def test_a_path_counts_as_the_engine_decodes_it(path: str, data: st.DataObject) -> None:
    """Each character as it is, as `%63` or, as cpp-httplib has it, as `%u0063`; with odd slashes, case and ends."""
    forms = [st.sampled_from([c, f"%{ord(c):02x}", f"%{ord(c):02X}", f"%u{ord(c):04x}", c.upper()]) for c in path]
    sent = "".join(data.draw(form) for form in forms).replace("/", data.draw(st.sampled_from(["/", "//"])))
    sent += data.draw(st.sampled_from(["", "/", "//", "#", "#/x", ";a=b", "%0A", "%0a"]))
    expected = api_of("POST", path, has_body=True)
    assert expected is not None
    assert api_of("POST", sent, has_body=True) == expected


def test_starlette_serves_a_path_with_a_line_feed() -> None:
    """Its routes are regular expressions that end in `$`, so that a decoded line feed does not make another path."""
    assert re.match("^/v1/completions$", "/v1/completions\n")
    assert api_of("POST", "/v1/completions" + quote("\n"), has_body=True) is not None


def test_the_events_know_what_generates() -> None:
    """The routes whose answers have no tokens are those of the events."""
    assert {api.route for api in APIS if not api.generates} == {*SHORT_ROUTES}


def test_a_body_selects_the_api_of_a_shared_path() -> None:
    """SageMaker's path accepts the bodies of all APIs."""
    api = api_of("POST", "/invocations", has_body=True)
    assert api is not None
    forms = [("messages", "chat"), ("prompt", "completions"), ("input", "embeddings"), ("query", "rerank")]
    for member, route in [*forms, ("text_1", "score"), ("inputs", "generate")]:
        assert of_form(api, {"model": 1, member: 1}).route == route
    other = api_of("POST", "/v1/chat/completions", has_body=True)
    assert other is not None
    assert of_form(other, {"prompt": 1}) is other
