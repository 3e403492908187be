"""What a body says about its place in the engine's queue, and about tokens that are generated and not sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.load.api_routes import CHAT
from sidecar.load.body_scan import scan
from sidecar.load.request_shape import RequestShape, describe


def shape(members: dict[str, Any]) -> RequestShape:
    """What is read of a body with these members."""
    return describe(scan(json.dumps(members).encode()), CHAT, 0)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("asked", "priority"),
    [
        *((7, 7), (-3, -3), ("12", 12), (2.0, 2), (1 << 80, (1 << 63) - 1), (-(1 << 80), -(1 << 63))),
        *((None, 0), (True, 0), ("high", 0), ([1], 0), (float("inf"), 0), (float("nan"), 0), ("9" * 5000, 0)),
    ],
)
def test_a_priority_is_a_number_of_64_bits(asked: Any, priority: int) -> None:
    """What engines read as a number is one; nonsense is the default."""
    assert shape({"priority": asked}).priority == priority


@pytest.mark.parametrize(
    "members",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
        {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
        {"response_format": {"type": "regex", "pattern": "a"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"json": None, "regex": "a+"}},
        *({f"guided_{kind}": "x"} for kind in ("json", "regex", "choice", "grammar")),
        {"guided_json": {"type": "object"}},
        {"guided_json_object": True},
        {"grammar": 'root ::= "a"'},
        {"json_schema": {"type": "object"}},
        {"regex": "a+"},
        {"ebnf": 'root ::= "a"'},
        {"sampling_params": {"json_schema": "{}"}},
        {"parameters": {"grammar": {"type": "json", "value": {}}}},
        {"text": {"format": {"type": "json_schema", "schema": {}}}},
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"ec_transfer_params": {"x": 1}},
        {"bootstrap_room": 0},
        {"bootstrap_room": [1, 2]},
        {"lora_path": "adapter"},
        {"parameters": {"adapter_id": "adapter"}},
        {"id_slot": 0},
        {"routed_dp_rank": 0},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]},
        {"messages": [{"content": [{"type": "input_image", "image_url": "HTTP://x/y.png"}]}]},
        {"messages": [{"content": [{"type": "audio_url", "audio_url": {"url": "http://x/y.wav"}}]}]},
        {"messages": [{"content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}]},
        {"messages": [{"content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}]}]},
        {"text": "x", "audio_data": ["AAAA"]},
    ],
    ids=str,
)
def test_what_waits_for_something_of_its_own_may_be_overtaken(members: dict[str, Any]) -> None:
    """A grammar that is compiled, a transfer, an adapter, a slot, a link: engines serve later requests first."""
    assert shape(members).reorders


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"response_format": "text"},
        {"structured_outputs": None},
        {"structured_outputs": {"json": None, "disable_any_whitespace": False}},
        {"grammar": "", "json_schema": None, "guided_json_object": False},
        {"text": "a prompt"},
        {"text": {"format": {"type": "text"}}},
        {"kv_transfer_params": None, "bootstrap_room": None, "lora": []},
        {"kv_transfer_params": {"do_remote_prefill": False}},
        {"id_slot": -1},
        {"priority": 5},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tool_choice": "required"},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]},
        {"messages": [{"content": [{"type": "text", "text": "https://x/ and response_format"}]}]},
        {"messages": [{"content": [{"type": "image", "text": "https://x/"}]}]},
    ],
    ids=str,
)
def test_what_waits_for_nothing_is_served_in_its_turn(members: dict[str, Any]) -> None:
    """Options that are absent, null or off are no grammar and no transfer, and no text passes for one."""
    assert not shape(members).reorders


@pytest.mark.parametrize(
    ("members", "withholds"),
    [
        ({}, False),
        ({"tools": [TOOL]}, True),
        ({"tools": [TOOL], "tool_choice": "auto"}, True),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, True),
        ({"tools": [TOOL], "tool_choice": None}, True),
        ({"tools": [TOOL], "tool_choice": "none"}, False),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, False),
        ({"tools": []}, False),
        ({"tools": None}, False),
        ({"tools": "x"}, False),
        ({"functions": [{"name": "f"}]}, True),
        ({"functions": [{"name": "f"}], "function_call": "none"}, False),
        ({"messages": [{"role": "system", "content": "", "tools": [TOOL]}]}, True),
        ({"include_reasoning": False}, True),
        ({"include_reasoning": True}, False),
        ({"stream_reasoning": False}, True),
        ({"separate_reasoning": False}, False),  # thoughts then come as content
        ({"reasoning_effort": "none"}, True),
        ({"reasoning": {"effort": "none"}}, True),
        ({"reasoning_effort": "low", "reasoning": "x"}, False),
    ],
    ids=str,
)
def test_tools_and_hidden_thoughts_may_be_withheld(members: dict[str, Any], withholds: bool) -> None:
    """A stream with tools or hidden reasoning may be silent while the engine generates."""
    assert shape(members).withholds is withholds


def test_a_body_that_was_not_read_may_be_all_of_it() -> None:
    """Nothing is known of an encoded body, so neither its turn nor its pace proves anything."""
    unread = describe(None, CHAT, 1000)
    assert (unread.priority, unread.reorders, unread.withholds) == (0, True, True)
