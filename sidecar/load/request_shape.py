"""Pure: the size and manner of a request, read from its parsed body. Numbers and the model's name only, no content.

Rules: whether a string is text or media follows from where it stands, as it does for engines, and never from what it
says, so that no text can pass for something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

# Where engines take prompts from. Everything below these keys counts as prompt text, token ids, or images.
_PROMPT_KEYS: Final = (
    "messages", "prompt", "input", "inputs", "text", "system", "instructions", "tools", "suffix", "content",
    "input_ids", "token_ids", "prompt_token_ids", "query", "queries", "documents", "text_1", "text_2", "items",
    "input_prefix", "input_suffix",
)  # fmt: skip
# Most output tokens of one choice, in the order in which they count; nested ones are TGI's and SGLang's.
_OUTPUT_KEYS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "n_predict")
_OUTPUT_HOLDERS: Final = ("parameters", "sampling_params")
_IMAGE_TYPES: Final = frozenset(("image_url", "input_image", "image", "image_pil", "image_embeds"))
_AUDIO_TYPES: Final = frozenset(("input_audio", "audio_url", "audio"))
_VIDEO_TYPES: Final = frozenset(("video_url", "input_video", "video"))
_MEDIA_TYPES: Final = _IMAGE_TYPES | _AUDIO_TYPES | _VIDEO_TYPES  # of a part, or of its one member where it has no type
_TEXT_KEYS: Final = ("text", "content")  # read by engines whatever type they stand next to
_PRINTED_KEYS: Final = frozenset(("tools", "tool", "arguments"))  # JSON that engines print into the prompt
_BINARY_KEYS: Final = frozenset(
    ("data", "file_data")
)  # base64 in every API that has them: documents, files, embeddings
_NOT_GENERATIVE: Final = frozenset(("embeddings", "rerank", "score", "pooling", "classify"))
_STREAM_OPTIONS_ROUTES: Final = frozenset(("chat", "completions"))  # routes that know stream_options
MAX_MODEL_NAME_CHARS: Final = 128  # characters kept of a model's name


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What a request asks for. `text_bytes` is UTF-8 prompt text, `max_output` the client's limit over all choices.

    `script`: bytes per character, rounded: 1 for Latin letters, 2 for Greek, Cyrillic or Arabic, 3 for Chinese, Japanese or Korean.
    """

    model: str = ""
    stream: bool = False
    generative: bool = True
    max_output: int | None = None
    choices: int = 1
    text_bytes: int = 0
    script: int = 1
    messages: int = 0
    token_ids: int = 0
    images: int = 0
    audios: int = 0
    videos: int = 0
    ask_usage: bool = False  # whether we have to ask for the usage of a stream, because the client did not


def describe(
    payload: dict[str, Any] | None, route: str, body_bytes: int, read: Callable[[str], str] = str
) -> RequestShape:
    """The shape of a request. `payload` is None where the body could not be parsed: its length stands for its text.

    `read`: a text of the payload -> what its client wrote there.
    """
    generative = route not in _NOT_GENERATIVE
    if payload is None:
        return RequestShape(generative=generative, text_bytes=0 if route == "audio" else body_bytes)
    model, stream = payload.get("model"), payload.get("stream") is True
    choices = _count(payload.get("n")) or 1
    limit = _max_output(payload)
    text_bytes, characters, token_ids, images, audios, videos = _measure(prompts(payload), read)
    messages = payload.get("messages")
    return RequestShape(
        model=read(model)[:MAX_MODEL_NAME_CHARS] if isinstance(model, str) else "",
        stream=stream,
        generative=generative,
        max_output=None if limit is None else limit * choices,
        choices=choices,
        text_bytes=text_bytes,
        script=min(3, max(1, round(text_bytes / max(1, characters)))),
        messages=len(messages) if isinstance(messages, list) else 0,
        token_ids=token_ids,
        images=images,
        audios=audios,
        videos=videos,
        ask_usage=stream and route in _STREAM_OPTIONS_ROUTES and _usage_is_ours_to_ask(payload.get("stream_options")),
    )


def _usage_is_ours_to_ask(options: Any) -> bool:
    """Options of a wrong type are the engine's to refuse, so they stay as they are."""
    return options is None or (isinstance(options, dict) and not options.get("include_usage"))


def _max_output(payload: dict[str, Any]) -> int | None:
    holders = [payload, *(payload[key] for key in _OUTPUT_HOLDERS if isinstance(payload.get(key), dict))]
    limits = (_count(holder.get(key)) for holder in holders for key in _OUTPUT_KEYS)
    return next((limit for limit in limits if limit is not None), None)


def _count(value: Any) -> int | None:
    """A plausible count, or None: 2^31 bounds what one request can do to our sums."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def prompts(payload: dict[str, Any]) -> list[Any]:
    """The members of a body that hold its prompt."""
    return [{key: payload[key] for key in _PROMPT_KEYS if key in payload}]


def _measure(stack: list[Any], read: Callable[[str], str]) -> tuple[int, int, int, int, int, int]:
    """(UTF-8 bytes of text, its characters, token ids, images, audio, videos) below the given values."""
    size = characters = token_ids = images = audios = videos = 0
    for value in leaves(stack, read):
        if isinstance(value, str):
            size += len(value) if value.isascii() else len(value.encode(errors="replace"))
            characters += len(value)
        elif isinstance(value, list):
            token_ids += len(value)
        elif value["type"] in _AUDIO_TYPES:
            audios += 1
        elif value["type"] in _VIDEO_TYPES:
            videos += 1
        else:
            images += 1
    return size, characters, token_ids, images, audios, videos


def leaves(stack: list[Any], read: Callable[[str], str] = str) -> Iterator[str | list[int] | dict[str, Any]]:
    """The texts, lists of token ids, and parts of other media below the given values, which are used up; the last come first."""
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield read(value)
        elif isinstance(value, list):
            kinds = set(map(type, value))
            if int not in kinds:
                stack.extend(value)
            elif len(kinds) == 1:
                yield value
            else:  # llama.cpp takes texts among token ids
                yield [item for item in value if type(item) is int]
                stack.extend(item for item in value if type(item) is not int)
        elif isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind in _MEDIA_TYPES:
                yield value
                stack.extend(value[key] for key in _TEXT_KEYS if key in value)
                continue
            for key, item in value.items():
                if key in _PRINTED_KEYS or (key == "input" and kind == "tool_use"):
                    yield from map(read, _printed(item))
                elif key in _MEDIA_TYPES:
                    if item:
                        yield {"type": key}
                elif key not in _BINARY_KEYS or kind == "text":
                    stack.append(item)


def _printed(value: Any) -> Iterator[str]:
    """A JSON value as engines print it into a prompt, or its texts where it is nested too deep for that."""
    if value is None or isinstance(value, str):
        yield value or ""
        return
    try:
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                stack += value
            else:
                yield str(value)
