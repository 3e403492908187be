"""Pure: the shape of a request, read from its body. Numbers and the model's name only, no content."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from sidecar.load.api_routes import Api
from sidecar.load.body_scan import TOO_LONG, BodyScan
from sidecar.load.found import Found, Items
from sidecar.load.request_keys import (
    CHOICE_KEYS,
    FORMAT_HOLDERS,
    GRAMMARS,
    LEAST_OUTPUT_KEYS,
    OUTPUT_HOLDERS,
    OUTPUT_KEYS,
    TRANSFERS,
)
from sidecar.load.sequences import sequences_of

_WAITED_FOR: Final = frozenset((*GRAMMARS, *TRANSFERS))
_MAX_PRIORITY: Final = (1 << 63) - 1
_STREAM_OPTIONS_ROUTES: Final = frozenset(("chat", "completions"))
MAX_MODEL_NAME_CHARS: Final = 128
# Of a picture: its size in pixels, the steps that its usual price is of, and the bounds of what a client may name.
_SIZE: Final = re.compile(r"(\d{2,5})[xX](\d{2,5})")
USUAL_STEPS: Final = 30
MAX_PICTURE_SHARE: Final = 64.0
_TRUE: Final = frozenset(("1", "t", "true", "y", "yes", "on"))
_MAX_DIGITS: Final = 11
DEFAULT_VIDEO_FRAMES: Final = 32  # vLLM's
DEFAULT_FRAME_TOKENS: Final = 128  # where the model's processor is not known: 256 a step of two frames (Qwen2-VL)
EMBEDDED_TOKEN_BYTES: Final = 8192  # 4096 numbers of 16 bits: models of 7B to 14B weights
AUDIO_TOKENS_PER_S: Final = 25.0  # Qwen2-Audio
DEFAULT_AUDIO_TOKENS: Final = 250  # ten seconds, of a recording whose length is not known

Options = Mapping[str, Any]  # members of a body, or of an object in it


class RequestShape(msgspec.Struct, frozen=True, gc=False):
    """What a request asks for. `text_bytes` is UTF-8 prompt text, `max_output` the client's limit over all sequences.

    `prompts`, `skew` and `audio_seconds` are those of RequestSize; each prompt gives `choices` answers. The engine
    computes the text of the body `repeated` times. `min_output`: tokens that each answer has at least. `told_output`:
    output tokens implied by the input, for answers that are not text; 0: they are learned.

    `script` is the rounded number of bytes per character: 1 for Latin, 2 for Greek, Cyrillic or Arabic, 3 for Chinese,
    Japanese or Korean. `priority`, `reorders` and `withholds` are those of events.Admitted.
    """

    model: str = ""
    stream: bool = False
    generative: bool = True
    max_output: int | None = None
    min_output: int = 0
    choices: int = 1
    text_bytes: int = 0
    prompts: int = 1
    skew: float = 1.0
    repeated: float = 1.0
    audio_seconds: float = 0.0
    told_output: int = 0
    script: int = 1
    messages: int = 0
    token_ids: int = 0
    images: int = 0
    audios: int = 0
    audio_tokens: int = 0  # of these, by their lengths as far as known
    videos: int = 0
    video_frames: int = 0  # that the engine samples
    video_tokens: int = 0  # of these, by their sizes as far as known
    video_text: int = 0  # tokens of text that the engine puts around them
    ask_usage: bool = False  # add the usage option to a stream, as the client did not
    priority: int = 0
    reorders: bool = False
    withholds: bool = False


def describe(scan: BodyScan | None, api: Api, body_bytes: int, sounds: Sequence[float] = ()) -> RequestShape:
    """The shape of a request. `scan` is None if the body was not read; its length then counts as text.

    `sounds`: seconds of the recordings in it whose length is known.
    """
    if scan is None:
        return RequestShape(generative=api.generates, text_bytes=body_bytes, reorders=True, withholds=True)  # unknown
    found, options = scan.found, scan.options
    model, stream = options.get("model"), _is_true(options.get("stream", api.streams))
    holders, sequences = _holders(options), sequences_of(found.items, api)
    choices, limit = max(_counts(holders, CHOICE_KEYS), default=0) or 1, next(iter(_counts(holders, OUTPUT_KEYS)), None)
    if api.loads and not found.text_bytes and not found.token_ids and not found.images:
        limit = 0
    videos = found.videos + _items(found.items, "video_data", "videos")
    return RequestShape(
        # JSON may hold lone surrogates, which no report can carry
        model=model[:MAX_MODEL_NAME_CHARS].encode(errors="replace").decode() if isinstance(model, str) else "",
        stream=stream,
        generative=api.generates,
        max_output=None if limit is None else limit * choices * sequences.prompts,
        min_output=_min_output(holders, limit),
        choices=choices,
        text_bytes=found.text_bytes + sequences.repeated,
        prompts=sequences.prompts,
        skew=sequences.skew,
        repeated=1 + sequences.repeated / max(1, found.text_bytes),
        told_output=_told_output(api, found, options, choices),
        script=min(3, max(1, round(found.text_bytes / max(1, found.characters)))),
        messages=found.messages,
        token_ids=found.token_ids + _embedded_tokens(found.items),
        images=found.images + _items(found.items, "images", "image_data"),
        audios=audios_of(found),
        audio_tokens=round(AUDIO_TOKENS_PER_S * sum(sounds)) + DEFAULT_AUDIO_TOKENS * (audios_of(found) - len(sounds)),
        videos=videos,
        video_frames=videos * _frames(options) if videos else 0,
        video_tokens=DEFAULT_FRAME_TOKENS * videos * _frames(options) if videos else 0,
        ask_usage=stream and api.route in _STREAM_OPTIONS_ROUTES and _lacks_usage(options.get("stream_options")),
        priority=_priority(options.get("priority")),
        # a sound or a video is decoded by the engine's API process, while later requests pass it
        reorders=bool(found.fetches or audios_of(found) or videos)
        or _reorders(options, holders)
        or _has_tool_grammar(scan),
        withholds=_withholds(scan),
    )


def _told_output(api: Api, found: Found, options: Mapping[str, Any], choices: int) -> int:
    """Tokens of an answer that is as long as its prompt's text, or as its pictures."""
    if api.output_of == "picture":
        share = picture_share(options.get("size"), options.get("num_inference_steps"))
        return max(1, round(api.output_per * choices * share))
    return round(api.output_per * (found.text_bytes if api.output_of == "byte" else choices))


def picture_share(size: Any, steps: Any) -> float:
    """The work of a picture, of that of one with 1024 x 1024 pixels in 30 steps. Neither may be named, or be odd."""
    sides = _SIZE.fullmatch(size) if isinstance(size, str) else None
    area = int(sides[1]) * int(sides[2]) / 1024**2 if sides else 1.0
    count = steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else USUAL_STEPS
    return min(MAX_PICTURE_SHARE, max(1 / MAX_PICTURE_SHARE, area * count / USUAL_STEPS))


def _embedded_tokens(items: Mapping[str, Items]) -> int:
    """Tokens of prompts that are vectors: SGLang's are lists, vLLM's tensors in base64."""
    vectors, tensors = items.get("input_embeds"), items.get("prompt_embeds")
    tokens = vectors.number if vectors is not None else 0
    return tokens + (tensors.weight * 3 // 4 // EMBEDDED_TOKEN_BYTES if tensors is not None else 0)


def audios_of(found: Found) -> int:
    """The recordings in a body."""
    return found.audios + _items(found.items, "audio_data", "audio")


def _items(items: Mapping[str, Items], *names: str) -> int:
    """What some members hold: the items of a list, or one."""
    return sum(items[name].number or 1 for name in names if name in items)


def _counts(holders: list[Options], keys: tuple[str, ...]) -> list[int]:
    """The counts that options of these names state, by precedence."""
    found = [holder[key] for holder in holders for key in keys if key in holder]
    return [count for value in found if (count := _count(value)) is not None]


def _frames(options: Options) -> int:
    """Frames that an engine samples from each video."""
    kwargs = options.get("media_io_kwargs")
    video = kwargs.get("video") if isinstance(kwargs, dict) else None
    return (_count(video.get("num_frames")) if isinstance(video, dict) else None) or DEFAULT_VIDEO_FRAMES


def _lacks_usage(options: Any) -> bool:
    """True if the usage was not requested. Options of a wrong type stay as they are, for the engine to reject.

    Options that do not name it stay as well: vLLM's default is to send it then.
    """
    return options is None or (isinstance(options, dict) and not options.get("include_usage", True))


def _priority(value: Any) -> int:
    """The priority as engines read it, within 64 bits; 0 where it is no number."""
    if value is None:
        return 0
    try:
        return 0 if isinstance(value, bool) else max(-_MAX_PRIORITY - 1, min(_MAX_PRIORITY, int(value)))
    except (TypeError, ValueError, OverflowError):
        return 0


def _reorders(options: Options, holders: list[Options]) -> bool:
    """Whether an engine that serves first come, first served may serve later requests before this one."""
    for holder in holders:
        if any(_is_set(holder[name]) for name in _WAITED_FOR.intersection(holder)):
            return True
    for key in FORMAT_HOLDERS:
        if isinstance(held := options.get(key), dict) and _is_set(held.get("format")):
            return True
    return _count(options.get("id_slot")) is not None  # llama.cpp's slot


def _holders(options: Options) -> list[Options]:
    """The objects that hold options: the body, and those of TGI and SGLang in it, which may be one per prompt."""
    holders = [options]
    for key in OUTPUT_HOLDERS:
        if (held := options.get(key)) is not None:
            holders += [item for item in (held if isinstance(held, list) else [held]) if isinstance(item, dict)]
    return holders


def _is_set(value: Any) -> bool:
    """Whether an option asks for something: not null, false, empty, or plain text. 0 may be the name of a room."""
    if isinstance(value, dict):
        return value.get("type") != "text" and any(item is not None and item is not False for item in value.values())
    return value is not None and value is not False and value not in ("", [], "text")


def _has_tool_grammar(scan: BodyScan) -> bool:
    """Whether an engine makes a grammar of the tools: one must be called, or their arguments are checked."""
    choice = _choice(scan.options)
    return scan.found.offers_tools and choice != "none" and (choice not in ("", "auto") or scan.found.is_strict)


def _withholds(scan: BodyScan) -> bool:
    """Whether an engine may generate tokens that it does not send: a tool's arguments, or hidden thoughts.

    vLLM hides them without `include_reasoning`, which no effort implies; SGLang holds them without `stream_reasoning`.
    """
    options = scan.options
    thinks = options.get("include_reasoning") is not False and options.get("stream_reasoning") is not False
    reasoning = options.get("reasoning")  # the responses API's
    efforts = (options.get("reasoning_effort"), reasoning.get("effort") if isinstance(reasoning, dict) else None)
    return not thinks or "none" in efforts or (scan.found.offers_tools and _choice(options) != "none")


def _choice(options: Options) -> str:
    """How tools are chosen: "none", "auto", or another word where one must be called; "" if it is not said."""
    choice = options.get("tool_choice") or options.get("function_call") or ""
    if isinstance(choice, dict):
        choice = choice.get("type") or "function"
    return "function" if choice is TOO_LONG else choice if isinstance(choice, str) else ""


def _min_output(holders: list[Options], limit: int | None) -> int:
    """Tokens that an answer has at least: all that it may have, where its end is ignored."""
    if limit is not None and any(_is_true(holder.get("ignore_eos")) for holder in holders):
        return limit
    return max(_counts(holders, LEAST_OUTPUT_KEYS), default=0)


def _is_true(value: Any) -> bool:
    """Whether engines parse a value as true: pydantic also accepts these texts."""
    return value is True or (value is not False and value == 1) or (isinstance(value, str) and value.lower() in _TRUE)


def _count(value: Any) -> int | None:
    """A plausible count, or None; 2^31 bounds the effect of one request on the sums. Engines parse 7.0 and "7" as 7."""
    if (isinstance(value, float) and value.is_integer()) or (
        isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < _MAX_DIGITS
    ):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None
