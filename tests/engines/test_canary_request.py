"""The canary as data: the forms that are tried, their bodies, and the parsed responses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engines.canary_request import CanaryAnswer, CanaryForm, CanaryForms, body, read
from sidecar.engines.engine_type import CHAT, COMPLETIONS, EMBEDDINGS
from sidecar.engines.registry import KINDS


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_canary_asks_for_one_greedy_token(kind: Any) -> None:
    """Every form of every kind is JSON that asks for one token of the same short prompt, as a stream."""
    for form in CanaryForms(kind, 7).forms():
        asked = json.loads(json.dumps(body(kind, form, "m")))
        assert asked["model"] == "m" and ("priority" in asked) == (
            form.priority is not None and form.path != EMBEDDINGS
        )
        if form.path != EMBEDDINGS:
            assert (asked["max_tokens"], asked["stream"], asked["temperature"]) == (1, True, 0)


def test_each_route_is_tried_with_the_priority_first() -> None:
    """Completions, chat, embeddings, each with the priority and then without it."""
    tried = [(form.path, form.priority) for form in CanaryForms(KINDS["vllm"], -5).forms()]
    assert tried[:3] == [(COMPLETIONS, -5), (COMPLETIONS, None), (CHAT, -5)] and tried[-1] == (EMBEDDINGS, None)
    assert [form.path for form in CanaryForms(KINDS["openai"], None).forms()] == [CHAT, COMPLETIONS, EMBEDDINGS]


def test_what_passed_is_remembered_until_it_is_refused() -> None:
    """A form that passed is the only one sent; a later rejection of it opens all forms again."""
    forms = CanaryForms(KINDS["vllm"], None)
    assert forms.goes_on(CanaryForm(COMPLETIONS), 404)
    forms.passed(CanaryForm(CHAT))
    assert forms.forms() == (CanaryForm(CHAT),)
    assert not forms.goes_on(CanaryForm(CHAT), 400)
    assert len(forms.forms()) == 3


@pytest.mark.parametrize(
    ("status", "priority", "goes_on"),
    [
        (400, None, True),
        (501, None, True),
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
    assert CanaryForms(KINDS["vllm"], 9).goes_on(CanaryForm(COMPLETIONS, priority), status) is goes_on


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
        (json.dumps({"data": [{"embedding": [0.5]}]}).encode(), True),
        (b"data: [DONE]\n\n", False),
        (b": keep-alive\n\n", False),
        (b"<html>", False),
        (b"", False),
    ],
)
def test_a_token_is_told_from_mere_bytes(raw: bytes, token: bool) -> None:
    """Text, reasoning, a finish reason or an embedding proves work; roles, comments and pages do not."""
    assert read(raw, CHAT).token is token


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
    assert isinstance(read(json.dumps(value).encode(), CHAT), CanaryAnswer)
