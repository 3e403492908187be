"""The reference of scans: the whole body by `json`, and its objects walked. It shares no code with what it checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from sidecar.events import SHORT_ROUTES
from sidecar.load.request_shape import MAX_MODEL_NAME_CHARS, RequestShape

# Keys that engines read prompts from. Everything below them counts as prompt text, token ids, or media.
_PROMPT_KEYS: Final = (
    *("messages", "prompt", "input", "inputs", "text", "system", "instructions", "tools", "suffix", "content"),
    *("input_ids", "token_ids", "prompt_token_ids", "query", "queries", "documents", "text_1", "text_2", "items"),
    *("input_prefix", "input_suffix", "input_extra"),
    *("texts", "message", "chat_history", "preamble"),
    *("state", "questions", "data_1", "data_2", "instances"),
    *("context", "template", "chat_template_kwargs", "text_input", "sentences"),
)
_PRINTED_PROMPTS: Final = ("tools", "state", "questions")
# Limits of one choice's output tokens, by precedence; nested ones are TGI's and SGLang's.
_LIMITS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "n_predict")
_OUTPUT_KEYS: Final = (*_LIMITS, "num_predict")
_OUTPUT_HOLDERS: Final = ("parameters", "sampling_params", "options")
_IMAGE_TYPES: Final = frozenset(("image_url", "input_image", "image", "image_pil", "image_embeds"))
_AUDIO_TYPES: Final = frozenset(("input_audio", "audio_url", "audio"))
_VIDEO_TYPES: Final = frozenset(("video_url", "input_video", "video"))
# Of a part, or the name of its only member if it has no type.
_MEDIA_TYPES: Final = _IMAGE_TYPES | _AUDIO_TYPES | _VIDEO_TYPES
_TEXT_KEYS: Final = ("text", "content")  # read by engines regardless of the part's type
_PRINTED_KEYS: Final = frozenset(("tools", "tool", "arguments"))  # JSON that engines print into the prompt
_SEALED_KEYS: Final = frozenset(("signature", "encrypted_content"))  # thoughts that only the engine's maker can read
_BINARY_KEYS: Final = frozenset(("data", "file_data"))  # base64 in every API: documents, files, embeddings
# Members that make a request wait for something of its own, while later ones are served: a grammar that is compiled, KV
# blocks or weights that are fetched, a slot. Those of holders are TGI's and SGLang's.
# vLLM: entrypoints/openai/chat_completion/protocol.py (earlier versions: `guided_*`); SGLang:
# srt/entrypoints/openai/protocol.py.
_GRAMMARS: Final = (
    *("response_format", "structured_outputs", "structural_tag", "json_schema", "regex", "ebnf", "grammar"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
    *("output_format", "guided_decoding"),  # Anthropic's, TensorRT-LLM's
)
_TRANSFERS: Final = (
    *("kv_transfer_params", "ec_transfer_params", "bootstrap_room", "bootstrap_host", "disaggregated_params"),
    *("lora_path", "lora_request", "lora", "adapter_id"),  # SGLang's, TensorRT-LLM's, llama.cpp's, TGI's
    *("routed_dp_rank", "data_parallel_rank"),
)
_MAX_PRIORITY: Final = (1 << 63) - 1
_LINK: Final = ("http://", "https://")
_STREAM_OPTIONS_ROUTES: Final = frozenset(("chat", "completions"))


def describe(payload: dict[str, Any] | None, route: str, body_bytes: int) -> RequestShape:
    """The shape of a request. `payload` is None if the body could not be parsed; its length then counts as text."""
    generative = route not in SHORT_ROUTES
    if payload is None:
        text_bytes = 0 if route == "transcription" else body_bytes
        return RequestShape(generative=generative, text_bytes=text_bytes, reorders=True, withholds=True)  # unknown
    model, stream, messages = payload.get("model"), _is_true(payload.get("stream")), payload.get("messages")
    choices, limit = _choices(payload), _max_output(payload)
    conversations = [item for item in messages if isinstance(item, list)] if isinstance(messages, list) else []
    prompts_, lengths = max(1, len(conversations)), [_weight(item) for item in messages] if conversations else [1]
    text_bytes = characters = token_ids = 0
    media: Counter[str] = Counter()
    fetches = False
    for value in prompt_leaves(payload):
        if isinstance(value, str):
            text_bytes += len(value) if value.isascii() else len(value.encode(errors="replace"))
            characters += len(value)
        elif isinstance(value, list):
            token_ids += len(value)
        else:
            media[value["type"]] += 1
            fetches = fetches or _is_fetched(value)
    return RequestShape(
        # JSON may hold lone surrogates, which no report can carry
        model=model[:MAX_MODEL_NAME_CHARS].encode(errors="replace").decode() if isinstance(model, str) else "",
        stream=stream,
        generative=generative,
        max_output=None if limit is None else limit * choices * prompts_,
        choices=choices,
        min_output=max(_count(h.get(key)) or 0 for h in _holders(payload) for key in ("min_tokens", "min_new_tokens"))
        if not any(_is_true(h.get("ignore_eos")) for h in _holders(payload))
        else limit or 0,
        prompts=prompts_,
        skew=_skew(prompts_, lengths, _weight(messages)),
        text_bytes=text_bytes,
        script=min(3, max(1, round(text_bytes / max(1, characters)))),
        messages=len(messages) if isinstance(messages, list) else 0,
        token_ids=token_ids,
        images=sum(media[kind] for kind in _IMAGE_TYPES) + _held(payload, "images", "image_data"),
        audios=(audios := sum(media[kind] for kind in _AUDIO_TYPES) + _held(payload, "audio_data", "audio")),
        audio_tokens=250 * audios,
        videos=(videos := sum(media[kind] for kind in _VIDEO_TYPES) + _held(payload, "video_data", "videos")),
        video_frames=videos * _frames(payload),
        video_tokens=128 * videos * _frames(payload),
        ask_usage=stream and route in _STREAM_OPTIONS_ROUTES and _lacks_usage(payload.get("stream_options")),
        priority=_priority(payload.get("priority")),
        reorders=fetches or audios > 0 or videos > 0 or _reorders(payload),
        withholds=_withholds(payload),
    )


def _held(payload: dict[str, Any], *names: str) -> int:
    """Media next to the prompt: the items of a list, or one thing that has any text."""
    values = [payload[name] for name in names if name in payload]
    return sum(len(value) if isinstance(value, list) else _weight(value) > 0 for value in values)


def _frames(payload: dict[str, Any]) -> int:
    kwargs = payload.get("media_io_kwargs")
    video = kwargs.get("video") if isinstance(kwargs, dict) else None
    return (_count(video.get("num_frames")) if isinstance(video, dict) else None) or 32


def _holders(payload: dict[str, Any]) -> list[dict[str, Any]]:
    found = [payload]
    for key in _OUTPUT_HOLDERS:
        value = payload.get(key)
        found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    return found


def _choices(payload: dict[str, Any]) -> int:
    holders = _holders(payload)
    return max(_count(holder.get(key)) or 1 for holder in holders for key in ("n", "best_of", "n_cmpl"))


def _weight(value: Any) -> int:
    """Bytes of text, at four bytes for a token id in a list."""
    found = list(leaves([value]))
    texts = sum(len(leaf.encode(errors="replace")) for leaf in found if isinstance(leaf, str))
    return texts + 4 * sum(len(leaf) for leaf in found if isinstance(leaf, list))


def _skew(prompts: int, lengths: list[int], total: int) -> float:
    """The work of attention against that of as many prompts of equal length; `total` has what is in none of them."""
    return min(prompts, max(1.0, prompts * sum(length**2 for length in lengths) / total**2)) if total else 1.0


_TRUE: Final = ("1", "t", "true", "y", "yes", "on")


def _is_true(value: Any) -> bool:
    return (
        value is True
        or value == 1
        or (isinstance(value, str) and value.lower() in ["1", "t", "true", "y", "yes", "on"])
    )


def _lacks_usage(options: Any) -> bool:
    """True if the usage was not requested. Options of a wrong type stay as they are, for the engine to reject."""
    return options is None or (isinstance(options, dict) and not options.get("include_usage"))


def _priority(value: Any) -> int:
    """The priority as engines read it, within 64 bits; 0 where it is no number."""
    try:
        return 0 if isinstance(value, bool) else max(-_MAX_PRIORITY - 1, min(_MAX_PRIORITY, int(value)))
    except (TypeError, ValueError, OverflowError):
        return 0


def _reorders(payload: dict[str, Any]) -> bool:
    """Whether an engine that serves first come, first served may serve later requests before this one."""
    holders = _holders(payload)
    if any(_is_set(holder.get(name)) for holder in holders for name in (*_GRAMMARS, *_TRANSFERS)):
        return True
    # the responses API's, Anthropic's
    formats = (payload[key].get("format") for key in ("text", "output_config") if isinstance(payload.get(key), dict))
    slot = payload.get("id_slot")  # llama.cpp's
    return any(map(_is_set, formats)) or _has_tool_grammar(payload) or (_count(slot) is not None)


def _is_set(value: Any) -> bool:
    """Whether an option asks for something: not null, false, empty, or plain text. 0 may be the name of a room."""
    if isinstance(value, dict):
        return value.get("type") != "text" and any(item is not None and item is not False for item in value.values())
    return value is not None and value is not False and value not in ("", [], "text")


def _has_tool_grammar(payload: dict[str, Any]) -> bool:
    """Whether an engine makes a grammar of the tools: one must be called, or their arguments are checked."""
    tools, choice = _tools(payload), _choice(payload)
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    strict = (holder.get("strict") for holder in (*tools, *functions) if isinstance(holder, dict))
    return bool(tools) and choice != "none" and (choice not in ("", "auto") or True in strict)


def _withholds(payload: dict[str, Any]) -> bool:
    """Whether an engine may generate tokens that it does not send: a tool's arguments, or hidden thoughts.

    vLLM hides them without `include_reasoning`, which no effort implies; SGLang holds them without `stream_reasoning`.
    """
    thinks = payload.get("include_reasoning") is not False and payload.get("stream_reasoning") is not False
    reasoning = payload.get("reasoning")  # the responses API's
    efforts = (payload.get("reasoning_effort"), reasoning.get("effort") if isinstance(reasoning, dict) else None)
    return not thinks or "none" in efforts or (bool(_tools(payload)) and _choice(payload) != "none")


def _tools(payload: dict[str, Any]) -> list[Any]:
    """The tools that a request offers; SGLang takes them from messages, too."""
    messages = payload.get("messages")
    holders = (
        [payload, *(item for item in messages if isinstance(item, dict))] if isinstance(messages, list) else [payload]
    )
    offers = (holder.get(name) for holder in holders for name in ("tools", "functions"))
    return [tool for offer in offers if isinstance(offer, list) for tool in offer]


def _choice(payload: dict[str, Any]) -> str:
    """How tools are chosen: "none", "auto", or another word where one must be called; "" if it is not said."""
    choice = payload.get("tool_choice") or payload.get("function_call") or ""
    if isinstance(choice, dict):
        choice = choice.get("type") or "function"
    return choice if isinstance(choice, str) else ""


def _is_fetched(part: dict[str, Any]) -> bool:
    """Whether the engine fetches a media part from a link."""
    sources = (part.get(key) for key in (*_MEDIA_TYPES, "url"))
    urls = (source.get("url") if isinstance(source, dict) else source for source in sources)
    return any(isinstance(url, str) and url[:8].lower().startswith(_LINK) for url in urls)


def _max_output(payload: dict[str, Any]) -> int | None:
    holders = _holders(payload)
    limits = (_count(holder.get(key)) for holder in holders for key in _OUTPUT_KEYS)
    return next((limit for limit in limits if limit is not None), None)


def _count(value: Any) -> int | None:
    """A plausible count, or None; 2^31 bounds the effect of one request on the sums."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 11:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def prompt_leaves(payload: dict[str, Any]) -> Iterator[str | list[int] | dict[str, Any]]:
    """Those of the members of a body that contain its prompt."""
    for key in _PROMPT_KEYS:
        if key in _PRINTED_PROMPTS:
            yield from _printed(payload.get(key))
        elif key in payload:
            yield from leaves([payload[key]], key == "documents")


def leaves(stack: list[Any], is_document: bool = False) -> Iterator[str | list[int] | dict[str, Any]]:
    """The texts, lists of token ids, and media parts below the values of `stack`, which is consumed from its end."""
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            numbers = [item for item in value if isinstance(item, bool | int | float)]
            if numbers:  # llama.cpp accepts texts among token ids
                yield numbers
            stack.extend(item for item in value if not isinstance(item, bool | int | float))
        elif isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind in _MEDIA_TYPES:
                yield value
                stack.extend(value[key] for key in _TEXT_KEYS if key in value)
                continue
            for key, item in value.items():
                if key in _PRINTED_KEYS or (key == "input" and kind == "tool_use"):
                    yield from _printed(item)
                elif key in _MEDIA_TYPES:
                    if item:
                        yield {"type": key}
                elif key in ("images", "multimodal_data"):
                    yield from [{"type": "image"} for _ in item] if isinstance(item, list) else ()
                elif is_document or (key not in _SEALED_KEYS and (key not in _BINARY_KEYS or kind == "text")):
                    stack.append(item)


def _printed(value: Any) -> Iterator[str]:
    """A JSON value as engines print it into a prompt, or its texts if it is nested too deeply."""
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


def images(payload: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the parts of images are, and their URLs."""
    for name in ("messages", "input"):
        messages = payload.get(name)
        for i, message in enumerate(messages if isinstance(messages, list) else ()):
            content = message.get("content") if isinstance(message, dict) else None
            for j, part in enumerate(content if isinstance(content, list) else ()):
                if isinstance(part, dict) and part.get("type") in ("image_url", "input_image"):
                    url = part.get("image_url")
                    url = url.get("url") if isinstance(url, dict) else url
                    if isinstance(url, str):
                        yield f"{name}[{i}].content[{j}]", url
