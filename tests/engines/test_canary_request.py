"""The canary as data: the forms that are tried, their bodies, and the parsed responses."""

from __future__ import annotations

import io
import json
import wave
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engines import canary_rows
from sidecar.engines.canary_request import MAX_FAILURES, CanaryAnswer, CanaryForm, CanaryForms, body, read
from sidecar.engines.canary_rows import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, RERANK, CanaryRow
from sidecar.engines.registry import KINDS
from sidecar.load.api_routes import APIS, REALTIME

ROWS = [row for row in vars(canary_rows).values() if isinstance(row, CanaryRow)]
MAX_POSTS = 12


def tried_of(forms: CanaryForms, route: str = "") -> list[CanaryForm]:
    """All forms that are left, in the order in which an engine that refuses each of them gets them."""
    asked: list[CanaryForm] = []
    while form := forms.next_form("m", route, asked):
        asked.append(form)
    return asked


def tried(kind: str, priority: int | None = None, route: str = "") -> list[CanaryForm]:
    """All forms of a kind, in their order."""
    return tried_of(CanaryForms(KINDS[kind], priority), route)


@pytest.mark.parametrize("kind", KINDS)
def test_a_canary_asks_for_the_least_work(kind: str) -> None:
    """Every form of every kind is JSON or a form; those that generate ask for one greedy token, as a stream."""
    for form in tried(kind, 7):
        asked = json.loads(json.dumps(body(KINDS[kind], form, "m")))
        assert asked.get("model") == ("m" if form.row.names_model else None)
        assert ("priority" in asked) == (form.priority is not None)
        if form.row.works is None:
            assert (asked["max_tokens"], asked["stream"], asked["temperature"]) == (1, True, 0)
        if form.row.is_upload:
            assert all(isinstance(value, str) for value in asked.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_posts_at_a_start_are_few(kind: str) -> None:
    """An engine that refuses everything gets a bounded number of requests, none of them twice."""
    forms = tried(kind, 7)
    assert len(set(forms)) == len(forms) <= MAX_POSTS


def test_every_row_stands_for_routes_of_users() -> None:
    """A row's routes are names of the relay's table, and each family of routes that computes text has a row."""
    named = {route for row in ROWS for route in row.routes}
    others = {"speech", "images"}  # no text: what a canary could ask of them costs seconds
    assert named == {api.route for api in (*APIS, REALTIME)} - others


def test_each_route_is_tried_with_the_priority_first() -> None:
    """In the order of the kind, each generating route with the priority and then without it."""
    forms = [(form.row, form.priority) for form in tried("vllm", -5)]
    assert forms[:5] == [(COMPLETIONS, -5), (COMPLETIONS, None), (CHAT, -5), (CHAT, None), (EMBEDDINGS, None)]
    assert [form.row for form in tried("openai")][:3] == [CHAT, COMPLETIONS, EMBEDDINGS]


@pytest.mark.parametrize(("route", "first"), [("rerank", RERANK), ("classify", CLASSIFY), ("responses", CHAT)])
def test_what_users_use_is_tried_first(route: str, first: CanaryRow) -> None:
    """A server whose users rerank is asked to rerank before it is asked for a token."""
    assert tried("vllm", route=route)[0].row is first


def test_what_passed_is_first_and_a_second_refusal_tries_others() -> None:
    """A form that passed is the only one sent; refused once it is kept, refused twice the others are tried, too."""
    forms = CanaryForms(KINDS["vllm"], None)
    assert forms.refused(CanaryForm(COMPLETIONS), "m", 404)
    chat = forms.next_form("m")
    assert chat == CanaryForm(CHAT) and not forms.is_known(chat, "m")
    forms.passed(chat, "m")
    assert forms.next_form("m") == chat and forms.is_known(chat, "m") and not forms.is_known(chat, "other")
    assert not forms.refused(chat, "m", 400)
    assert forms.next_form("m") == chat
    assert forms.refused(chat, "m", 400)
    assert forms.next_form("m", asked=[chat]) == CanaryForm(EMBEDDINGS)
    assert forms.next_form("other") == chat, "what passed with one model is the likeliest with the next"


def test_a_rejected_form_is_tried_again_only_where_users_are_served() -> None:
    """Not with the next canary; once after a user was served on its route, and then never again."""
    forms = CanaryForms(KINDS["llamacpp"], None)
    asked = set()
    while form := forms.next_form("m"):
        asked.add(form)
        forms.refused(form, "m", 404)
    assert len(asked) == 5
    again = forms.next_form("m", "rerank")
    assert again == CanaryForm(RERANK)
    forms.refused(again, "m", 404)
    assert forms.next_form("m", "rerank") is None


def test_failures_of_a_form_that_never_passed_end() -> None:
    """A form that answers 500 or breaks off comes after the others and is later left out; one that starves is kept."""
    forms = CanaryForms(KINDS["tgi"], None)
    completions, chat = CanaryForm(COMPLETIONS), CanaryForm(CHAT)
    forms.failed(completions, "m")
    assert forms.next_form("m") == chat
    for _ in range(MAX_FAILURES):
        forms.failed(completions, "m")
        forms.failed(chat, "m", starved=True)
    assert forms.next_form("m") == chat and forms.next_form("m", asked=[chat]) is None


def test_a_missing_transfer_is_named() -> None:
    """An engine whose prefill and decode are apart gets the names of no transfer, as its own health check does."""
    forms = CanaryForms(KINDS["sglang"], None)
    forms.refused(CanaryForm(COMPLETIONS), "m", 400, b'{"message": "received without Bootstrap room id"}')
    form = forms.next_form("m")
    assert form == CanaryForm(COMPLETIONS, fake_transfer=True)
    asked = body(KINDS["sglang"], form, "m")
    assert (asked["bootstrap_host"], asked["bootstrap_room"]) == ("2.2.2.2", 0)
    assert "bootstrap_room" not in body(KINDS["sglang"], CanaryForm(COMPLETIONS), "m")


@pytest.mark.parametrize(
    ("status", "priority", "goes_on"),
    [
        (400, None, True),
        (501, None, True),
        (424, None, True),
        (401, None, False),
        (429, None, False),
        (500, None, False),
        (503, None, False),
        (503, 9, True),
        (500, 9, True),
        (401, 9, False),
    ],
)
def test_which_refusals_are_of_the_form(status: int, priority: int | None, goes_on: bool) -> None:
    """Another form may help against a missing route or a bad field, not against a missing key or a full engine."""
    assert CanaryForms(KINDS["vllm"], 9).refused(CanaryForm(COMPLETIONS, priority), "m", status) is goes_on


def test_a_full_engine_is_not_taken_for_one_that_refuses_a_known_priority() -> None:
    """503 and 500 of a form that has passed say something of the engine, not of the form."""
    forms = CanaryForms(KINDS["sglang"], 9)
    form = CanaryForm(COMPLETIONS, 9)
    forms.passed(form, "m")
    assert not any(forms.refused(form, "m", status) for status in (500, 503, 500, 503))


def test_a_priority_is_not_lost_while_the_engine_loads() -> None:
    """503 is also what an engine answers that loads: the form with the priority stays the first, until 500s end it."""
    forms = CanaryForms(KINDS["vllm"], 9)
    form = CanaryForm(COMPLETIONS, 9)
    assert all(forms.refused(form, "m", 503) for _ in range(5)) and forms.next_form("m") == form
    assert all(forms.refused(form, "m", 500) for _ in range(MAX_FAILURES)) and form not in tried_of(forms)


def test_members_for_the_moment_are_merged() -> None:
    """What keeps a model as it was loaded is added to the options, and replaces none of them."""
    kind = KINDS["ollama"]
    form = CanaryForms(kind, None).next_form()
    assert form is not None
    asked = body(kind, form, "m", {"options": {"num_ctx": 4096}})
    assert asked["options"] == {"num_predict": 1, "temperature": 0, "num_ctx": 4096}
    assert "num_ctx" not in body(kind, form, "m")["options"]


def test_the_silence_is_a_sound_file() -> None:
    """A tenth of a second, 16 kHz, one channel, nothing but zeros."""
    with wave.open(io.BytesIO(canary_rows.silence())) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        frames = sound.readframes(sound.getnframes())
    assert frames == bytes(3200)


def events(*payloads: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(p).encode() + b"\n\n" for p in payloads) + b"data: [DONE]\n\n"


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


@pytest.mark.parametrize(
    ("raw", "token"),
    [
        (events({"choices": [{"text": "a", "finish_reason": "length"}]}), True),
        (events({"choices": [{"text": "", "finish_reason": "length"}]}), True),
        (events({"choices": [{"delta": {"role": "assistant", "content": ""}}]}), False),
        (
            events({"choices": [{"delta": {"content": ""}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}),
            True,
        ),
        (events({"choices": [{"delta": {"reasoning_content": "Hm"}}]}), True),
        (json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "length"}]}).encode(), True),
        (b"data: [DONE]\n\n", False),
        (b": keep-alive\n\n", False),
        (b"<html>", False),
        (b"", False),
    ],
)
def test_a_token_is_told_from_mere_bytes(raw: bytes, token: bool) -> None:
    """Text, reasoning or a finish reason proves work; roles, comments and pages do not."""
    assert read(raw, CHAT).token is token


@pytest.mark.parametrize(
    ("row", "answer", "works"),
    [
        ("EMBEDDINGS", {"data": [{"embedding": [0.5]}]}, True),
        ("EMBEDDINGS", {"data": []}, False),
        ("EMBEDDINGS", {"error": "not here"}, False),
        ("RERANK", {"results": [{"index": 0, "relevance_score": 0.1}]}, True),
        ("RERANK", [{"score": 0.1, "index": 0}], True),  # SGLang
        ("RERANK", {"results": []}, False),
        ("SCORE", {"data": [{"index": 0, "object": "score", "score": 0.5}]}, True),
        ("POOLING", {"data": [{"object": "pooling", "data": [0.5]}]}, True),
        ("CLASSIFY", {"data": [{"label": "a", "probs": [1.0]}]}, True),
        ("CLASSIFY", {"data": [[{"label": "a", "score": 1.0}]]}, True),  # Infinity
        ("TRANSCRIPTION", {"text": ""}, True),
        ("TRANSCRIPTION", {"text": "you"}, True),
        ("TRANSCRIPTION", {"text": None}, False),
        ("TRANSCRIPTION", {"error": "no audio", "text": ""}, False),
        ("TEI_EMBED", [[0.5]], True),
        ("TEI_EMBED", [], False),
        ("TEI_EMBED", ["no"], False),
        ("TEI_RERANK", [{"index": 0, "score": 0.9}], True),
        ("TEI_PREDICT", [{"score": 0.9, "label": "a"}], True),
        ("OLLAMA_GENERATE", {"response": "", "done": True, "done_reason": "length"}, True),
        ("OLLAMA_GENERATE", {"response": "", "done": True, "done_reason": "load"}, False),
        ("OLLAMA_GENERATE", {"response": "1", "done": False}, False),
        ("OLLAMA_EMBED", {"embeddings": [[0.5]]}, True),
    ],
)
def test_each_row_knows_its_own_work(row: str, answer: Any, works: bool) -> None:
    """A vector, a score, a label or a transcript of any length proves work; what is empty or an error does not."""
    assert read(json.dumps(answer).encode(), getattr(canary_rows, row)).token is works


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"error": {"message": "core died", "code": 500}}, 500),
        ({"error": {"message": "no priority here", "code": 400}}, 400),
        ({"error": {"message": "no priority here", "code": "bad"}}, 500),
        ({"error": "boom"}, 500),
        ({"choices": [{"text": "", "finish_reason": "abort"}]}, 500),
        ({"choices": [{"text": "a", "finish_reason": "stop"}], "error": None}, 0),
    ],
)
def test_an_error_inside_an_answer_counts(event: Any, error: int) -> None:
    """A stream of status 200 with an error or an aborted token is no pass."""
    assert read(events(event), COMPLETIONS).error == error


def test_an_answer_is_counted_and_hashed_never_kept() -> None:
    """Prompt tokens come from the usage or are estimated; the text becomes a short hash."""
    said = read(events({"choices": [{"text": "secret", "finish_reason": "length"}]}, USAGE), COMPLETIONS)
    assert said.prompt_tokens == 3 and "secret" not in repr(said)
    whole = read(json.dumps({"choices": [{"message": {"content": "secret"}}]}).encode(), CHAT)
    assert (whole.prompt_tokens, whole.digest) == (16, said.digest)
    assert read(json.dumps({"data": [1]}).encode(), EMBEDDINGS).digest == ""


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer(noise: bytes) -> None:
    """Any bytes are parsed without an exception."""
    for raw in (noise, b"data: " + noise, b'{"choices": [{"text": ' + noise):
        assert isinstance(read(raw, COMPLETIONS), CanaryAnswer)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["choices", "error", "usage", "delta", "text", "code", "data", "finish_reason"]), x
            )
        ),
    )
)
def test_any_json_is_an_answer(value: Any) -> None:
    """JSON of any shape is parsed without an exception."""
    for row in ROWS:
        assert isinstance(read(json.dumps(value).encode(), row), CanaryAnswer)
