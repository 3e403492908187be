"""Pure: a completion request reduced to numbers.

Tokens are bytes / 4; an image is width/28 x height/28 tokens. Of the prompt, only a hash is kept.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sidecar.images import file_headers
from sidecar.tools.scripted_engine.scheduler import BLOCK_TOKENS

BYTES_PER_TOKEN = 4
# Side of an image token: patches of 14, merged 2 x 2, as in Qwen2-VL.
PATCH_PIXELS = 28
UNKNOWN_IMAGE_TOKENS = 256
# Base64 characters decoded to find a size; EXIF blocks are at most 64 KiB each.
MAX_HEAD_CHARACTERS = 1 << 18
MAX_HASHED_BLOCKS = 2048
# Members that give a grammar, besides response_format.
GRAMMARS: Final = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
FINAL_FORMAT = "bmp"  # needs no preprocessing worth counting


class RequestRefused(Exception):
    """A request that gets an error response. `kind` is vLLM's error type."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.status}}


def bad_request(message: str) -> RequestRefused:
    return RequestRefused(400, "BadRequestError", message)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A completion request in numbers. `limit`: tokens to generate; `pixels`: those that need preprocessing."""

    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    prompt: int
    limit: int
    finish: str  # "length" if the client set the limit, else "stop"
    pixels: int
    blocks: tuple[int, ...]
    digest: str
    base64_floats: bool = False
    priority: int = 0
    grammar: bool = False
    tools: bool = False


def parse_request(
    route: str, body: bytes, models: Sequence[str], seed: int, capacity: int | None, unasked: int = 0
) -> CompletionRequest:
    """Parse a body sent to `route` ("chat", "completions", "embeddings"). Raises RequestRefused.

    The first of `models` serves requests that name none. `capacity` limits prompt and output tokens together; None is
    unlimited. An answer without a limit has `unasked` tokens; 0: a seeded number.
    """
    payload = _payload(body, models)
    parts = _PROMPTS[route](payload)
    text, prompt, pixels = _measure(parts)
    digest = hashlib.blake2b(text, digest_size=16).hexdigest()
    limit, finish = _limit(route, payload, random.Random(f"{seed}:{digest}:length"), unasked)
    if capacity is not None and prompt + limit > capacity:
        raise bad_request(
            f"This model's maximum context length is {capacity} tokens. However, you requested {limit} output "
            f"tokens and your prompt contains {prompt} input tokens."
        )
    options = payload.get("stream_options") or {}
    if not isinstance(options, dict):
        raise bad_request("stream_options must be an object")
    include = bool(options.get("include_usage"))
    return CompletionRequest(
        model=payload.get("model") or models[0],
        stream=bool(payload.get("stream")),
        include_usage=include,
        continuous_usage=include and bool(options.get("continuous_usage_stats")),
        prompt=prompt,
        limit=limit,
        finish=finish,
        pixels=pixels,
        blocks=_block_hashes(text, prompt),
        digest=digest,
        base64_floats=payload.get("encoding_format") == "base64",
        priority=priority if isinstance(priority := payload.get("priority"), int) else 0,
        grammar=any(payload.get(name) for name in GRAMMARS) or _has_format(payload.get("response_format")),
        tools=bool(payload.get("tools")),
    )


Part = str | bytes  # text, or an image's base64 payload


NO_LIMIT: Final = (-1, -2)  # of Ollama's `num_predict`: endless, and as far as the context goes


def native_body(body: bytes) -> bytes:
    """A request to /api/chat or /api/generate in OpenAI's form; one that is no JSON object is left as it is."""
    try:
        payload = json.loads(body)
        options = payload.get("options") or {}
        asked = {name: payload[name] for name in ("model", "messages", "prompt", "tools") if name in payload}
        limit = options.get("num_predict")
        asked |= {"stream": payload.get("stream", True), "max_tokens": None if limit in NO_LIMIT else limit}
        if payload.get("format"):
            asked["response_format"] = {"type": "json_object"}
    except (ValueError, AttributeError, RecursionError):
        return body
    return json.dumps(asked).encode()


def _has_format(asked: Any) -> bool:
    return isinstance(asked, dict) and asked.get("type") not in (None, "text")


def _payload(body: bytes, models: Sequence[str]) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON") from None
    if not isinstance(payload, dict):
        raise bad_request("the body is not a JSON object")
    model = payload.get("model")
    if model and model not in models:
        raise RequestRefused(404, "NotFoundError", f"The model `{str(model)[:100]}` does not exist.")
    if payload.get("n") not in (None, 1):
        raise bad_request("the scripted engine makes one choice: n must be 1")
    return payload


def _limit(route: str, payload: dict[str, Any], rng: random.Random, unasked: int) -> tuple[int, str]:
    if route == "embeddings":
        return 0, "stop"
    asked = payload.get("max_completion_tokens")
    asked = payload.get("max_tokens") if asked is None else asked
    if asked is None:
        return unasked or rng.randint(16, 256), "stop"
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise bad_request("max_tokens must be at least 1")
    return asked, "length"


def _chat_parts(payload: dict[str, Any]) -> list[Part]:
    messages = payload.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list with at least one message")
    return [part for message in messages for part in _message_parts(message)]


def _message_parts(message: Any) -> list[Part]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad_request("a message must be an object with a role")
    content = message.get("content")
    parts: list[Part] = [f"<|{message['role']}|>\n"]
    if isinstance(content, str):
        return [*parts, content]
    return parts + [_content_part(p) for p in content if isinstance(p, dict)] if isinstance(content, list) else parts


def _content_part(part: dict[str, Any]) -> Part:
    if part.get("type") != "image_url":
        return str(part.get("text") or "")
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url.startswith("data:"):
        raise bad_request("the scripted engine takes images as data URLs only")
    return url.partition(",")[2].encode()


def _text_parts(field: str) -> Callable[[dict[str, Any]], list[Part]]:
    def parts(payload: dict[str, Any]) -> list[Part]:
        value = payload.get(field)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return ["".join(f"{v % 10_000:04d}" for v in value)]  # token ids: one token each
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return [value[0]]
        raise bad_request(f"{field} must be one text or one list of token ids")

    return parts


_PROMPTS: Final[dict[str, Callable[[dict[str, Any]], list[Part]]]] = {
    "chat": _chat_parts,
    "completions": _text_parts("prompt"),
    "embeddings": _text_parts("input"),
}


def _measure(parts: list[Part]) -> tuple[bytes, int, int]:
    """The prompt as bytes (an image as its hash, once per token), its tokens, and the pixels to preprocess."""
    text, pixels = bytearray(), 0
    for part in parts:
        if isinstance(part, str):
            text += part.encode(errors="surrogatepass")
        else:
            tokens, work = _image(part)
            text += hashlib.blake2b(part, digest_size=BYTES_PER_TOKEN).digest() * tokens
            pixels += work
    return bytes(text), max(1, -(-len(text) // BYTES_PER_TOKEN)), pixels


def _image(payload: bytes) -> tuple[int, int]:
    """Tokens of an image, and its pixels unless it needs no preprocessing."""
    try:
        head = base64.b64decode(payload[:MAX_HEAD_CHARACTERS])
    except binascii.Error:
        raise bad_request("an image is not valid base64") from None
    header = file_headers.read(head)
    if header is None or not header.width or not header.height:
        return UNKNOWN_IMAGE_TOKENS, 0
    tokens = max(1, round(header.width / PATCH_PIXELS)) * max(1, round(header.height / PATCH_PIXELS))
    return tokens, 0 if header.format == FINAL_FORMAT else header.width * header.height


def _block_hashes(text: bytes, prompt: int) -> tuple[int, ...]:
    """A hash for each whole block of the prompt, over everything up to its end."""
    width = BLOCK_TOKENS * BYTES_PER_TOKEN
    state, hashes = hashlib.blake2b(digest_size=8), []
    for at in range(0, min(prompt // BLOCK_TOKENS, MAX_HASHED_BLOCKS) * width, width):
        state.update(text[at : at + width])
        hashes.append(int.from_bytes(state.digest()))
    return tuple(hashes)
