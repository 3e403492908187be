"""Pure: the JSON and server-sent events of a completion response, in the format of vLLM 0.32.

The text is generated from the seed and a hash of the prompt: equal requests get equal answers.
"""

from __future__ import annotations

import base64
import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sidecar.tools.scripted_engine.requests import CompletionRequest

EMBEDDING_SIZE = 16
WORDS = re.findall(
    r" \w+|[,.]",
    " the of a light stone river over small and green house to morning wind in long road silver with quiet field"
    " on tall tree, near old bridge from bright window.",
)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The field names and values of one route's responses."""

    prefix: str
    whole: str
    chunk: str
    opens: bool  # the stream starts with a chunk that only names the role
    piece: Callable[[str], dict[str, Any]]
    message: Callable[[str], dict[str, Any]]


# Fields of a chat message that the scripted engine never sets.
UNSET: Final = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
CHAT: Final = AnswerForm(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    True,
    lambda text: {"delta": {"content": text}},
    lambda text: {"message": {"role": "assistant", "content": text, "tool_calls": [], **UNSET}},
)
COMPLETION: Final = AnswerForm(
    "cmpl-", "text_completion", "text_completion", False, lambda text: {"text": text}, lambda text: {"text": text}
)


def words(completion: CompletionRequest, seed: int, word: str = "") -> Callable[[int], str]:
    """A function that returns the text of the next n tokens."""
    rng = random.Random(f"{seed}:{completion.digest}:text")
    return lambda n: word * n if word else "".join(rng.choices(WORDS, k=n))


def usage(completion: CompletionRequest, generated: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": completion.prompt,
        "total_tokens": completion.prompt + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event in pydantic's JSON style: compact, not ASCII-escaped."""
    return b"data: " + json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


DONE: Final = b"data: [DONE]\n\n"


def chunk(form: AnswerForm, id: str, created: int, model: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
    return event({"id": id, "object": form.chunk, "created": created, "model": model, "choices": choices, **more})


def opening() -> dict[str, Any]:
    """The choice of the first chunk of a chat stream."""
    return {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def choice(form: AnswerForm, text: str, finish: str | None) -> dict[str, Any]:
    """The choice of a later chunk; `finish` is its finish_reason."""
    made = {"index": 0, **form.piece(text), "logprobs": None, "finish_reason": finish}
    if finish or not form.opens:
        made["stop_reason"] = None
    if not form.opens:
        made["prompt_token_ids"] = None
    return {**made, "token_ids": None}


def whole(
    form: AnswerForm, id: str, created: int, completion: CompletionRequest, text: str, used: dict[str, Any]
) -> dict[str, Any]:
    """The response to a request that does not stream."""
    made = {"index": 0, **form.message(text), "logprobs": None, "finish_reason": completion.finish}
    made |= {"stop_reason": None, "token_ids": None}
    head = {"id": id, "object": form.whole, "created": created, "model": completion.model, "choices": [made]}
    return head | {"system_fingerprint": None, "usage": used, "prompt_logprobs": None, "kv_transfer_params": None}


def embedding(id: str, created: int, completion: CompletionRequest) -> dict[str, Any]:
    """The response to an embeddings request: one vector within [-1, 1] made from the input's hash."""
    rng = random.Random(completion.digest)
    vector = [rng.uniform(-1, 1) for _ in range(EMBEDDING_SIZE)]
    packed = base64.b64encode(struct.pack(f"<{EMBEDDING_SIZE}f", *vector)).decode()
    data = {"index": 0, "object": "embedding", "embedding": packed if completion.base64_floats else vector}
    used = usage(completion, 0, 0) | {"prompt_tokens_details": None}
    return {"id": id, "object": "list", "created": created, "model": completion.model, "data": [data], "usage": used}
