"""A chat request's messages as its template gets them, and the images among them in their order.

vLLM's rules (0.32, renderers/chat_utils.py). Only members are accepted of which tests show what becomes of them; any
other raises NotRendered, so that nothing is dropped that the engine would print.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.errors import NotRendered, PromptRejected

MAX_MESSAGES: Final = 10_000
MAX_IMAGES: Final = 128
MEMBERS: Final = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "reasoning", "reasoning_content", "refusal"},
    "tool": {"role", "content", "tool_call_id"},
}
# Begins a line that a client puts into system prompts, and that vLLM drops, since it changes with each request.
BILLING_LINE: Final = "x-anthropic-billing-header"


@dataclass(frozen=True, slots=True)
class SentImage:
    """An image of a request: the file's bytes, and the name that the client gave it, if any."""

    data: bytes
    uuid: str | None


@dataclass(slots=True)
class Conversation:
    """What a template is rendered with."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[SentImage] = field(default_factory=list)


def read(messages: Any, *, takes_parts: bool, image_text: str) -> Conversation:
    """The conversation in a request's `messages`. Raises NotRendered or PromptRejected.

    `takes_parts`: whether the template gets content piece by piece; where not, `image_text` stands for an image.
    """
    if not isinstance(messages, list) or not messages:
        raise PromptRejected("messages: send a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise PromptRejected(f"messages: the limit is {MAX_MESSAGES}")
    made = Conversation()
    for message in messages:
        if not isinstance(message, dict):
            raise PromptRejected("messages: each must be an object")
        made.messages.append(_message(message, made.images, takes_parts, image_text))
    return made


def _message(message: dict[str, Any], images: list[SentImage], takes_parts: bool, image_text: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in MEMBERS:
        raise NotRendered("a message has a role other than system, user, assistant or tool")
    if unknown := {key for key, value in message.items() if value is not None} - MEMBERS[role]:
        raise NotRendered(f"a message of the role {role} has {len(unknown)} members that are not known")
    if message.get("refusal") is not None:
        raise NotRendered("a message has a refusal")
    if message.get("content") is None and role != "assistant":
        raise NotRendered("a message has no content")
    parts = _parts(message.get("content"))
    if role == "system":
        parts = _without_billing(parts)
    before = len(images)
    pieces = [piece for part in parts if (piece := _piece(part, images)) is not None]
    if len(images) > MAX_IMAGES:
        raise PromptRejected(f"messages: the limit is {MAX_IMAGES} images")
    made: dict[str, Any] = {"role": role, "content": pieces}
    texts = [piece["text"] for piece in pieces if piece["type"] == "text"]
    if not takes_parts:
        made["content"] = _as_text(texts, len(images) - before, image_text)
    if role == "assistant":
        _add_calls(made, message.get("tool_calls"))
        reasoning = message.get("reasoning_content") if message.get("reasoning") is None else message["reasoning"]
        if reasoning is not None:
            if not isinstance(reasoning, str):
                raise NotRendered("reasoning is not text")
            made["reasoning"] = made["reasoning_content"] = reasoning
    elif role == "tool":
        if "tool_call_id" in message:
            made["tool_call_id"] = _text(message["tool_call_id"])
        if takes_parts and len(texts) == len(pieces):
            made["content"] = "\n".join(texts)
    if message.get("name") is not None:
        made["name"] = _text(message["name"])
    return made


def _parts(content: Any) -> list[dict[str, Any]]:
    """Content as a list of parts."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise NotRendered("content is neither text nor a list of parts")
    return content


def _without_billing(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a system prompt without attribution lines; a part that was nothing else is dropped."""
    kept = []
    for part in parts:
        text = _text_of(part)
        rest = text.partition("\n")[2] if text.startswith(BILLING_LINE) else text
        if rest or rest == text:
            kept.append({"type": "text", "text": rest})
    return kept


def _text_of(part: dict[str, Any]) -> str:
    if part.keys() != {"type", "text"} or part["type"] != "text":
        raise NotRendered("a part of a text is of another kind, or has more members")
    return _text(part["text"])


def _piece(part: dict[str, Any], images: list[SentImage]) -> dict[str, str] | None:
    """A part as templates get it: a text, or an image, which is added to `images`."""
    if part.get("type") == "text":
        return {"type": "text", "text": _text_of(part)}
    if part.get("type") != "image_url" or part.keys() - {"type", "image_url", "uuid"}:
        raise NotRendered("a part is neither text nor image_url")
    link, uuid = part.get("image_url"), part.get("uuid")
    if not isinstance(link, dict) or link.keys() - {"url", "detail"}:
        raise NotRendered("an image_url has no data, or members that are not known")
    link = link.get("url")
    if uuid is not None and not isinstance(uuid, str):
        raise NotRendered("a uuid is not text")
    if not isinstance(link, str):
        raise NotRendered("an image has no data: its size is known to the engine's cache alone")
    images.append(SentImage(_file(link), uuid))
    return {"type": "image"}


def _file(link: str) -> bytes:
    """The file in a base64 data URL. Raises NotRendered for a link, PromptRejected for damaged base64."""
    if link[:5].lower() != "data:":
        raise NotRendered("an image is behind a link, which is not fetched here; send a data URL")
    head, comma, text = link[5:].partition(",")
    if not comma or head.rpartition(";")[2] != "base64":
        raise PromptRejected("image_url: send a base64 data URL")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise PromptRejected("image_url: its base64 text is damaged") from None


def _as_text(texts: list[str], images: int, image_text: str) -> str:
    """Content as one text: images come first, empty texts do not count."""
    if images and any(image_text in text for text in texts):
        raise NotRendered("a text has an image's placeholder")
    return "\n".join([image_text] * images + [text for text in texts if text])


def _add_calls(made: dict[str, Any], calls: Any) -> None:
    """The tool calls of an assistant's message, their arguments as objects."""
    if calls is None or calls == []:
        return
    if not isinstance(calls, list):
        raise PromptRejected("tool_calls: send a list")
    made["tool_calls"] = [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") != "function":
        raise PromptRejected("tool_calls: send calls of the type function")
    if call.keys() != {"id", "type", "function"} or function.keys() != {"name", "arguments"}:
        raise NotRendered("a tool call has other members than id, type and function")
    text = function["arguments"]
    if not isinstance(text, str):
        raise NotRendered("the arguments of a tool call are not text")
    try:
        arguments = json.loads(text) if text else {}
    except ValueError:
        arguments = {}
    known = arguments if isinstance(arguments, dict) else {}
    return {
        "id": _text(call["id"]),
        "function": {"arguments": known, "name": _text(function["name"])},
        "type": "function",
    }


def tools(listed: Any) -> list[dict[str, Any]] | None:
    """A request's tools as templates get them. Raises NotRendered or PromptRejected."""
    if listed is None:
        return None
    if not isinstance(listed, list) or not listed:
        raise PromptRejected("tools: send a list of at least one tool, or omit it")
    return [_tool(tool) for tool in listed]


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise PromptRejected("tools: send tools of the type function")
    if tool.keys() - {"type", "function"} or function.keys() - {"name", "description", "parameters", "strict"}:
        raise NotRendered("a tool has members that are not known")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(parameters, dict | None) or not isinstance(strict, bool | None):
        raise PromptRejected("tools: parameters must be an object, strict a boolean")
    made = {
        "name": _text(function.get("name")),
        "description": None if function.get("description") is None else _text(function["description"]),
        "parameters": parameters,
    }
    return {"type": "function", "function": made if strict is None else made | {"strict": strict}}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PromptRejected("a member that must be text is not")
    return value
