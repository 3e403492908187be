"""Pure: the canaries as literal rows: where each is sent, its body, and how its answer shows that the engine worked.

Forms are those of vLLM 0.33 (entrypoints/pooling, entrypoints/speech_to_text), SGLang 0.5.23
(srt/entrypoints/openai/protocol.py), llama.cpp b11549 (tools/server/README.md), Text Embeddings Inference 1.9
(router/src/http/types.rs), Infinity 0.0.77 (fastapi_schemas/pymodels.py) and Ollama (api/types.go), 2026.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

PROMPT: Final = "1"
SAMPLE_RATE: Final = 16_000
SILENCE_S: Final = 0.1
# A finish of Ollama that computed nothing.
IDLE_ENDS: Final = ("load", "unload")


@dataclass(frozen=True, slots=True, eq=False)
class CanaryRow:
    """One canary. `fields` are its body without the model.

    `routes`: the users' routes that it stands for, as load/api_routes.py names them. `works` decides whether the
    JSON of the answer shows work; None: it is a stream of one token, which takes a priority. `is_upload`: a form with a
    sound file, no JSON. `names_model`: the engine wants the model's name. `prompt_tokens` count if the answer does not
    say.
    """

    path: str
    routes: tuple[str, ...]
    fields: Mapping[str, Any]
    works: Callable[[Any], bool] | None = None
    prompt_tokens: int = 1
    is_upload: bool = False
    names_model: bool = True


def _has_rows(answer: Any) -> bool:
    """Vectors, scores or labels: a list that is not empty, alone or under a usual name."""
    if isinstance(answer, dict):
        answer = next((answer[name] for name in ("data", "results", "embeddings", "scores") if name in answer), None)
    return isinstance(answer, list) and bool(answer) and not isinstance(answer[0], str)


def _has_text(answer: Any) -> bool:
    """A transcript; that of silence is empty."""
    return isinstance(answer, dict) and isinstance(answer.get("text"), str) and not answer.get("error")


def _has_reply(answer: Any) -> bool:
    """An answer of Ollama that generated, and did not only load."""
    return isinstance(answer, dict) and answer.get("done") is True and answer.get("done_reason") not in IDLE_ENDS


_TOKEN: Final = {"max_tokens": 1, "temperature": 0, "stream": True}
_CHAT: Final = {"messages": [{"role": "user", "content": PROMPT}]}
_PAIR: Final = {"query": PROMPT, "documents": [PROMPT]}
_OPTIONS: Final = {"num_predict": 1, "temperature": 0}

# Routes of users, by what their engine must be able to do.
_COMPLETIONS: Final = ("completions", "generate", "llamacpp_completion", "ollama_generate")
_CHATS: Final = ("chat", "responses", "messages", "ollama_chat", "cohere_chat", "decisions")
_SOUND: Final = ("transcription", "realtime")

COMPLETIONS: Final = CanaryRow("/v1/completions", _COMPLETIONS, {**_TOKEN, "prompt": PROMPT})
CHAT: Final = CanaryRow(
    "/v1/chat/completions",
    _CHATS,
    {**_TOKEN, **_CHAT},
    prompt_tokens=16,  # a chat template adds some
)
EMBEDDINGS: Final = CanaryRow("/v1/embeddings", ("embeddings",), {"input": PROMPT}, _has_rows)
RERANK: Final = CanaryRow("/v1/rerank", ("rerank",), _PAIR, _has_rows, prompt_tokens=2)
SCORE: Final = CanaryRow("/v1/score", ("score",), {"text_1": PROMPT, "text_2": PROMPT}, _has_rows, prompt_tokens=2)
POOLING: Final = CanaryRow("/pooling", ("pooling",), {"input": PROMPT}, _has_rows)
CLASSIFY: Final = CanaryRow("/classify", ("classify",), {"input": [PROMPT]}, _has_rows)
CLASSIFY_V1: Final = CanaryRow("/v1/classify", ("classify",), {"input": [PROMPT]}, _has_rows)
TRANSCRIPTION: Final = CanaryRow(
    "/v1/audio/transcriptions", _SOUND, {"response_format": "json", "temperature": "0"}, _has_text, is_upload=True
)
# vLLM's name for the bound of its answer.
TRANSCRIPTION_BOUNDED: Final = CanaryRow(
    "/v1/audio/transcriptions",
    _SOUND,
    {"response_format": "json", "temperature": "0", "max_completion_tokens": "1"},
    _has_text,
    is_upload=True,
)
# Infinity without --url-prefix.
BARE_EMBEDDINGS: Final = CanaryRow("/embeddings", ("embeddings",), {"input": PROMPT}, _has_rows)
BARE_RERANK: Final = CanaryRow("/rerank", ("rerank",), _PAIR, _has_rows, prompt_tokens=2)

TEI_EMBED: Final = CanaryRow(
    "/embed", ("embeddings",), {"inputs": PROMPT, "truncate": True}, _has_rows, names_model=False
)
TEI_RERANK: Final = CanaryRow(
    "/rerank", ("rerank",), {"query": PROMPT, "texts": [PROMPT]}, _has_rows, prompt_tokens=2, names_model=False
)
TEI_PREDICT: Final = CanaryRow("/predict", ("classify",), {"inputs": PROMPT}, _has_rows, names_model=False)
TEI_SPARSE: Final = CanaryRow("/embed_sparse", ("embeddings",), {"inputs": PROMPT}, _has_rows, names_model=False)

OLLAMA_GENERATE: Final = CanaryRow(
    "/api/generate",
    (*_COMPLETIONS, *_CHATS),
    {"prompt": PROMPT, "raw": True, "stream": False, "options": _OPTIONS},
    _has_reply,
)
OLLAMA_EMBED: Final = CanaryRow("/api/embed", ("embeddings",), {"input": PROMPT}, _has_rows)


@cache
def silence() -> bytes:
    """A tenth of a second of silence as a WAV file: 16 kHz, one channel, 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLE_RATE)
        sound.writeframes(bytes(2 * int(SAMPLE_RATE * SILENCE_S)))
    return file.getvalue()
