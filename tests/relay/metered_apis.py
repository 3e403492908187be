"""What engines answer on each of their APIs, by their sources, for a request whose truth is known.

vLLM 0.32: entrypoints/openai/*/protocol.py, entrypoints/cohere/{protocol,serving}.py. SGLang 0.5:
srt/managers/tokenizer_manager.py. TGI 3: router/src/{lib,server}.rs. llama.cpp b10434 and the pages next to
tests/engines. Ollama: api/types.go, server/routes.go. Text Embeddings Inference: router/src/http/server.rs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

TEXT: Final = "lorem ipsum " * 400


@dataclass(frozen=True)
class Truth:
    """What the engine did: all of the prompt, the part of it from the cache, and the output."""

    prompt: int
    cached: int
    output: int

    @property
    def new(self) -> int:
        return self.prompt - self.cached


@dataclass(frozen=True)
class MeteredApi:
    """One API. `whole` and `stream` write an answer; `opens` is how a stream begins, `failure` how one fails."""

    name: str
    path: str
    body: dict[str, Any]
    whole: Callable[[Truth], Any] | None = None
    header: Callable[[Truth], dict[str, str]] = lambda truth: {}
    token: Callable[[Truth, int], bytes] | None = None  # the event of the first n tokens
    opening: Callable[[Truth], bytes] = lambda truth: b""
    closing: Callable[[Truth], bytes] = lambda truth: b""
    failure: bytes = b'data: {"error": {"message": "CUDA error", "type": "InternalServerError", "code": 500}}\n\n'
    media_type: str = "text/event-stream"
    step: int = 1  # tokens of an event
    caches: bool = True  # it reports cached tokens
    generates: bool = True
    tells: bool = True  # whole answers report the complete usage
    tells_at_once: bool = False  # a stream reports prompt and cached tokens before it ends
    truth: Truth = Truth(prompt=1200, cached=800, output=240)
    upload: bool = False  # the body is a form with a recording
    stream_path: str = ""
    streams: dict[str, Any] = field(default_factory=lambda: {"stream": True})

    def events(self, truth: Truth) -> Iterator[bytes]:
        """The tokens of a stream."""
        assert self.token is not None
        for n in range(self.step, truth.output + 1, self.step):
            yield self.token(truth, n)


def data(item: Any, name: str = "") -> bytes:
    head = b"event: %b\n" % name.encode() if name else b""
    return head + b"data: " + json.dumps(item).encode() + b"\n\n"


def line(item: Any) -> bytes:
    return json.dumps(item).encode() + b"\n"


DONE: Final = b"data: [DONE]\n\n"


def openai(truth: Truth) -> dict[str, Any]:
    details = {"cached_tokens": truth.cached}
    total = truth.prompt + truth.output
    return {
        "prompt_tokens": truth.prompt,
        "total_tokens": total,
        "completion_tokens": truth.output,
        "prompt_tokens_details": details,
    }


def responses(truth: Truth) -> dict[str, Any]:
    return {
        "input_tokens": truth.prompt,
        "input_tokens_details": {"cached_tokens": truth.cached},
        "output_tokens": truth.output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": truth.prompt + truth.output,
    }


def anthropic(truth: Truth, output: int) -> dict[str, Any]:
    counts = {"input_tokens": truth.new, "output_tokens": output}
    return counts | {"cache_creation_input_tokens": 0, "cache_read_input_tokens": truth.cached}


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}],
    }


def sglang(truth: Truth, output: int, finish: Any) -> dict[str, Any]:
    meta = {"id": "1", "finish_reason": finish, "prompt_tokens": truth.prompt, "weight_version": "default"}
    meta |= {"completion_tokens": output, "cached_tokens": truth.cached, "e2e_latency": 0.5}
    return {"text": "x" * output, "output_ids": [7] * output, "meta_info": meta}


def timings(truth: Truth) -> dict[str, Any]:
    return {"cache_n": truth.cached, "prompt_n": truth.new, "prompt_ms": 1.5, "predicted_n": truth.output}


def llamacpp(truth: Truth, text: str) -> dict[str, Any]:
    end = {"index": 0, "content": text, "tokens": [], "id_slot": 3, "stop": True, "tokens_predicted": truth.output}
    end |= {
        "tokens_evaluated": truth.prompt,
        "generation_settings": {"n_predict": 4},
        "prompt": "usage",
        "stop_type": "eos",
    }
    return end | {"tokens_cached": truth.prompt + truth.output - 1, "timings": timings(truth)}


def ollama(truth: Truth, content: dict[str, Any]) -> dict[str, Any]:
    counts = {"prompt_eval_count": truth.prompt, "prompt_eval_duration": 7, "eval_count": truth.output}
    return {
        "model": "m",
        "created_at": "2026-01-01T00:00:00Z",
        **content,
        "done": True,
        "done_reason": "stop",
        **counts,
    }


def cohere(truth: Truth) -> dict[str, Any]:
    counts = {"input_tokens": float(truth.prompt), "output_tokens": float(truth.output)}
    return {"billed_units": counts, "tokens": counts, "cached_tokens": float(truth.cached)}


CHAT: Final = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 600}
OPENED: Final = data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
OLLAMA_ERROR: Final = line({"error": "an error was encountered while running the model"})
SPEECH: Final = {"model": "m", "input": "Say something.", "voice": "v"}


def chat_end(truth: Truth) -> bytes:
    return data({"object": "chat.completion.chunk", "choices": [], "usage": openai(truth)}) + DONE


METERED: Final = (
    MeteredApi(
        "OpenAI chat",
        "/v1/chat/completions",
        CHAT,
        whole=lambda t: {"object": "chat.completion", "choices": [{"message": {"content": "x"}}], "usage": openai(t)},
        opening=lambda t: OPENED,
        token=lambda t, n: data(chunk("x")),
        closing=chat_end,
    ),
    MeteredApi(
        "OpenAI chat, speculative decoding",
        "/v1/chat/completions",
        CHAT | {"model": "speculative"},
        opening=lambda t: OPENED,
        token=lambda t, n: data(chunk("x x x x")),
        closing=chat_end,
        step=4,
    ),
    MeteredApi(
        "OpenAI chat, usage on every event",
        "/v1/chat/completions",
        CHAT,
        opening=lambda t: OPENED,
        token=lambda t, n: data(chunk("xx") | {"usage": openai(Truth(t.prompt, t.cached, n))}),
        closing=chat_end,
        step=2,
        tells_at_once=True,
        streams={"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    MeteredApi(
        "OpenAI completions",
        "/v1/completions",
        {"model": "m", "prompt": TEXT, "max_tokens": 600},
        whole=lambda t: {"object": "text_completion", "choices": [{"text": "x"}], "usage": openai(t)},
        token=lambda t, n: data({"choices": [{"index": 0, "text": "x", "finish_reason": None}], "usage": None}),
        closing=chat_end,
    ),
    MeteredApi(
        "OpenAI responses",
        "/v1/responses",
        {"model": "m", "input": TEXT, "max_output_tokens": 600},
        whole=lambda t: {
            "object": "response",
            "status": "completed",
            "error": None,
            "output": [],
            "usage": responses(t),
        },
        opening=lambda t: data({"response": {"status": "in_progress", "usage": None}}, "response.created"),
        token=lambda t, n: data({"delta": "x"}, "response.output_text.delta"),
        closing=lambda t: data({"response": {"tools": [{"usage": {}}], "usage": responses(t)}}, "response.completed"),
        failure=data({"response": {"status": "failed", "error": {"code": "server_error"}}}, "response.failed"),
    ),
    MeteredApi(
        "OpenAI embeddings",
        "/v1/embeddings",
        {"model": "m", "input": TEXT},
        whole=lambda t: {"usage": {"prompt_tokens": t.prompt, "total_tokens": t.prompt}, "data": [[0.25] * 90_000]},
        generates=False,
        caches=False,
    ),
    MeteredApi(
        "rerank, `total_tokens` only",
        "/v1/rerank",
        {"model": "m", "query": "q", "documents": [TEXT]},
        whole=lambda t: {"results": [{"index": 0, "relevance_score": 0.5}], "usage": {"total_tokens": t.prompt}},
        generates=False,
        caches=False,
    ),
    MeteredApi(
        "score, pooling, classify",
        "/v1/score",
        {"model": "m", "text_1": "a", "text_2": TEXT},
        whole=lambda t: {"data": [{"score": 0.5}], "usage": {"prompt_tokens": t.prompt, "total_tokens": t.prompt}},
        generates=False,
        caches=False,
    ),
    MeteredApi(
        "Anthropic messages",
        "/v1/messages",
        CHAT,
        whole=lambda t: {"type": "message", "content": [{"type": "text"}], "usage": anthropic(t, t.output)},
        opening=lambda t: data({"type": "message_start", "message": {"usage": anthropic(t, 0)}}, "message_start"),
        token=lambda t, n: data({"type": "content_block_delta", "delta": {"text": "x"}}, "content_block_delta"),
        closing=lambda t: (
            data({"type": "message_delta", "usage": anthropic(t, t.output)}, "message_delta")
            + data({"type": "message_stop"}, "message_stop")
        ),
        failure=data({"type": "error", "error": {"type": "api_error", "message": "CUDA error"}}, "error"),
        tells_at_once=True,
    ),
    MeteredApi(
        "SGLang generate",
        "/generate",
        {"text": TEXT, "sampling_params": {"max_new_tokens": 600}},
        whole=lambda t: sglang(t, t.output, {"type": "stop", "matched": 2}),
        token=lambda t, n: data(sglang(t, n, {"type": "length", "length": n} if n == t.output else None)),
        closing=lambda t: DONE,
        tells_at_once=True,
    ),
    MeteredApi(
        "SGLang generate, two prompts",
        "/generate",
        {"text": [TEXT, TEXT], "sampling_params": {"max_new_tokens": 600}},
        whole=lambda t: [sglang(half(t), t.output // 2, {"type": "stop"})] * 2,
        token=lambda t, n: data(
            sglang(half(t), (n + 1) // 2, {"type": "stop"} if n >= t.output - 1 else None) | {"index": n % 2}
        ),
        closing=lambda t: DONE,
        tells_at_once=True,
    ),
    MeteredApi(
        "TGI generate",
        "/generate",
        {"inputs": TEXT, "parameters": {"max_new_tokens": 600}},
        whole=lambda t: {"generated_text": "x"},
        header=lambda t: {"x-prompt-tokens": str(t.prompt), "x-generated-tokens": str(t.output)},
        token=lambda t, n: data(
            {
                "index": n,
                "token": {"id": 7, "text": "x"},
                "generated_text": None,
                "details": tgi_end(t) if n == t.output else None,
            }
        ),
        failure=data({"error": "Request failed during generation", "error_type": "generation"}),
        caches=False,
        stream_path="/generate_stream",
        streams={},
    ),
    MeteredApi(
        "llama.cpp completion",
        "/completion",
        {"prompt": TEXT, "n_predict": 600},
        whole=lambda t: llamacpp(t, "x"),
        token=lambda t, n: data(
            {
                "index": 0,
                "content": "x",
                "tokens": [7],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": n,
                "tokens_evaluated": t.prompt,
            }
        ),
        closing=lambda t: data(llamacpp(t, "")),
        failure=b'error: {"code":500,"message":"Compute error.","type":"server_error"}\n\n',
    ),
    MeteredApi(
        "llama.cpp chat, cache in `timings` only",
        "/v1/chat/completions",
        CHAT,
        whole=lambda t: {
            "choices": [],
            "usage": {"prompt_tokens": t.prompt, "completion_tokens": t.output},
            "timings": timings(t),
        },
        opening=lambda t: data({"choices": [{"delta": {"role": "assistant", "content": None}, "finish_reason": None}]}),
        token=lambda t, n: data(chunk("x")),
        closing=lambda t: (
            data({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            + data(
                {
                    "choices": [],
                    "usage": {"prompt_tokens": t.prompt, "completion_tokens": t.output},
                    "timings": timings(t),
                }
            )
            + DONE
        ),
    ),
    MeteredApi(
        "Ollama chat",
        "/api/chat",
        {"model": "m", "messages": [{"role": "user", "content": TEXT}], "options": {"num_predict": 600}},
        whole=lambda t: ollama(t, {"message": {"role": "assistant", "content": "x"}}),
        token=lambda t, n: line({"model": "m", "message": {"role": "assistant", "content": "x"}, "done": False}),
        closing=lambda t: line(ollama(t, {"message": {"role": "assistant", "content": ""}})),
        failure=OLLAMA_ERROR,
        media_type="application/x-ndjson",
        caches=False,
    ),
    MeteredApi(
        "Ollama generate",
        "/api/generate",
        {"model": "m", "prompt": TEXT, "options": {"num_predict": 600}},
        whole=lambda t: ollama(t, {"response": "x", "context": [7] * 50}),
        token=lambda t, n: line({"model": "m", "response": "x", "done": False}),
        closing=lambda t: line(ollama(t, {"response": ""})),
        failure=OLLAMA_ERROR,
        media_type="application/x-ndjson",
        caches=False,
    ),
    MeteredApi(
        "Cohere chat",
        "/v2/chat",
        CHAT,
        whole=lambda t: {"id": "1", "finish_reason": "COMPLETE", "message": {"role": "assistant"}, "usage": cohere(t)},
        opening=lambda t: data({"type": "message-start", "id": "1"}) + data({"type": "content-start", "index": 0}),
        token=lambda t, n: data({"type": "content-delta", "delta": {"message": {"content": {"text": "x"}}}}),
        closing=lambda t: (
            data({"type": "content-end", "index": 0})
            + data({"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": cohere(t)}})
            + DONE
        ),
        failure=data({"type": "message-end", "delta": {"finish_reason": "ERROR", "error": "CUDA error"}}),
    ),
    MeteredApi(
        "Text Embeddings Inference",
        "/embed",
        {"inputs": TEXT},
        whole=lambda t: [[0.25] * 768],
        header=lambda t: {"x-compute-type": "gpu+optimized", "x-compute-tokens": str(t.prompt)},
        generates=False,
        caches=False,
    ),
    MeteredApi(
        "images",
        "/v1/images/generations",
        {"model": "m", "prompt": TEXT},
        whole=lambda t: {"data": [{"b64_json": "QUJD" * 200_000}], "usage": responses(t)},
    ),
    MeteredApi(
        "transcription, usage in tokens",
        "/v1/audio/transcriptions",
        {"model": "m"},
        whole=lambda t: {
            "text": "x",
            "usage": {
                "type": "tokens",
                "input_tokens": t.prompt,
                "input_token_details": {"text_tokens": 0, "audio_tokens": t.prompt},
                "output_tokens": t.output,
                "total_tokens": t.prompt + t.output,
            },
        },
        upload=True,
        caches=False,
    ),
    MeteredApi(
        "transcription, usage in seconds",
        "/v1/audio/transcriptions",
        {"model": "m"},
        whole=lambda t: {"text": "x", "usage": {"type": "duration", "seconds": 8}},
        upload=True,
        truth=Truth(prompt=4, cached=0, output=24),
        caches=False,
        tells=False,
    ),
    MeteredApi(
        "speech",
        "/v1/audio/speech",
        SPEECH,
        whole=lambda t: b"RIFF" + bytes(9000),
        truth=Truth(prompt=4, cached=0, output=50),
        caches=False,
        tells=False,
    ),
)


def half(truth: Truth) -> Truth:
    return Truth(truth.prompt // 2, truth.cached // 2, truth.output // 2)


def tgi_end(truth: Truth) -> dict[str, Any]:
    return {"finish_reason": "length", "generated_tokens": truth.output, "seed": None, "input_length": truth.prompt}
