"""Pure: requests by which an operator pauses the engine on purpose, or lets it go on. Silence in between is no hang.

vLLM 0.32: vllm/entrypoints/{serve/dev/sleep,rl/online,serve/profile,serve/elastic_ep}/api_router.py (earlier versions
have the same paths). SGLang 0.5: sglang/srt/entrypoints/http_server.py. TGI and llama.cpp have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import parse_qs

from sidecar.events import CACHE_RESET, Directing, EnginePauseChanged, Event
from sidecar.load.api_routes import decoded
from sidecar.relay.request_body import parse_object

PAUSE_METHODS: Final = ("POST", "GET", "PUT")
MAX_TAGS_BYTES: Final = 4096  # of a resuming call's body; json.loads holds the event loop for at most 1.5 ms
LAST_TAG: Final = "kv_cache"  # parts can be resumed one by one; users of both engines resume this one last

Turn = Literal["stops", "resumes", "during", "ends", "idle"]


@dataclass(frozen=True, slots=True)
class PauseRoute:
    """`what` is the exemption's code.

    A call "stops" the work until another "resumes" it, stops it "during" the call, takes long and "ends" a stop, or is
    refused unless the engine is "idle": that is no pause, and excuses no silence.
    """

    what: str
    turn: Turn
    shown: bool = False  # in the engine's own state


_PATHS: Final[tuple[tuple[str, Turn, str], ...]] = (
    ("engine_sleeping", "stops", "/sleep /release_kv_cache_memory /release_memory_occupation"),
    ("engine_sleeping", "resumes", "/wake_up /resume_memory_occupation"),
    ("engine_paused", "stops", "/pause /pause_generation"),
    ("engine_paused", "resumes", "/resume /continue_generation"),
    ("engine_paused", "during", "/scale_elastic_ep"),
    ("engine_profiling", "stops", "/start_profile"),
    ("engine_profiling", "ends", "/stop_profile"),  # writing the profile stops the world for longest
    ("weight_update", "stops", "/start_weight_update /start_draft_weight_update /begin_weight_update"),
    ("weight_update", "resumes", "/finish_weight_update /end_weight_update"),
    # vLLM's (/update_weights was also SGLang's), then SGLang's
    ("weight_update", "during", "/init_weight_transfer_engine /shutdown_weight_transfer_engine /update_weights"),
    ("weight_update", "during", "/weight_checker"),
    ("weight_update", "during", "/update_weights_from_disk /update_weights_from_tensor /update_weights_from_ipc"),
    ("weight_update", "during", "/update_weights_from_distributed /init_weights_update_group /weights_checker"),
    ("weight_update", "during", "/destroy_weights_update_group /send_weights_to_remote_instance"),
    ("weight_update", "during", "/init_weights_send_group_for_remote_instance"),
)
# What /is_sleeping and /is_paused report; they do not report released memory.
_SHOWN: Final = ("/sleep", "/pause")
PAUSE_ROUTES: Final = {
    path: PauseRoute(what, turn, path in _SHOWN) for what, turn, paths in _PATHS for path in paths.split()
}

# SGLang answers 400 while a request runs, and a canary is one; vLLM answers 200 and keeps its cache.
IDLE_ROUTES: Final = dict.fromkeys(("/flush_cache", "/reset_prefix_cache"), PauseRoute(CACHE_RESET, "idle"))


def route_of(method: str, path: str) -> PauseRoute | None:
    """The route of a request, or None if it neither pauses nor resumes the engine; `path` as it was sent."""
    if method not in PAUSE_METHODS:
        return None
    path = decoded(path)
    return PAUSE_ROUTES.get(path) or IDLE_ROUTES.get(path)


def is_partial(query: str, body: bytes) -> bool:
    """Whether a resuming call names parts (`tags`, in vLLM's query or SGLang's body) without the last one."""
    tags: Any = parse_qs(query).get("tags")
    if not tags and len(body) <= MAX_TAGS_BYTES:
        tags = (parse_object(body) or {}).get("tags")
    return isinstance(tags, list | str) and bool(tags) and LAST_TAG not in tags


@dataclass(slots=True)
class PauseCall:
    """One call that pauses or resumes the engine, to be closed; `route` None: neither.

    It takes effect with the engine's 2xx. From its last byte until then it is with the engine. Another answer, or a
    client that leaves, ends it without effect. `clock`: monotonic seconds; `is_partial`: it resumes some parts only.
    """

    emit: Callable[[Event], None]
    clock: Callable[[], float]
    id: int
    route: PauseRoute | None
    is_partial: bool = False
    is_with_engine: bool = False
    is_over: bool = False

    @property
    def stops_work(self) -> bool:
        """Whether no canary may be with the engine when it gets this call."""
        route = self.route
        return route is not None and route.turn in ("stops", "idle") and route.what != "engine_profiling"

    def sent(self) -> None:
        """The engine has the whole request, or will have it as soon as no canary is with it."""
        if self.route is not None and self.route.turn != "resumes" and not self.is_over and not self.is_with_engine:
            self.is_with_engine = True
            self.emit(Directing(self.clock(), self.id, self.route.what, True))

    def answered(self, status: int) -> None:
        """The head of the engine's answer arrived."""
        accepted, route = 200 <= status < 300, self.route
        if accepted and route is not None and route.turn not in ("during", "idle") and not self.is_partial:
            self.emit(EnginePauseChanged(self.clock(), route.what, route.turn == "stops", route.shown))
        self.close(accepted=accepted)

    def close(self, *, accepted: bool = False) -> None:
        """The call is over."""
        if self.is_with_engine and self.route is not None:
            self.emit(Directing(self.clock(), self.id, self.route.what, False, accepted))
        self.is_with_engine, self.is_over = False, True
