"""The table of engines, and how an engine is recognised.

- A row contains only what the engine publishes. Everything else is absent (None in EngineSample), never 0.
- An unrecognised engine is `openai`: its metrics are not read, and its canary is one that any OpenAI-compatible server
  accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

from sidecar.engines.engine_type import MODELS, EngineKind, KindMark
from sidecar.engines.llamacpp import LLAMACPP
from sidecar.engines.ollama import LOADED_MODELS, OLLAMA
from sidecar.engines.openai import OPENAI
from sidecar.engines.sglang import SGLANG
from sidecar.engines.tei import TEI
from sidecar.engines.tgi import TGI
from sidecar.engines.vllm import SCRIPTED, VLLM
from sidecar.readings import EngineIdentity

# The order of recognition: vLLM's mark, /version, is the least specific, so it comes last.
KINDS: Final[dict[str, EngineKind]] = {
    kind.name: kind for kind in (SCRIPTED, SGLANG, TGI, LLAMACPP, TEI, OLLAMA, VLLM, OPENAI)
}
# Kinds whose schedulers report their steps.
PLUGIN_KINDS: Final = tuple(kind.name for kind in KINDS.values() if kind.has_plugin)
METRICS: Final = "/metrics"
FIRST_PATHS: Final = (MODELS, METRICS)
# Statuses of the model list while the engine is loading; 0: no answer.
LOADING_STATUSES: Final = (0, 500, 502, 503, 504)
# Labels on vLLM's page.
COST_FLAGS: Final = ("cache_dtype", "block_size", "enable_prefix_caching", "gpu_memory_utilization")
# vLLM's Rust front end (0.33), by its models' owner and a key of /version. It decodes no PNM, the form of prepared
# images.
RUST_OWNER: Final = "vllm-frontend-rs"
RUST_VERSION: Final = "rust_frontend_version"
MAX_MODELS: Final = 1000
# Of a model's name and of a version.
MAX_NAME_CHARS: Final = 128
MAX_FLAG_CHARS: Final = 32
FURTHER_PATHS: Final = tuple(dict.fromkeys(mark.path for kind in KINDS.values() for mark in kind.marks))
MAX_GPUS: Final = 1024
# Longer than any model's, and far from what a counter of tokens overflows at.
MAX_CONTEXT_TOKENS: Final = 1 << 30


def recognise(pages: Mapping[str, bytes]) -> str:
    """The row of KINDS that matches responses of status 200 (path -> body).

    The owner of the models decides, then the series on the metrics page, then the marks, else "openai".
    """
    owners = _owners(pages.get(MODELS, b""))
    if RUST_OWNER in owners:
        return VLLM.name
    page = pages.get(METRICS, b"")
    by_owner = (name for name, kind in KINDS.items() if kind.owner in owners)
    by_series = (name for name, kind in KINDS.items() if kind.prefix and _has_series(page, kind.prefix.encode()))
    by_mark = (
        name for name, kind in KINDS.items() if any(_has_mark(pages.get(mark.path, b""), mark) for mark in kind.marks)
    )
    return next(by_owner, None) or next(by_series, None) or next(by_mark, "openai")


def next_path(pages: Mapping[str, bytes], status: Mapping[str, int]) -> str:
    """The next path to ask for recognition; "" once nothing that exists could decide more.

    `status`: by path, of what was asked. Each request that an engine has no route for is an error in its statistics,
    so a list of models that names a foreign owner ends it.
    """
    if MODELS not in status:
        return MODELS
    if status[MODELS] in LOADING_STATUSES or recognise(pages) != "openai":
        return ""
    if METRICS not in status:
        return METRICS
    return next((path for path in _mark_paths(pages.get(MODELS, b"")) if path not in status), "")


def is_foreign(pages: Mapping[str, bytes]) -> bool:
    """Whether the list of models names an owner, and none that could be a kind of the table."""
    return bool(_owners(pages.get(MODELS, b""))) and not any(_mark_paths(pages[MODELS]))


def _mark_paths(models: bytes) -> Iterator[str]:
    """The marks worth a request. Kinds known by the owner in their list of models are excluded by a foreign one."""
    cards = _cards(models)
    own_named = any(card.get("owned_by") == card.get("id") for card in cards)
    tagged = any(":" in str(card.get("id")) for card in cards)
    for kind in KINDS.values():
        may_be = {"tgi": own_named, "ollama": tagged}.get(kind.name, False)
        if may_be or not _owners(models):
            yield from (mark.path for mark in kind.marks)


def identity(pages: Mapping[str, bytes]) -> EngineIdentity:
    """The engine's models, version, settings and sizes, from the `identity_paths` of its kind; empty if unknown."""
    listed = pages.get(MODELS) or pages.get("/models", b"")
    paths = "/info", "/props", "/version", "/server_info"
    info, props, versions, server = (_object(pages.get(path, b"")) for path in paths)
    names = [card.get("id") for card in _cards(listed)] or [info.get("served_model_name"), info.get("model_id")]
    models = tuple(name[:MAX_NAME_CHARS] for name in names[:MAX_MODELS] if isinstance(name, str))
    ollama = _object(pages.get("/api/version", b""))
    version = next(
        (
            of
            for of in (
                *(versions.get("version"), info.get("version"), server.get("version")),
                *(props.get("build_info"), ollama.get("version")),
            )
            if of
        ),
        "",
    )
    rust = RUST_OWNER in _owners(listed) or RUST_VERSION in versions
    return EngineIdentity(
        models,
        version[:MAX_NAME_CHARS] if isinstance(version, str) else "",
        flags=tuple(f"{name}={value}" for name, value in flags(pages.get(METRICS, b"")).items()),
        prepared=not rust,
        max_context=_max_context(pages),
        slots=_size(props.get("total_slots")) or _fewest_slots(listed),
        gpu_count=_gpu_count(server),
    )


def _gpu_count(server: Mapping[str, Any]) -> int:
    """The GPUs of SGLang's settings; 0 if they are not known."""
    tensor, pipeline, data = (_size(server.get(name)) for name in ("tp_size", "pp_size", "dp_size"))
    count = tensor * max(1, pipeline) * (1 if server.get("enable_dp_attention") is True else max(1, data))
    return count if count <= MAX_GPUS else 0


def _fewest_slots(models: bytes) -> int:
    """The fewest slots that llama.cpp's router gives a model, as its list says; 0 if it does not."""
    found = [_member(card.get("status"), "args") for card in _cards(models)]
    pairs = [pair for args in found if isinstance(args, list) for pair in pairwise(args)]
    return min((int(n) for flag, n in pairs if flag in ("-np", "--parallel") and str(n).isdigit()), default=0)


def _max_context(pages: Mapping[str, bytes]) -> int:
    """The longest sequence in tokens, of all models; 0 if the engine does not say."""
    cards = _cards(pages.get(MODELS, b""))
    info, props = _object(pages.get("/info", b"")), _object(pages.get("/props", b""))
    loaded = _object(pages.get(LOADED_MODELS, b"")).get("models")
    sizes = [_size(card.get("max_model_len")) for card in cards]  # vLLM, SGLang
    sizes += [_size(info.get("max_total_tokens")), _size(info.get("max_input_length"))]  # TGI; TEI
    sizes.append(_size(_member(props.get("default_generation_settings"), "n_ctx")))  # llama.cpp: of a slot
    sizes += [
        _size(_member(model, "context_length")) for model in (loaded if isinstance(loaded, list) else ())
    ]  # Ollama
    # llama.cpp whose /props is not open: what the model was trained with is a bound.
    return max(sizes) or max((_size(_member(card.get("meta"), "n_ctx_train")) for card in cards), default=0)


def flags(page: bytes) -> dict[str, str]:
    """The settings that change what a request costs, of vLLM's `cache_config_info`."""
    line = re.search(rb"(?m)^vllm:cache_config_info\{(.*)\}", page)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line[1].decode("utf-8", "replace"))) if line else {}
    return {name: labels[name][:MAX_FLAG_CHARS] for name in COST_FLAGS if name in labels}


def _cards(models: bytes) -> list[dict[str, Any]]:
    cards = _object(models).get("data")
    return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []


def _owners(models: bytes) -> set[str]:
    """All `owned_by` of a model list; empty if the body is not such a list."""
    return {owner for card in _cards(models) if isinstance(owner := card.get("owned_by"), str) and owner}


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _size(value: Any) -> int:
    """A count that an engine says; 0 if it says none."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_CONTEXT_TOKENS
    return value if is_count else 0


def _has_series(page: bytes, prefix: bytes) -> bool:
    """Whether a line of the page begins with the prefix (its colon may be `_`)."""
    return any(page.startswith(p) or b"\n" + p in page for p in (prefix, prefix.replace(b":", b"_")))


def _has_mark(body: bytes, mark: KindMark) -> bool:
    found = _object(body)
    return all(key in found and value in (None, found[key]) for key, value in mark.keys.items())


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
