"""Pure: requests by which an operator pauses the engine on purpose, or lets it go on. Silence in between is no hang.

vLLM 0.32: vllm/entrypoints/{serve/dev/sleep,rl/online,serve/profile,serve/elastic_ep}/api_router.py (earlier versions
have the same paths). SGLang 0.5: sglang/srt/entrypoints/http_server.py. TGI and llama.cpp have none.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import parse_qs

from sidecar.events import Directing, EnginePauseChanged, Event

PAUSE_METHODS: Final = ("POST", "GET", "PUT")
# Parts can be resumed one by one; users of both engines resume this one last.
LAST_TAG: Final = "kv_cache"

Turn = Literal["stops", "resumes", "during", "ends"]


@dataclass(frozen=True, slots=True)
class PauseRoute:
    """`what` is the exemption's code.

    A call "stops" the work until another "resumes" it, stops it "during" the call, or takes long and "ends" a stop.
    """

    what: str
    turn: Turn


_SLEEPS: Final = PauseRoute("engine_sleeping", "stops")
_WAKES: Final = PauseRoute("engine_sleeping", "resumes")
_PAUSES: Final = PauseRoute("engine_paused", "stops")
_RESUMES: Final = PauseRoute("engine_paused", "resumes")
_UPDATES_WEIGHTS: Final = PauseRoute("weight_update", "during")

PAUSE_ROUTES: Final[dict[str, PauseRoute]] = {
    # vLLM
    "/sleep": _SLEEPS,
    "/release_kv_cache_memory": _SLEEPS,
    "/wake_up": _WAKES,
    "/pause": _PAUSES,
    "/resume": _RESUMES,
    "/scale_elastic_ep": PauseRoute("engine_paused", "during"),
    "/start_weight_update": PauseRoute("weight_update", "stops"),
    "/start_draft_weight_update": PauseRoute("weight_update", "stops"),
    "/finish_weight_update": PauseRoute("weight_update", "resumes"),
    "/init_weight_transfer_engine": _UPDATES_WEIGHTS,
    "/shutdown_weight_transfer_engine": _UPDATES_WEIGHTS,
    "/update_weights": _UPDATES_WEIGHTS,  # SGLang's former name, too
    "/weight_checker": _UPDATES_WEIGHTS,
    # both
    "/start_profile": PauseRoute("engine_profiling", "stops"),
    "/stop_profile": PauseRoute("engine_profiling", "ends"),  # writing the profile stops the world for longest
    # SGLang
    "/release_memory_occupation": _SLEEPS,
    "/resume_memory_occupation": _WAKES,
    "/pause_generation": _PAUSES,
    "/continue_generation": _RESUMES,
    "/begin_weight_update": PauseRoute("weight_update", "stops"),
    "/end_weight_update": PauseRoute("weight_update", "resumes"),
    "/update_weights_from_disk": _UPDATES_WEIGHTS,
    "/update_weights_from_tensor": _UPDATES_WEIGHTS,
    "/update_weights_from_distributed": _UPDATES_WEIGHTS,
    "/update_weights_from_ipc": _UPDATES_WEIGHTS,
    "/init_weights_update_group": _UPDATES_WEIGHTS,
    "/destroy_weights_update_group": _UPDATES_WEIGHTS,
    "/init_weights_send_group_for_remote_instance": _UPDATES_WEIGHTS,
    "/send_weights_to_remote_instance": _UPDATES_WEIGHTS,
    "/weights_checker": _UPDATES_WEIGHTS,
}


def route_of(method: str, path: str) -> PauseRoute | None:
    """The route of a request, or None if it neither pauses nor resumes the engine."""
    return PAUSE_ROUTES.get(path) if method in PAUSE_METHODS else None


def is_partial(query: str, body: bytes) -> bool:
    """Whether a resuming call names parts (`tags`, in vLLM's query or SGLang's body) without the last one."""
    tags: Any = parse_qs(query).get("tags")
    if not tags:
        try:
            payload = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return False
        tags = payload.get("tags") if isinstance(payload, dict) else None
    return isinstance(tags, list | str) and bool(tags) and LAST_TAG not in tags


class PauseCalls:
    """The calls of one relay process that pause or resume the engine. `clock`: monotonic seconds."""

    def __init__(self, emit: Callable[[Event], None], clock: Callable[[], float]) -> None:
        self.emit = emit
        self.clock = clock
        self.ids = itertools.count(1)

    def call(self, route: PauseRoute | None, *, is_partial: bool = False) -> PauseCall:
        """One call, to be used in a `with`. `is_partial`: it resumes some parts only."""
        return PauseCall(self, route, is_partial)


class PauseCall:
    """One call that pauses or resumes the engine; `route` None: neither.

    It takes effect with the engine's 2xx. From its last byte until then it is with the engine. Another answer, or a
    client that leaves, ends it without effect.
    """

    def __init__(self, calls: PauseCalls, route: PauseRoute | None, is_partial: bool) -> None:
        self._calls = calls
        self._route = route
        self._is_partial = is_partial
        self._id = 0  # while it is with the engine
        self._over = route is None or route.turn == "resumes"

    def sent(self) -> None:
        """The engine has the whole request."""
        if self._over or self._route is None:
            return
        self._id = next(self._calls.ids)
        self._calls.emit(Directing(self._calls.clock(), self._id, self._route.what, True))

    def answered(self, status: int) -> None:
        """The head of the engine's answer arrived."""
        accepted = 200 <= status < 300
        if accepted and self._route is not None and self._route.turn != "during" and not self._is_partial:
            self._calls.emit(EnginePauseChanged(self._calls.clock(), self._route.what, self._route.turn == "stops"))
        self._end(accepted=accepted)

    def __enter__(self) -> PauseCall:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(accepted=False)

    def _end(self, *, accepted: bool) -> None:
        if self._id and self._route is not None:
            self._calls.emit(Directing(self._calls.clock(), self._id, self._route.what, False, accepted))
        self._id, self._over = 0, True
