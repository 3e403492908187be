"""The table of engines, and how an engine is recognised.

- A row contains only what the engine publishes. Everything else is absent (None in EngineSample), never 0.
- An unrecognised engine is `openai`: its metrics are not read, and its canary is one that any OpenAI-compatible server
  accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from sidecar.engines.engine_type import EngineKind, KindMark
from sidecar.engines.llamacpp import LLAMACPP
from sidecar.engines.openai import OPENAI
from sidecar.engines.sglang import SGLANG
from sidecar.engines.tgi import TGI
from sidecar.engines.vllm import SCRIPTED, VLLM
from sidecar.readings import EngineIdentity

# The order of recognition: vLLM's mark, /version, is the least specific, so it comes last.
KINDS: Final[dict[str, EngineKind]] = {kind.name: kind for kind in (SCRIPTED, SGLANG, TGI, LLAMACPP, VLLM, OPENAI)}
FIRST_PATHS: Final = ("/v1/models", "/metrics")
# Labels on vLLM's page.
COST_FLAGS: Final = ("cache_dtype", "block_size", "enable_prefix_caching", "gpu_memory_utilization")
# vLLM's Rust front end (0.33), by its models' owner and a key of /version. It decodes no PNM, the form of prepared
# images.
RUST_OWNER: Final = "vllm-frontend-rs"
RUST_VERSION: Final = "rust_frontend_version"
NO_PNM: Final = "images pass as they came: vLLM's Rust front end does not read the form in which prepared ones are sent"
MAX_MODELS: Final = 1000
# Of a model's name and of a version.
MAX_NAME_CHARS: Final = 128
MAX_FLAG_CHARS: Final = 32
FURTHER_PATHS: Final = tuple(mark.path for kind in KINDS.values() for mark in kind.marks)


def recognise(pages: Mapping[str, bytes]) -> str:
    """The row of KINDS that matches responses of status 200 (path -> body).

    The owner of the models decides, then the series on the metrics page, then the marks, else "openai".
    """
    owners = _owners(pages.get("/v1/models", b""))
    page = pages.get("/metrics", b"")
    by_owner = (name for name, kind in KINDS.items() if kind.owner in owners)
    by_series = (name for name, kind in KINDS.items() if kind.prefix and _has_series(page, kind.prefix.encode()))
    by_mark = (
        name for name, kind in KINDS.items() if any(_has_mark(pages.get(mark.path, b""), mark) for mark in kind.marks)
    )
    return next(by_owner, None) or next(by_series, None) or next(by_mark, "openai")


def identity(pages: Mapping[str, bytes]) -> EngineIdentity:
    """The engine's models, version and settings, from /v1/models, /version and /metrics; empty if unknown."""
    cards = _object(pages.get("/v1/models", b"")).get("data")
    names = [card.get("id") for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    versions = _object(pages.get("/version", b""))
    version = versions.get("version")
    rust = RUST_OWNER in _owners(pages.get("/v1/models", b"")) or RUST_VERSION in versions
    models = tuple(name[:MAX_NAME_CHARS] for name in names[:MAX_MODELS] if isinstance(name, str))
    settings = tuple(f"{name}={value}" for name, value in flags(pages.get("/metrics", b"")).items())
    return EngineIdentity(
        models, version[:MAX_NAME_CHARS] if isinstance(version, str) else "", flags=settings, prepared=not rust
    )


def flags(page: bytes) -> dict[str, str]:
    """The settings that change what a request costs, of vLLM's `cache_config_info`."""
    line = re.search(rb"(?m)^vllm:cache_config_info\{(.*)\}", page)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line[1].decode("utf-8", "replace"))) if line else {}
    return {name: labels[name][:MAX_FLAG_CHARS] for name in COST_FLAGS if name in labels}


def _owners(body: bytes) -> set[str]:
    """All `owned_by` of a model list; empty if the body is not such a list."""
    try:
        return {card["owned_by"] for card in _object(body)["data"]} - {""}
    except (KeyError, TypeError):
        return set()


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
