"""The sampling parameters of a request in the form that vLLM's render answers have: those that differ from defaults.

vLLM 0.32: ChatCompletionRequest.to_sampling_params, CompletionRequest.to_sampling_params and SamplingParams. A request
with anything else than the members here has none (None): its answer then is for routing, not for generating.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Floats that are always there, after the request's, the model's (generation_config.json) and these values.
NUMBERS: Final = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
}
BOUNDS: Final = {
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-9, 1e9),
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, 1 << 31),
    "min_p": (0.0, 1.0),
}
# Members that are copied if they differ from the default.
COPIED: Final = {
    "seed": None,
    "min_tokens": None,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
}
WHOLE: Final = ("n", "seed", "min_tokens", "max_tokens", "max_completion_tokens", "top_logprobs")
LENGTHS: Final = ("max_tokens", "max_completion_tokens")
# What is read elsewhere or changes nothing of what is sampled.
OTHERS: Final = frozenset(("n", "stop", "stop_token_ids", "bad_words", "stream", "logprobs", "top_logprobs"))
KNOWN: Final = OTHERS | NUMBERS.keys() | COPIED.keys() | set(LENGTHS)
COLDEST: Final = 0.01
DELTA, FINAL_ONLY = 1, 2  # vLLM's output kinds


def sampling_params(
    request: Mapping[str, Any], model_defaults: Mapping[str, Any], prompt_tokens: int, max_model_len: int, *, chat: bool
) -> dict[str, Any] | None:
    """The parameters of a checked request; None if they cannot be given exactly. `max_model_len`: 0 if not known."""
    if not max_model_len or not _is_plain(request, max_model_len, chat):
        return None
    made: dict[str, Any] = {"output_kind": DELTA if request.get("stream") else FINAL_ONLY, "skip_clone": True}
    for name, default in NUMBERS.items():
        value = request.get(name)
        value = model_defaults.get(name, default) if value is None else value
        low, high = BOUNDS[name]
        if not low <= value <= high:
            return None
        made[name] = value if name == "top_k" else float(value)
    if 0 < made["temperature"] < COLDEST:
        made["temperature"] = COLDEST
    if made["temperature"] == 0:
        del made["top_p"], made["top_k"], made["min_p"]  # vLLM sets them to their defaults
    made |= {name: request[name] for name, default in COPIED.items() if request.get(name, default) != default}
    if made.get("seed") == -1:
        del made["seed"]
    if made.get("min_tokens") == 0:
        del made["min_tokens"]
    stop = request.get("stop") or []
    made["stop"] = [stop] if isinstance(stop, str) else stop
    made["stop_token_ids"] = list(dict.fromkeys(request.get("stop_token_ids") or []))
    made["bad_words"] = list(dict.fromkeys(request.get("bad_words") or []))
    made["skip_reading_prefix_cache"] = False
    if made["stop"] and not request.get("include_stop_str_in_output"):
        made["output_text_buffer_length"] = max(map(len, made["stop"])) - 1
    if (logprobs := _logprobs(request, chat)) is not None:
        made["logprobs"] = logprobs
    made["n"] = 1 if request.get("n") is None else request["n"]
    if made["n"] < 1 or (made["n"] > 1 and made["temperature"] == 0):
        return None
    made["max_tokens"] = _max_tokens(request, model_defaults, max_model_len - prompt_tokens, chat)
    if made["max_tokens"] < 1 or made.get("min_tokens", 0) > made["max_tokens"]:
        return None
    # small whole numbers that are the default are left out
    return {name: value for name, value in made.items() if (name, value) not in LEFT_OUT or isinstance(value, float)}


LEFT_OUT: Final = (("n", 1), ("max_tokens", 16), ("top_k", 0), ("output_text_buffer_length", 0))


def _is_plain(request: Mapping[str, Any], max_model_len: int, chat: bool) -> bool:
    """Whether each member has the type that vLLM takes as it is, and none needs another."""
    given = {name: value for name, value in request.items() if value is not None}
    top, stop = given.get("top_logprobs", 0), given.get("stop", [])
    return (
        all(type(given[name]) in (int, float) for name in NUMBERS if name in given)
        and all(type(given[name]) is int for name in (*WHOLE, "top_k") if name in given)
        and all(type(given[name]) is bool for name, value in COPIED.items() if value is not None and name in given)
        and all(type(given[name]) is list for name in ("stop_token_ids", "bad_words") if name in given)
        and all(map(_is_text, [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else [None]))
        and all(map(_is_text, given.get("bad_words", [])))
        and all(type(id) is int for id in given.get("stop_token_ids", []))
        and type(given.get("stream", False)) is bool
        and type(given.get("logprobs", False if chat else 0)) is (bool if chat else int)
        and -(1 << 63) <= given.get("seed", 0) < 1 << 63
        and given.get("min_tokens", 0) >= 0
        and all(0 < given.get(name, 1) <= max_model_len for name in LENGTHS)
        and (not top or (top > 0 and bool(given.get("logprobs"))))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _logprobs(request: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return request.get("logprobs")
    return request.get("top_logprobs") or 0 if request.get("logprobs") else None


def _max_tokens(request: Mapping[str, Any], model_defaults: Mapping[str, Any], room: int, chat: bool) -> int:
    """The most tokens of an answer: what is asked for, else the model's default, and never more than fit."""
    asked = request.get("max_tokens") if chat else request.get("max_tokens", 16)
    if chat and request.get("max_completion_tokens") is not None:
        asked = request["max_completion_tokens"]
    if asked is None:
        asked = model_defaults.get("max_tokens")
    return room if asked is None else min(room, asked)
