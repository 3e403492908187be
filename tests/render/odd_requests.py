"""Requests at the edges of what vLLM takes: members of other types, values out of range, messages of odd forms."""

from __future__ import annotations

from typing import Any

from tests.render.cases import CHAT, COMPLETIONS, assistant, chat, encoded, image_part, picture, text_part, user

Requests = dict[str, tuple[str, dict[str, Any]]]
HELLO = user("hello")
SYSTEM = {"role": "system", "content": "a"}
FUNCTION = {"name": "f", "arguments": "{}"}
CALL = {"id": "a", "type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "f"}}

# Member -> values, each sent alone.
VALUES: dict[str, list[Any]] = {
    "temperature": [1, 2, 2.5, -1, "x", True, 0.009999, 0.01, 1e-6],
    "top_p": [0, 1, 1.5],
    "top_k": [-1, 0, -2, 5, 1.0],
    "min_p": [0, 1, 2],
    "repetition_penalty": [0, 1, 1.5],
    "presence_penalty": [2, 3, 0],
    "n": [0, 1, 2, -1],
    "seed": [0, -1, 2**63, 5],
    "stop": ["", [""], [], None, ["a", ""]],
    "stop_token_ids": [[], None, ["x"], [1, 1]],
    "bad_words": [[], ["a", "a"], [""], "x"],
    "min_tokens": [0, -1, 5000, 5],
    "max_tokens": [0, -1, 1, 16, 4096, 5000, "5", 5.0],
    "max_completion_tokens": [0, 7],
    "logprobs": [True, False, None, 2],
    "top_logprobs": [1, 0, -1, None],
    "stream": [True, False, None, "yes", 1],
    "stream_options": [{"include_usage": True}, {}],
    "ignore_eos": [True, 1],
    "skip_special_tokens": [False, 0, "no"],
    "include_stop_str_in_output": [True],
    "priority": [0, 5, "x", -3],
    "cache_salt": ["x", "", "a@b", "x" * 129, 5],
    "add_special_tokens": [True, "yes", 0],
    "user": ["x", 5],
    "request_id": ["x", 5],
    "session_id": ["a"],
    "return_token_ids": [True],
    "store": [True],
    "metadata": [{"a": "b"}],
    "model": [None, "other"],
    "mm_payload": ["none", "tensors", "other"],
    "return_mm_kwargs": [True, False, None],
}
OF_CHAT: dict[str, list[Any]] = {
    "add_generation_prompt": [False, "no", 0],
    "include_reasoning": [False, True, 0],
    "reasoning_effort": ["low", "none", "max", "wild", ""],
    "chat_template_kwargs": [
        {},
        None,
        {"enable_thinking": None},
        {"enable_thinking": "auto"},
        {"add_generation_prompt": False},
        {"x": {"y": 1}},
        {"bos_token": "BOS"},
    ],
    "tool_choice": ["none", "auto", "required", None],
    "parallel_tool_calls": [False, None, "x"],
    "tools": [None, [], [TOOL]],
}


def _calls(*calls: Any, **more: Any) -> dict[str, Any]:
    return chat(HELLO, assistant(**{"content": None, "tool_calls": list(calls)} | more))


def _tools(**function: Any) -> dict[str, Any]:
    return chat(HELLO, tools=[TOOL | {"function": function}], tool_choice="none")


def _link(link: str) -> dict[str, Any]:
    return chat(user([{"type": "image_url", "image_url": {"url": link}}]))


def messages() -> dict[str, dict[str, Any]]:
    """Chats of odd forms, without images."""
    result = {"role": "tool", "tool_call_id": "a", "content": "x"}
    thought = {"content": "c", "reasoning": "x", "reasoning_content": "r"}
    return {
        "unknown role": chat({"role": "alien", "content": "x"}),
        "no role": chat({"content": "x"}),
        "content of a number": chat(user(5)),
        "content null": chat(user(None)),
        "assistant without content": chat(HELLO, assistant()),
        "tool without id": chat(HELLO, {"role": "tool", "content": "x"}),
        "tool": chat(HELLO, result),
        "two systems": chat(SYSTEM, SYSTEM, HELLO),
        "system of parts": chat(SYSTEM | {"content": [text_part("a"), text_part("b")]}, HELLO),
        "system of an empty part": chat(SYSTEM | {"content": [text_part("")]}, HELLO),
        "billing line alone": chat(SYSTEM | {"content": "x-anthropic-billing-header: x"}, HELLO),
        "assistant of parts": chat(HELLO, assistant(content=[text_part("a"), text_part("b")])),
        "empty name": chat(HELLO | {"name": ""}),
        "name of a number": chat(HELLO | {"name": 3}),
        "arguments of an object": _calls(CALL | {"function": FUNCTION | {"arguments": {"a": 1}}}),
        "arguments null": _calls(CALL | {"function": FUNCTION | {"arguments": None}}),
        "arguments in their order": _calls(
            CALL | {"function": FUNCTION | {"arguments": '{"z":1,"a":[1.0,null,true,"é"],"n":1e400}'}}
        ),
        "call without id": _calls({"type": "function", "function": FUNCTION}),
        "call with a number as id": _calls(CALL | {"id": 5}),
        "custom call": _calls({"id": "a", "type": "custom", "custom": {"name": "f", "input": "{}"}}),
        "call in another order": _calls({"function": FUNCTION, "type": "function", "id": "a"}, content="x"),
        "reasoning null": chat(HELLO, assistant(**thought | {"reasoning": None}), HELLO),
        "reasoning twice": chat(HELLO, assistant(**thought), HELLO),
        "reasoning empty": chat(HELLO, assistant(content="c", reasoning=""), HELLO),
        "reasoning of a number": chat(HELLO, assistant(content="c", reasoning=4), HELLO),
        "a user's reasoning": chat(HELLO | {"reasoning": "r"}),
        "refusal null": chat(HELLO, assistant(content="c", refusal=None, audio=None, function_call=None), HELLO),
        "text null": chat(user([text_part("x") | {"text": None}])),
        "text of a number": chat(user([text_part("x") | {"text": 5}])),
        "part without type": chat(user([{"text": "x"}])),
        "part of text": chat(user(["x"])),
        "input_text": chat(user([text_part("x") | {"type": "input_text"}])),
        "placeholder as text": chat(user("<|vision_start|><|image_pad|><|vision_end|>")),
        "greedy twice": chat(HELLO, n=2, temperature=0),
        "strict null": _tools(name="f", strict=None, description=None),
        "strict false": _tools(name="f", strict=False),
        "tool without type": chat(HELLO, tools=[{"function": {"name": "f"}}], tool_choice="none"),
        "tool without name": _tools(),
        "tool in another order": _tools(parameters={"b": 1, "a": {"z": [1, 2.5]}}, name="f", description="<'\"é"),
    }


def with_images() -> dict[str, dict[str, Any]]:
    """Chats whose images have odd links, names or places."""
    part = image_part(encoded(picture(100, 80)))
    url = part["image_url"]["url"]
    text = url.split(",")[1]
    files = {
        "junk after a JPEG": encoded(picture(30, 30)) + b"junk" * 10,
        "junk after a PNG": encoded(picture(30, 30), "PNG") + b"junk" * 10,
        "1x1": encoded(picture(1, 1), "PNG"),
        "1x300": encoded(picture(1, 300), "PNG"),
        "2x300": encoded(picture(2, 300), "PNG"),
    }
    links = {
        "upper case": f"DATA:image/png;base64,{text}",
        "no type": f"data:;base64,{text}",
        "parameters": f"data:image/jpeg;x=y;base64,{text}",
        "line end": f"{url}\n",
        "no padding": url.rstrip("="),
        "for URLs": url.replace("+", "-").replace("/", "_", 3),
        "more padding": f"{url}====",
        "empty": "data:image/png;base64,",
    }
    return (
        {name: chat(user([image_part(data)])) for name, data in files.items()}
        | {f"link: {name}": _link(link) for name, link in links.items()}
        | {
            "link as text": chat(user([part | {"image_url": url}])),
            "detail": chat(user([part | {"image_url": {"url": url, "detail": "low"}}])),
            "uuid empty": chat(user([part | {"uuid": ""}])),
            "uuid of a number": chat(user([part | {"uuid": 5}])),
            "uuid null": chat(user([part | {"uuid": None}])),
            "uuid without type": chat(user([{"image_url": part["image_url"], "uuid": "u"}])),
            "in a system prompt": chat(SYSTEM | {"content": [part]}, HELLO),
            "of an assistant": chat(HELLO, assistant(content=[part])),
            "of a tool": chat(HELLO, {"role": "tool", "tool_call_id": "x", "content": [part, text_part("a")]}),
            "a video's token": chat(user([part, text_part("<|video_pad|>")])),
            "one more image token": chat(user([part, text_part("<|image_pad|>")])),
            "an image token without an image": chat(user([text_part("<|image_pad|>")])),
        }
    )


def completions() -> dict[str, dict[str, Any]]:
    """Completions whose prompts have odd forms."""
    prompts = [[1, 2], [True], [10**6], [639], [-1], "", [], [[]], ["a", [1]], None, 5, ["a", "b"]]
    return {f"prompt {prompt!r}": {"prompt": prompt} for prompt in prompts} | {
        "no room": {"prompt": "a", "max_tokens": 0},
        "suffix": {"prompt": "a", "suffix": "b"},
    }


def odd_requests(*, images: bool) -> Requests:
    """All of them: name -> (path, body)."""
    chats = messages() | (with_images() if images else {})
    others = completions()
    for member, values in (VALUES | OF_CHAT).items():
        for value in values:
            name = f"{member} {value!r}"[:60]
            chats[name] = chat(HELLO) | {member: value}
            if member in VALUES:
                others[name] = {"prompt": "a b", member: value}
    return {name: (CHAT, body) for name, body in chats.items()} | {
        f"completion: {name}": (COMPLETIONS, {"model": "tiny"} | body) for name, body in others.items()
    }
