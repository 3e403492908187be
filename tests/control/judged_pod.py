"""The control object on a simulated clock, past start-up: users, the engine's page and canaries, by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sidecar.control.state import ControlState
from sidecar.events import (
    AbortRequests,
    Admitted,
    CanaryResult,
    Delivered,
    Directing,
    EnginePauseChanged,
    FirstToken,
    RequestSize,
    Settled,
    Usage,
)
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.load.cost_model import Coefficients
from sidecar.readings import Absent, EngineSample, GpuSample, Reading, Value
from sidecar.settings import Settings
from sidecar.snapshot import RelayUse

NOTHING = Absent("not here")
WALL = 1_700_000_000.0


@dataclass
class Pod:
    """A control object on a simulated clock, past start-up and with its engine known; canaries end as `canaries` says.

    `speed`: tokens per second by which the generation counter of `page` rises.
    """

    now: float = 1000.0
    page: EngineSample | None = None
    speed: float = 0.0
    gpus: Reading[tuple[GpuSample, ...]] = NOTHING
    canaries: str = "ok"
    unanswered: bool = False
    wakes: bool = False
    resting: str = ""
    sends: int = 0  # canaries
    control: ControlState = field(init=False)
    requests: int = 0
    sent: tuple[float, float] | None = None
    ends: list[tuple[int, AbortRequests]] = field(default_factory=list)
    states: set[str] = field(default_factory=set)  # all since the last `watch`

    def __post_init__(self) -> None:
        self.control = ControlState(Settings(engine="http://engine"), Coefficients(), self.now, WALL + self.now)
        self.control.health.progress.learned.answers = 100
        self.control.health.progress.learned.measured_to = 1.0  # seconds of prefill
        self.tick(5)
        assert self.state == "idle"

    @property
    def state(self) -> str:
        return self.control.health.verdict.state

    @property
    def reason(self) -> str:
        return self.control.health.verdict.reason

    def tick(self, seconds: float = TICK_S, *moving: str) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            for id in moving:
                self.control.on_event(0, Delivered(id, self.now, 1, 4))
            self._canary()
            if self.page is not None and self.speed:
                self.page = replace(
                    self.page, generation_tokens=(self.page.generation_tokens or 0.0) + self.speed * TICK_S
                )
            page = NOTHING if self.page is None else Value(self.page, self.now)
            relay = RelayUse(0, 1, 0, 1, 0.0, 0.1)
            readings = TickReadings(
                *(page, self.gpus, NOTHING, (relay,), None, "vllm", self.unanswered, self.resting),
                is_fcfs=True,
                wakes=self.wakes,
            )
            self.control.tick(readings, self.now, WALL + self.now)
            self.states.add(self.state)
            self.ends.extend(self.control.health.take_aborts())
            if (allowed := self.control.health.canary_due()) is not None:
                self.control.health.canary_sent(self.now)
                self.sent = (self.now, allowed)
                self.sends += 1

    def _canary(self) -> None:
        if self.sent is None:
            return
        started, allowed = self.sent
        if self.canaries in ("ok", "busy") or self.now - started >= allowed:
            self.sent = None
            self.control.canary_ended(CanaryResult(self.canaries, started, self.now, allowed))  # type: ignore[arg-type]

    def admit(self, tokens: int = 500, *, most: int | None = 64, stream: bool = True, model: str = "m") -> str:
        self.requests += 1
        id = str(self.requests)
        work = RequestSize(tokens, output=64)
        self.control.on_event(0, Admitted(id, self.now, "t", model, "chat", stream, work, most, 1.0))
        return id

    def settle(self, id: str, tokens: int, first_at: float | None = None) -> None:
        """It ends well; the engine says that it had `tokens`."""
        usage = Usage(500, tokens)
        self.control.on_event(0, Settled(id, self.now, "ok", 200, usage, tokens, 4 * tokens, first_at, self.now, 0.0))

    def watch(self) -> None:
        """Forget the states that were seen."""
        self.states.clear()

    @property
    def well(self) -> bool:
        """Whether no probe has failed since the last `watch`, and no request was ended."""
        return self.states <= {"idle", "progressing", "quiet"} and not self.ends

    def decoding(self) -> str:
        id = self.admit()
        self.control.on_event(0, FirstToken(id, self.now))
        self.control.on_event(0, Delivered(id, self.now, 5, 20))
        return id

    def direct(self, what: str, on: bool) -> None:
        self.control.on_event(0, EnginePauseChanged(self.now, what, on))

    def call(self, on: bool, *, id: int = 1, taken: bool = False) -> None:
        self.control.on_event(0, Directing(self.now, id, "weight_update", on, taken))

    def until(self, state: str, most: float = 200.0) -> float:
        began = self.now
        while self.state != state and self.now - began < most:
            self.tick()
        assert self.state == state, (self.state, self.reason)
        return self.now - began
