"""Pure: requests by which an operator stops the engine's work on purpose, or lets it go on; silence in between is no hang.

vLLM 0.32: vllm/entrypoints/{serve/dev/sleep,rl/online,serve/profile,serve/elastic_ep}/api_router.py (earlier versions have the
same paths). SGLang 0.5: sglang/srt/entrypoints/http_server.py. TGI and llama.cpp have none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal
from urllib.parse import parse_qs

from sidecar.errors import RequestError
from sidecar.facts import Directed, Fact

METHODS: Final = ("POST", "GET", "PUT")
LAST_TAG: Final = "kv_cache"  # of the parts that are woken one by one, both engines' users wake this one last

Turn = Literal["stops", "resumes", "during", "ends"]


@dataclass(frozen=True, slots=True)
class Row:
    """`what` is the exemption's code.

    The call "stops" the work until another one "resumes" it, stops it only "during" the call, or is long itself and "ends" a stop.
    """

    what: str
    turn: Turn


_SLEEPS: Final = Row("engine_sleeping", "stops")
_WAKES: Final = Row("engine_sleeping", "resumes")
_PAUSES: Final = Row("engine_paused", "stops")
_GOES_ON: Final = Row("engine_paused", "resumes")
_WEIGHTS: Final = Row("weight_update", "during")

PATHS: Final[dict[str, Row]] = {
    # vLLM
    "/sleep": _SLEEPS,
    "/release_kv_cache_memory": _SLEEPS,
    "/wake_up": _WAKES,
    "/pause": _PAUSES,
    "/resume": _GOES_ON,
    "/scale_elastic_ep": Row("engine_paused", "during"),
    "/start_weight_update": Row("weight_update", "stops"),
    "/start_draft_weight_update": Row("weight_update", "stops"),
    "/finish_weight_update": Row("weight_update", "resumes"),
    "/init_weight_transfer_engine": _WEIGHTS,
    "/shutdown_weight_transfer_engine": _WEIGHTS,
    "/update_weights": _WEIGHTS,  # SGLang's former name, too
    "/weight_checker": _WEIGHTS,
    # both
    "/start_profile": Row("engine_profiling", "stops"),
    "/stop_profile": Row("engine_profiling", "ends"),  # writing the profile stops the world for longest
    # SGLang
    "/release_memory_occupation": _SLEEPS,
    "/resume_memory_occupation": _WAKES,
    "/pause_generation": _PAUSES,
    "/continue_generation": _GOES_ON,
    "/begin_weight_update": Row("weight_update", "stops"),
    "/end_weight_update": Row("weight_update", "resumes"),
    "/update_weights_from_disk": _WEIGHTS,
    "/update_weights_from_tensor": _WEIGHTS,
    "/update_weights_from_distributed": _WEIGHTS,
    "/update_weights_from_ipc": _WEIGHTS,
    "/init_weights_update_group": _WEIGHTS,
    "/destroy_weights_update_group": _WEIGHTS,
    "/init_weights_send_group_for_remote_instance": _WEIGHTS,
    "/send_weights_to_remote_instance": _WEIGHTS,
    "/weights_checker": _WEIGHTS,
}


def row_of(method: str, path: str) -> Row | None:
    """The row of a request, or None where it directs nothing."""
    return PATHS.get(path) if method in METHODS else None


def in_part(query: str, body: bytes) -> bool:
    """Whether a call that resumes names parts (`tags`, in vLLM's query or SGLang's body) and the last of them is not among them."""
    tags: Any = parse_qs(query).get("tags")
    if not tags:
        try:
            payload = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return False
        tags = payload.get("tags") if isinstance(payload, dict) else None
    return bool(tags) and LAST_TAG not in tags


class Windows:
    """What was stopped by a call and has not been resumed since, as far as this relay process saw. `clock`: monotonic seconds."""

    def __init__(self, emit: Callable[[Fact], None], clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock
        self._open: set[str] = set()

    def call(self, row: Row | None, *, partly: bool = False) -> Call:
        """A call, to be entered by `with` when it is sent. `partly`: it resumes some parts only."""
        return Call(self, row, partly)

    def stop(self, what: str, *, until_resumed: bool) -> bool:
        """The work stops. Returns whether it had been stopped before."""
        before = what in self._open
        if until_resumed:
            self._open.add(what)
        self._emit(Directed(self._clock(), what, True))
        return before

    def go_on(self, what: str) -> None:
        """The work goes on."""
        self._open.discard(what)
        self._emit(Directed(self._clock(), what, False))

    def call_over(self, what: str) -> None:
        """A call that stops the work only while it lasts is over; within a wider stop that says nothing."""
        if what not in self._open:
            self.go_on(what)


class Call:
    """One call that directs, or (`row` None) one that does not."""

    def __init__(self, windows: Windows, row: Row | None, partly: bool) -> None:
        self._windows = windows
        self._row = row
        self._partly = partly
        self._stopped_before = False

    def answered(self, status: int) -> None:
        """The head of the engine's answer is here."""
        if self._row is None:
            return
        well = 200 <= status < 300
        if self._row.turn == "stops" and not well:
            self._take_back(self._row.what)
        elif self._row.turn == "resumes" and well and not self._partly:
            self._windows.go_on(self._row.what)

    def __enter__(self) -> Call:
        if self._row is not None and self._row.turn != "resumes":
            self._stopped_before = self._windows.stop(self._row.what, until_resumed=self._row.turn == "stops")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._row is None:
            return
        match self._row.turn:
            case "stops" if isinstance(
                error, RequestError
            ):  # a client that hung up takes nothing back: the engine has it
                self._take_back(self._row.what)
            case "during":
                self._windows.call_over(self._row.what)
            case "ends":
                self._windows.go_on(self._row.what)

    def _take_back(self, what: str) -> None:
        if not self._stopped_before:
            self._windows.go_on(what)
