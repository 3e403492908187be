"""The usage that engines report, in the form of each API.

Recorded answers are read in tests/relay/test_sse.py; forms of engines that do not run here are those of their sources.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.events import RequestSize, Usage
from sidecar.load import answer_scan, usage_forms
from sidecar.load.usage_forms import ToldUsage, UsageMeter

EXPECTED = RequestSize(500, cached=20, output=70)


def told(answer: Any, choices: int = 1, **header: str) -> ToldUsage | None:
    fields = {name.replace("_", "-").encode(): value for name, value in header.items()}
    items = answer_scan.read(json.dumps(answer).encode())
    return usage_forms.with_header(usage_forms.read(items, choices), lambda name: fields.get(name, ""))


def sequence(prompt: int, output: int, cached: int) -> dict[str, Any]:
    return {"text": "x", "meta_info": {"prompt_tokens": prompt, "completion_tokens": output, "cached_tokens": cached}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 3}}, ToldUsage(9, 3)),
        (
            {"usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_cache_hit_tokens": 4}},
            ToldUsage(9, 3, 4),
        ),
        ({"usage": {"total_tokens": 56}, "results": []}, ToldUsage(56)),
        ({"usage": {"prompt_tokens": 8, "total_tokens": 8}}, ToldUsage(8)),
        (
            {"usage": {"input_tokens": 500, "cache_read_input_tokens": 9500, "output_tokens": 100}},
            ToldUsage(10_000, 100, 9500),
        ),
        ({"usage": {"input_tokens": 5, "cache_creation_input_tokens": 95, "output_tokens": 1}}, ToldUsage(100, 1)),
        (
            {"usage": {"tokens": {"input_tokens": 70.0, "output_tokens": 5.0}, "billed_units": {"input_tokens": 6.0}}},
            ToldUsage(70, 5),
        ),
        ({"usage": {"billed_units": {"input_tokens": 6, "output_tokens": 2}}}, ToldUsage(6, 2)),
        ({"meta": {"billed_units": {"input_tokens": 6}}, "embeddings": {}}, ToldUsage(6)),
        ({"text": "x", "usage": {"type": "duration", "seconds": 3600}}, ToldUsage(seconds=3600)),
        ({"text": "x", "duration": "3600.5", "segments": [{"tokens": [1]}]}, ToldUsage(seconds=3600.5)),
        (
            {"usage": {"prompt_audio_seconds": 7, "prompt_tokens": 4, "completion_tokens": 9}},
            ToldUsage(4, 9, seconds=7),
        ),
        ({"generated_text": "x", "details": {"generated_tokens": 3, "prefill": [], "tokens": []}}, ToldUsage(None, 3)),
        ({"tokens_evaluated": 9, "tokens_predicted": 2, "timings": {"prompt_n": 4}}, ToldUsage(9, 2, 5)),
        ({"choices": [], "timings": {"cache_n": 5, "prompt_n": 4, "predicted_n": 2}}, ToldUsage(9, 2, 5)),
        ({"done": True, "eval_count": 2}, ToldUsage(None, 2)),
        ({"embeddings": [], "prompt_eval_count": 2}, ToldUsage(2)),
        ([sequence(10, 3, 4), sequence(20, 5, 0)], ToldUsage(30, 8, 4)),
        ([{"index": 0, "embedding": [[0.5]]}], None),
        ({"usage": None, "error": None}, None),
        ({"usage": {"prompt_tokens": True, "completion_tokens": "3"}}, None),
        ({"usage": [1], "details": "x", "meta_info": 3, "timings": None}, None),
    ],
)
def test_each_form_is_read_as_intended(answer: Any, expected: ToldUsage | None) -> None:
    """The prompt includes cached tokens, and values that were not reported stay unknown."""
    assert told(answer) == expected


def test_the_prompt_of_several_choices_counts_once() -> None:
    """SGLang gives an item for each choice, each with the prompt that they share."""
    items = [sequence(10, 3, 4), sequence(10, 4, 9), sequence(20, 5, 0), sequence(20, 6, 19)]
    assert told(items, choices=2) == ToldUsage(30, 18, 4)


def test_a_header_supplies_what_the_body_does_not_report() -> None:
    """TGI's and TEI's counts of whole answers; values in the body take precedence."""
    assert told({"generated_text": "x"}, x_prompt_tokens="9", x_generated_tokens="3") == ToldUsage(9, 3)
    assert told([{"details": {"generated_tokens": 3}}], x_prompt_tokens="9") == ToldUsage(9, 3)
    assert told([[0.5]], x_compute_tokens="12") == ToldUsage(12)
    assert told({"usage": {"prompt_tokens": 4}}, x_compute_tokens="12") == ToldUsage(4)
    assert told([[0.5]], x_compute_tokens="1e3") is None


@pytest.mark.parametrize(
    ("usage", "counted", "booked", "is_whole"),
    [
        (ToldUsage(9, 3, 4), 7, Usage(9, 3, 4), True),
        (ToldUsage(9, 3, 4, final=False), 7, Usage(9, 7, 4), False),
        (ToldUsage(9, 8, 4, final=False), 7, Usage(9, 8, 4), False),
        (ToldUsage(9, None, 4), 7, Usage(9, 7, 4), False),
        (ToldUsage(9, None, 4), 0, Usage(9, 70, 4), False),
        (ToldUsage(None, 3), 0, Usage(520, 3, 20), False),
        (ToldUsage(9, 3, 40), 0, Usage(9, 3, 9), True),
        (ToldUsage(9, final=False), 2, Usage(9, 2, 9), False),
    ],
)
def test_unreported_values_are_estimates(usage: ToldUsage, counted: int, booked: Usage, is_whole: bool) -> None:
    """The engine's word where there is one; until it is the last, no less than was counted."""
    assert (usage.usage(EXPECTED, counted), usage.is_whole(EXPECTED)) == (booked, is_whole)


def test_the_seconds_of_a_recording_rule_its_estimate() -> None:
    """An upload estimated at 10 seconds that had an hour: 360 times the output, and still an estimate."""
    expected = RequestSize(4, output=25, audio_seconds=10.0)
    usage = ToldUsage(seconds=3600.0)
    assert usage.usage(expected).completion_tokens == 9000
    assert (usage.usage(expected).audio_seconds, usage.is_whole(expected)) == (3600.0, False)


def test_a_stream_of_several_sequences_is_final_when_all_are() -> None:
    """Each event belongs to one of them; if left early, the usage reported so far for each counts."""
    meter = UsageMeter()
    for index, output, ended in ((0, 3, False), (1, 2, False), (0, 5, True)):
        meta = {"prompt_tokens": 10, "completion_tokens": output, "finish_reason": {"type": "stop"} if ended else None}
        assert meter.take({"meta_info": meta, "index": index})
    assert meter.told == ToldUsage(20, 7, final=False)
    meter.take({"meta_info": {"prompt_tokens": 10, "completion_tokens": 4, "finish_reason": {}}, "index": 1})
    assert meter.told == ToldUsage(20, 9)
