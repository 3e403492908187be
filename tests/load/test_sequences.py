"""Sequences of a body: their number, and their price, against the price of each for itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import RequestSize, Usage
from sidecar.load import cost_model
from sidecar.load.api_routes import INVOCATIONS, Api, api_of, of_form
from sidecar.load.body_scan import find, find_in_python, scan
from sidecar.load.cost_model import Coefficients, mu, settled_work
from sidecar.load.estimator import Estimator
from sidecar.load.request_shape import RequestShape, describe

CO = Coefficients()


def api(path: str) -> Api:
    found = api_of("POST", path, has_body=True)
    assert found is not None
    return found


def shape_of(path: str, payload: dict[str, Any]) -> RequestShape:
    body = json.dumps(payload).encode()
    assert find(body) == find_in_python(body) or len(body) > 8192
    found = scan(body)
    assert found is not None
    return describe(found, of_form(api(path), found.found.members), len(body))


def estimate(path: str, payload: dict[str, Any]) -> RequestSize:
    return Estimator(CO).estimate("t", shape_of(path, payload), []).work


def test_the_figures_of_the_field() -> None:
    """A thousand embeddings of 512 tokens were 624 MU as one sequence, and are 75."""
    assert mu(RequestSize(512_000), CO) == pytest.approx(624, abs=0.5)
    assert mu(RequestSize(512_000, prompts=1000, sequences=1000), CO) == pytest.approx(75, abs=0.05)
    work = estimate("/v1/embeddings", {"input": ["x" * 2048] * 1000})
    assert (work.uncached, work.prompts, work.output) == (512_000, 1000, 0)
    assert mu(work, CO) == pytest.approx(75, abs=0.05)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(lengths, st.integers(0, 5000))
def test_a_batch_costs_what_its_prompts_cost_each_for_itself(sizes: list[int], output: int) -> None:
    """However unequal they are; outputs are shared evenly, as a usage has only their sum."""
    shape = shape_of("/v1/completions", {"prompt": ["x" * 4 * size for size in sizes]})
    count = len(sizes)
    assert shape.prompts == count
    whole = RequestSize(sum(sizes), 0, output * count, prompts=count, sequences=count, skew=shape.skew)
    each = sum(cost_model.gpu_ms(RequestSize(size, 0, output), CO) for size in sizes)
    assert cost_model.gpu_ms(whole, CO) == pytest.approx(each)


@given(st.integers(1, 64), st.integers(1, 4000), st.integers(0, 2000))
def test_answers_to_one_prompt_share_its_prefill(n: int, prompt: int, output: int) -> None:
    """`n` answers cost one prefill, and as many decodes."""
    one = cost_model.terms(RequestSize(prompt, 0, output), CO)
    all_of_them = cost_model.terms(RequestSize(prompt, 0, n * output, sequences=n), CO)
    assert all_of_them.before_first_token == pytest.approx(one.before_first_token)
    assert all_of_them.decode + all_of_them.kv_read == pytest.approx(n * (one.decode + one.kv_read))


@given(lengths, st.integers(1, 60))
def test_pairs_repeat_their_query(sizes: list[int], query: int) -> None:
    """A reranker computes the query with each document: the tokens and the squares of all pairs."""
    documents = ["d" * 4 * size for size in sizes]
    shape = shape_of("/v1/rerank", {"query": "q" * 4 * query, "documents": documents})
    pairs = [query + size for size in sizes]
    if len(sizes) > 1:
        assert (shape.prompts, shape.text_bytes) == (len(sizes), 4 * sum(pairs))
        assert shape.skew * sum(pairs) ** 2 / len(pairs) == pytest.approx(sum(pair**2 for pair in pairs))
    else:
        assert (shape.prompts, shape.text_bytes) == (1, 4 * pairs[0])


@pytest.mark.parametrize(
    ("path", "payload", "prompts", "sequences", "text_bytes"),
    [
        ("/v1/completions", {"prompt": "abcd"}, 1, 1, 4),
        ("/v1/completions", {"prompt": ["abcd", "ab"], "n": 3}, 2, 6, 6),
        ("/v1/completions", {"prompt": "abcd", "n": 2, "best_of": 5}, 1, 5, 4),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1, 1, 0),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2, 2, 0),
        ("/completion", {"prompt": [12, "ab", 13]}, 1, 1, 2),  # llama.cpp's mixed prompt
        ("/completion", {"prompt": ["ab", [12, 13]], "n_cmpl": 2}, 2, 4, 2),
        ("/generate", {"text": ["ab", "cd"], "sampling_params": {"n": 2}}, 2, 4, 4),
        ("/generate", {"text": ["ab", "cd"], "sampling_params": [{"n": 2}, {"n": 3}]}, 2, 6, 4),
        ("/generate", {"input_ids": [[1], [2]]}, 2, 2, 0),
        ("/generate", {"inputs": "abc", "parameters": {"best_of": 4}}, 1, 4, 3),
        ("/v1/chat/completions", {"messages": [{"content": "a"}] * 5, "n": 2}, 1, 2, 5),
        ("/v1/chat/completions/batch", {"messages": [[{"content": "ab"}], [{"content": "cd"}]]}, 2, 2, 4),
        ("/v1/responses", {"input": [{"content": "a"}, {"content": "b"}]}, 1, 1, 2),
        ("/v1/messages", {"messages": [{"content": "a"}, {"content": "b"}]}, 1, 1, 2),
        ("/v1/embeddings", {"input": "abc"}, 1, 1, 3),
        ("/embed", {"inputs": ["abc", "abc"]}, 2, 2, 6),
        ("/embedding", {"content": ["abc", "abc", "d"]}, 3, 3, 7),
        ("/v2/embed", {"texts": ["abc", "abc"]}, 2, 2, 6),
        ("/api/embed", {"input": ["abc", "abc"]}, 2, 2, 6),
        ("/rerank", {"query": "ab", "texts": ["cd", "ef"]}, 2, 2, 8),
        ("/v1/score", {"text_1": "ab", "text_2": ["cd", "ef", "gh"]}, 3, 3, 12),
        ("/v1/score", {"text_1": ["ab", "cd"], "text_2": ["ef", "gh"]}, 2, 2, 8),
        ("/v1/score", {"queries": ["ab", "cd"], "documents": "ef"}, 2, 2, 8),
        ("/v1/score", {"query": "ab", "items": ["cd", "ef"]}, 2, 2, 8),
        ("/invocations", {"query": "ab", "documents": ["cd", "ef"]}, 2, 2, 8),
        ("/invocations", {"prompt": ["ab", "cd"]}, 2, 2, 4),
        ("/v1/systemone", {"state": "abcd", "questions": {"q": {"type": "noul"}, "r": {}}}, 2, 2, None),
        ("/v1/decisions", {"input": "abcd", "questions": [{"type": "choice"}, {"type": "score"}]}, 2, 2, None),
        ("/v2/chat", {"messages": [{"content": "a"}], "documents": ["b", {"data": "cd"}]}, 1, 1, 4),
        ("/v1/chat", {"message": "ab", "chat_history": [{"message": "cd"}], "preamble": "e"}, 1, 1, 5),
        ("/api/chat", {"messages": [{"content": "a", "images": ["iVBOR"]}]}, 1, 1, 1),
    ],
)
def test_each_form_is_counted(
    path: str, payload: dict[str, Any], prompts: int, sequences: int, text_bytes: int | None
) -> None:
    """The forms of vLLM, SGLang, TGI, llama.cpp, TEI, Ollama and Cohere."""
    shape = shape_of(path, payload)
    work = Estimator(CO).estimate("t", shape, []).work
    assert (shape.prompts, work.prompts, work.sequences) == (prompts, prompts, sequences)
    if text_bytes is not None:
        assert shape.text_bytes == text_bytes


def test_a_question_repeats_what_all_are_about() -> None:
    """Each question of a decision is asked about the whole state, which engines print as JSON, keys and all."""
    shape = shape_of("/v1/systemone", {"state": {"a key": 1}, "questions": {"q": "x", "r": "y"}})
    assert shape.text_bytes == 2 * len('{"a key":1}') + len('{"q":"x","r":"y"}')


def test_one_form_represents_its_api() -> None:
    """SageMaker's path is priced as what its body asks for."""
    assert shape_of("/invocations", {"input": ["a", "b"]}) == shape_of("/v1/embeddings", {"input": ["a", "b"]})
    assert INVOCATIONS.route == "generate"


def test_limits_and_lengths_are_of_all_sequences() -> None:
    """The client's limit holds for each answer; what is learned is the length of one."""
    shape = shape_of("/v1/completions", {"prompt": ["abcd"] * 100, "n": 2, "max_tokens": 10})
    assert shape.max_output == 2000
    estimator = Estimator(CO)
    for _ in range(50):
        estimator.learn("t", shape, Usage(100, 200 * 7))
    assert 1200 < estimator.estimate("t", shape, []).work.output < 1600
    one = shape_of("/v1/completions", {"prompt": "abcd"})
    assert 6 <= estimator.estimate("t", one, []).work.output <= 10
    assert estimator.reserved_mu("t", shape, estimator.estimate("t", shape, []).work) < 100 * 2 * mu(
        RequestSize(1, 0, 10), CO
    )


@pytest.mark.parametrize("n", [16, 16.0, "16"])
@pytest.mark.parametrize("stream", [True, "true", "1", 1, "on"])
def test_values_count_as_engines_parse_them(n: Any, stream: Any) -> None:
    """Pydantic parses 16.0 and "16" as 16, and many words as true: no spelling hides a request's size."""
    shape = shape_of("/v1/completions", {"prompt": "a", "n": n, "max_tokens": n, "stream": stream})
    assert (shape.choices, shape.max_output, shape.stream, shape.ask_usage) == (16, 256, True, True)


@pytest.mark.parametrize("ids", [[1, 2, 3], [1.0, 2.0, 3.0], [True, False, 3], [[1], [2.0, True]]])
def test_token_ids_count_as_engines_parse_them(ids: list[Any]) -> None:
    """Numbers with a fraction of 0 and booleans are token ids for pydantic."""
    assert shape_of("/v1/completions", {"prompt": ids}).token_ids == 3


def test_answers_that_cannot_be_short_are_not_expected_to_be() -> None:
    """A least number of tokens, or an end that is ignored, is what is expected, of each answer."""
    least = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4000}
    for more in ({"min_tokens": 4000}, {"ignore_eos": True}, {"ignore_eos": "true"}):
        assert estimate("/v1/completions", least | more).output == 16_000
    sampling = {"max_new_tokens": 900, "ignore_eos": True}
    assert estimate("/generate", {"text": "a", "sampling_params": sampling}).output == 900


def test_a_usage_is_of_all_sequences() -> None:
    """What was used is priced in as many sequences as were asked for."""
    expected = RequestSize(100, 0, 5000, prompts=100, sequences=200, skew=1.5)
    work = settled_work(expected, Usage(51_200, 200_000), 0)
    assert (work.prompts, work.sequences, work.skew, work.uncached) == (100, 200, 1.5, 51_200)


def test_an_hour_that_is_transcribed() -> None:
    """It is 120 windows for an encoder and a decoder: 11 MU, not the 0.008 of its few words of prompt."""
    estimator = Estimator(CO)
    shape = RequestShape(audio_seconds=3600.0, told_output=9000)
    work = estimator.estimate("t", shape, []).work
    assert (work.prompts, work.sequences, work.output) == (120, 120, 9000)
    assert mu(work, CO) == pytest.approx(11.2, abs=0.1)


def test_the_answer_corrects_the_length_of_a_recording() -> None:
    """By its seconds, where it has no tokens; by its tokens, where it has them."""
    expected = Estimator(CO).estimate("t", RequestShape(audio_seconds=60.0, told_output=150), []).work
    heard = settled_work(expected, Usage(0, 0, audio_seconds=600.0), 0)
    assert (heard.audio_seconds, heard.prompts, heard.output) == (600.0, 20, 1500)
    told = settled_work(expected, Usage(900, 1234, audio_seconds=600.0), 0)
    assert (told.audio_seconds, told.uncached, told.output) == (600.0, 900, 1234)


def test_pictures_and_speech_have_work_of_their_own() -> None:
    """Their output follows from the request, and is not learned as the length of an answer."""
    assert estimate("/v1/images/generations", {"prompt": "a cat", "n": 3}).output == 3 * 4160
    assert estimate("/v1/audio/speech", {"input": "x" * 150}).output == 450
