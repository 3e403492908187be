"""Pure: the APIs of engines, one row each: its paths, and how a request's sequences are counted.

Rules:
- A path is what the engine makes of it. Starlette (vLLM, SGLang) and cpp-httplib (llama.cpp) decode `%63`, the latter
  also `%u0063`; httptools and cpp-httplib cut off a fragment; the end of a Starlette route also matches before a last
  line feed. A prefix (`--root-path`) is anything. No engine merges slashes or ignores case, but a proxy in front of one
  may: a path matched too generously here gets 404 from the engine, and a rejected request costs nothing.
- A known path is work with any method that changes something (SGLang serves `PUT /generate`), and with a body.
- Any other request with a body may be work, too: it is forwarded unread and counted by class.

vLLM 0.32: vllm/entrypoints/*/api_router.py. SGLang 0.5: srt/entrypoints/http_server.py. TGI 3: router/src/server.rs.
llama.cpp: tools/server/server.cpp. Text Embeddings Inference: router/src/http/server.rs. Ollama: server/routes.go.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Final, Literal, get_args
from urllib.parse import unquote

WORKING_METHODS: Final = ("POST", "PUT", "PATCH")

PathClass = Literal["tokenizer", "control", "files", "other"]
PATH_CLASSES: Final[tuple[PathClass, ...]] = get_args(PathClass)


@dataclass(frozen=True, slots=True)
class Api:
    """One API. `route` names it in events, reports and the readers of answers; several rows may share one.

    `ends` are ends of its paths. Each item of the lists `items` is a sequence; without any, there is one. A sequence
    begins with the texts of `shared`: the query of each pair. `output_per`: tokens of output per second of an upload of
    audio, per byte of text, or per picture (`output_of`), where answers are not as long as those to other prompts.
    """

    route: str
    ends: str  # separated by spaces
    items: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    generates: bool = True
    streams: bool = False  # default if the body does not specify it
    loads: bool = False  # a request without a prompt loads or unloads the model
    output_of: Literal["", "second", "byte", "picture"] = ""
    output_per: float = 0.0


CHAT: Final = Api("chat", "chat/completions completions/batch chat/interactive", items=("messages",))
COMPLETIONS: Final = Api("completions", "completions", items=("prompt",))
_EMBEDDINGS: Final = Api(
    "embeddings",
    "embeddings embedding embed embed_all embed_sparse encode",  # llama.cpp's, TEI's, SGLang's
    items=("input", "inputs", "content", "text", "texts", "input_ids", "prompt", "images", "messages", "instances"),
    generates=False,
)
_RERANK: Final = Api("rerank", "rerank reranking", ("documents", "texts"), ("query",), generates=False)
_SCORE: Final = Api(
    "score",
    "score generative_scoring similarity",
    ("text_2", "documents", "items", "data_2", "inputs"),
    ("text_1", "query", "queries", "data_1"),
    generates=False,
)
_GENERATE: Final = Api(
    "generate",
    "generate generate_from_file vertex_generate vertex infer",
    ("text", "inputs", "input_ids", "prompt", "instances", "messages"),
)
# A speech token of current models is 1/25 to 1/86 s, and fifteen bytes of text are spoken in a second.
_SPEECH_TOKENS_PER_BYTE: Final = 3.0
# Speech has some 150 words a minute. An hour in German gave 9,000 tokens in the field.
_TOKENS_PER_SPOKEN_SECOND: Final = 2.5
# What OpenAI's image models bill for 1024 x 1024 pixels in high quality. On an H100 (docs/decisions), it costs what 30
# steps of a diffusion model of 2.6B weights do.
_TOKENS_PER_PICTURE: Final = 4160.0

APIS: Final = (
    CHAT,
    COMPLETIONS,
    Api("responses", "responses responses/compact"),
    Api("messages", "messages"),
    _EMBEDDINGS,
    _RERANK,
    _SCORE,
    Api("pooling", "pooling", _EMBEDDINGS.items, generates=False),
    Api("classify", "classify predict", _EMBEDDINGS.items, generates=False),
    Api(
        "transcription",
        "audio/transcriptions audio/translations",
        output_of="second",
        output_per=_TOKENS_PER_SPOKEN_SECOND,
    ),
    Api(
        "speech",
        "audio/speech audio/speech/batch",  # the latter is vLLM-Omni's and SGLang-Omni's
        items=("input", "items"),
        output_of="byte",
        output_per=_SPEECH_TOKENS_PER_BYTE,
    ),
    Api(
        "images",
        "images/generations images/edits images/variations",
        output_of="picture",
        output_per=_TOKENS_PER_PICTURE,
    ),
    _GENERATE,
    Api("generate", "generate_stream", _GENERATE.items, streams=True),  # TGI's
    Api("llamacpp_completion", "completion infill", ("prompt",)),
    Api("ollama_chat", "api/chat", streams=True, loads=True),
    Api("ollama_generate", "api/generate", streams=True, loads=True),
    Api("cohere_chat", "v1/chat v2/chat"),
    Api("decisions", "systemone decisions", ("questions",), ("state", "instructions", "input"), generates=False),
)
# SageMaker's path accepts the bodies of all other APIs; the first matching member selects the API.
INVOCATIONS: Final = Api("generate", "invocations", _GENERATE.items)
_FORMS: Final = (
    ("messages", CHAT),
    ("query", _RERANK),
    *((name, _SCORE) for name in ("text_1", "queries", "data_1")),
    ("prompt", COMPLETIONS),
    ("input", _EMBEDDINGS),
)
# TGI's and TEI's path for any task of their model.
_ROOT: Final = Api("generate", "/", _GENERATE.items)
# Any WebSocket.
REALTIME: Final = Api("realtime", "realtime", output_of="second", output_per=_TOKENS_PER_SPOKEN_SECOND)

_BY_END: Final = {end: api for api in (*APIS, INVOCATIONS) for end in api.ends.split()}
_LONGEST_END: Final = max(end.count("/") for end in _BY_END) + 1
# The last segment of paths without GPU work: calls served by the API process's CPU, and operator commands.
_ENDS_BY_CLASS: Final[dict[PathClass, str]] = {
    "tokenizer": "tokenize detokenize tokenizer_info apply-template chat_tokenize decode count_tokens input_tokens "
    "render derender parse_function_call",
    "control": "cancel",
    "files": "files uploads batches preprocess",
}
_CLASSES: Final = {end: name for name, ends in _ENDS_BY_CLASS.items() for end in ends.split()}
_UNICODE_ESCAPE: Final = re.compile(r"%u([0-9A-Fa-f]{4})")


def api_of(method: str, path: str, *, has_body: bool) -> Api | None:
    """The API of a request to `path` (raw, without the query); None if it is not a known API."""
    if not has_body and method not in WORKING_METHODS:
        return None
    head, _, last = path.rpartition("/")
    if usual := _BY_END.get(f"{head.rpartition('/')[2]}/{last}"):
        return usual
    segments = _segments(path)
    if not segments:
        return _ROOT
    ends = ("/".join(segments[-n:]) for n in range(_LONGEST_END, 0, -1))
    return next((_BY_END[end] for end in ends if end in _BY_END), None)


def of_form(api: Api, members: Container[str]) -> Api:
    """The API of a body with these `members`, if its path serves several."""
    if api is not INVOCATIONS:
        return api
    return next((form for name, form in _FORMS if name in members), api)


def path_class(path: str) -> PathClass:
    """The class of a path without a known API, as a label."""
    segments = _segments(path)
    return _CLASSES.get(segments[-1], "other") if segments else "other"


def decoded(path: str) -> str:
    """A path as engines decode it: without a fragment, escapes, and a last line feed."""
    path = path.partition("#")[0]
    if "%" in path:
        path = unquote(_UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), path))
    return path.removesuffix("\n")


def _segments(path: str) -> list[str]:
    """The segments of a path in lower case, without empty ones and parameters (`;`)."""
    path = decoded(path)
    if ";" in path:
        path = "/".join(segment.partition(";")[0] for segment in path.split("/"))
    return [segment for segment in path.lower().strip().split("/") if segment]
