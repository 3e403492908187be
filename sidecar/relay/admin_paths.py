"""Pure: which requests control the engine rather than use it, and who may send them through the relay.

Rules: a client's request is refused from other machines, and passes from this one: other containers of the pod, a
trainer on the host. What only reads passes from anywhere. A path counts as engines read it: with `%73` decoded, and
below any prefix (`--root-path`).

vLLM 0.32: vllm/entrypoints/serve/. SGLang 0.5: what srt/entrypoints/http_server.py marks as for administrators.
llama.cpp: tools/server/server.cpp. Ollama: server/routes.go. TGI and Text Embeddings Inference have none.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final

from sidecar.errors import AdminPathRefused
from sidecar.load.api_routes import decoded
from sidecar.relay.engine_pauses import PAUSE_ROUTES

# With any method: SGLang takes GET for many.
_CONTROLS: Final[tuple[str, ...]] = (
    # vLLM
    "/reset_prefix_cache /reset_mm_cache /reset_encoder_cache /collective_rpc /abort_requests",
    "/v1/load_lora_adapter /v1/unload_lora_adapter /update_weight_version /fault_tolerance/apply",
    # SGLang
    "/flush_cache /clear_hicache_storage_backend /set_internal_state /set_trace_level /configure_logging",
    "/freeze_gc /slow_down /pd_role_switch /abort_request /add_external_corpus /remove_external_corpus",
    "/load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter",
    "/start_expert_distribution_record /stop_expert_distribution_record /dump_expert_distribution_record",
    # llama.cpp, then Ollama
    "/models/load /models/unload",
    "/api/pull /api/push /api/create /api/copy /api/delete",
)
CONTROL_PATHS: Final = frozenset(PAUSE_ROUTES).union(*(paths.split() for paths in _CONTROLS))
_MAX_SEGMENTS: Final = max(path.count("/") for path in CONTROL_PATHS)
# With GET they only report.
_CHANGEABLE: Final = frozenset(("/props", "/lora-adapters", "/models", "/hicache/storage-backend"))
_CHANGEABLE_FOLDERS: Final = ("/slots/", "/hicache/", "/dumper/", "/api/blobs/")
_MAX_REMEMBERED_CHARS: Final = 128
_READING_METHODS: Final = ("GET", "HEAD")


def is_control(method: str, path: str) -> bool:
    """Whether a request changes the engine for all of its users; `path` as it was sent, without the query."""
    return (_remembered if len(path) <= _MAX_REMEMBERED_CHARS else _is_control)(method, path)


def _is_control(method: str, path: str) -> bool:
    if method == "OPTIONS":  # a browser's question whether it may
        return False
    path = decoded(path)
    ends = _ends(path)
    if not CONTROL_PATHS.isdisjoint(ends):
        return True
    is_changeable = not _CHANGEABLE.isdisjoint(ends) or any(folder in path for folder in _CHANGEABLE_FOLDERS)
    return method not in _READING_METHODS and is_changeable


_remembered: Final = lru_cache(maxsize=512)(_is_control)  # most requests go to a few paths


def _ends(path: str) -> set[str]:
    """A path without the first of its segments, as often as control paths are long."""
    parts = path.split("/")
    return {"/" + "/".join(parts[-n:]) for n in range(1, _MAX_SEGMENTS + 1)}


def is_loopback(peer: str | None) -> bool:
    """Whether a peer's address is of this machine; None: it is not known."""
    try:
        address = ip_address(peer or "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def check(mode: str, method: str, path: str, peer: str | None) -> None:
    """Raise AdminPathRefused for a request that `mode`, the setting --admin-paths, keeps from the engine."""
    if mode == "refuse" and is_control(method, path) and not is_loopback(peer):
        raise AdminPathRefused(
            "this path controls the engine, and is refused from other machines; "
            "send it from the engine's own pod or host, or start the sidecar with --admin-paths pass"
        )
