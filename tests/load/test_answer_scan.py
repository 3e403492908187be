"""Members of answers: found at their path only, however the text is split."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.load import answer_scan
from sidecar.load.answer_scan import PATHS, AnswerScan

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
NAMES = sorted({name for path in PATHS for name in path.split(".")})

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 1 << 40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(st.characters(codec="utf-8"), max_size=6), inner, max_size=5)
    ),
    max_leaves=24,
)
answers = st.dictionaries(st.sampled_from([*NAMES, "choices", "tools"]), values, max_size=8)


def dumped(answer: Any, loose: bool) -> bytes:
    return json.dumps(answer, indent=1 if loose else None, ensure_ascii=loose).encode()


def scanned(pieces: list[bytes]) -> list[dict[str, Any]]:
    scan = AnswerScan()
    for piece in pieces:
        scan.feed(piece)
    return scan.items()


@given(answers | st.lists(answers | values.filter(lambda value: not isinstance(value, str)), max_size=4), st.booleans())
@example([{"usage": 1}, [], {"usage": {}}], False)
@example({"meta_info": {"prompt_tokens": 1, "x": {"cached_tokens": 2}}, "delta": "usage"}, True)
def test_members_are_those_that_a_parser_finds(answer: Any, loose: bool) -> None:
    """The oracle is Python's parser, on the whole text: the same members of the same items."""
    text = dumped(answer, loose)
    assert answer_scan.read(text) == answer_scan.items_in_python(text)


@given(answers, st.booleans(), st.lists(st.integers(0, 4000), max_size=8))
def test_pieces_change_nothing(answer: Any, loose: bool, cuts: list[int]) -> None:
    """However a text is cut, byte by byte too, the same is found in it."""
    text = dumped(answer, loose)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    whole = scanned([text])
    assert scanned([text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert scanned([text[n : n + 1] for n in range(len(text))]) == whole


@given(st.binary(max_size=64) | st.text('{}[]":,\\ ausge1', max_size=64).map(str.encode))
def test_nonsense_is_survived(text: bytes) -> None:
    """Invalid JSON may or may not yield members, and is never an error."""
    scanned([text, b'{"usage":', text])


@pytest.mark.parametrize(
    "spoof",
    [
        {"tools": [{"function": {"parameters": {"properties": {"usage": {"prompt_tokens": 1}}}}}]},
        {"choices": [{"message": {"content": '","usage":{"prompt_tokens":1},"x":"'}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"arguments": '{"usage":{"prompt_tokens":1}}'}}]}}]},
        {"metadata": {"usage": {"prompt_tokens": 1}}},
        {"text": "\\", "x": '\\"usage":{'},
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_only_a_usage_at_its_place_is_one(spoof: dict[str, Any], after: bool) -> None:
    """Schemas, arguments and texts that hold the word are passed over, before the usage and behind it."""
    answer = {**spoof, "usage": USAGE} if not after else {"usage": USAGE, **spoof}
    assert answer_scan.read(json.dumps(answer).encode()) == [{"usage": USAGE}]
    assert answer_scan.read(json.dumps(spoof).encode()) == []


@pytest.mark.parametrize("megabytes_before", [0, 3])
@pytest.mark.parametrize("megabytes_behind", [0, 3])
def test_nothing_hides_a_usage(megabytes_before: int, megabytes_behind: int) -> None:
    """Log probabilities of a long prompt follow it, long texts precede it; neither is kept."""
    logprobs = [{"17": {"logprob": -1.25, "rank": 1, "decoded_token": "a}"}}] * 18_000  # about a megabyte
    before = [{"message": {"content": 'x"\\' * 256 * 1024}}] * megabytes_before
    text = json.dumps({"choices": before, "usage": USAGE, "prompt_logprobs": logprobs * megabytes_behind}).encode()
    assert scanned([text[n : n + 65_536] for n in range(0, len(text), 65_536)]) == [{"usage": USAGE}]


def test_a_value_that_is_too_long_is_not_there() -> None:
    """Memory is bounded: nothing that is called usage and has 100 KB is one, and those next to it are found."""
    text = json.dumps({"usage": {"x": "y" * 100_000}, "prompt_eval_count": 4, "error": "z" * 70_000}).encode()
    assert scanned([text]) == [{"prompt_eval_count": 4}]


def test_many_long_values_are_not_all_kept() -> None:
    """Each below the bound, together a hundred megabytes: the first megabyte of them is kept."""
    item = json.dumps({"usage": {"x": "y" * 60_000}}).encode()
    scan = AnswerScan()
    scan.feed(b"[" + item)
    for _ in range(1500):
        scan.feed(b"," + item)
    assert len(scan.items()) == (1 << 20) // (60_000 + len(b'{"x": ""}'))


def test_a_list_is_scanned_up_to_a_bound() -> None:
    """Of a list of answers each item counts, at most some thousands."""
    text = json.dumps([{"meta_info": {"prompt_tokens": n}} for n in range(answer_scan.MAX_ITEMS + 9)]).encode()
    found = scanned([text])
    assert len(found) == answer_scan.MAX_ITEMS
    assert found[:3] == [{"meta_info": {"prompt_tokens": n}} for n in range(3)]


def test_where_a_usage_begins() -> None:
    """The place of its brace, not that of a schema's."""
    text = b'{"a":{"usage":{}},"usage": {"prompt_tokens":3}}'
    assert answer_scan.start_of(text, "usage") == text.index(b'{"prompt_tokens"')
    assert answer_scan.start_of(b'{"usages":{}}', "usage") == -1
