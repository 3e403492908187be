"""The production control object on simulated clocks, for tests of invariants."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings

from sidecar.control import saved_state
from sidecar.control.state import ControlState
from sidecar.events import (
    Admitted,
    CanaryResult,
    Delivered,
    Directing,
    EnginePauseChanged,
    FirstToken,
    RequestBlocked,
    RequestSize,
    Settled,
)
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.health.progress import silence_limits
from sidecar.load.cost_model import Coefficients
from sidecar.readings import Absent, CoreSteps, EngineSample, GpuSample, HangSigns, Reading, Value
from sidecar.settings import Settings
from sidecar.snapshot import RelayUse

FLOOR, CAP = 4.0, 60.0
SETTINGS = Settings(engine="http://engine", silence_floor=FLOOR, silence_cap=CAP)
LIMITS = silence_limits(SETTINGS)
CO = Coefficients()
NOTHING = Absent("not here")
WALL = 1_700_000_000.0
DOWN = ("stalled", "dead")
# The same examples in each run of continuous integration; new ones elsewhere.
SEARCH = settings(max_examples=50)


@dataclass
class Pod:
    """A control object and what is around it.

    Each `tick` is half a second; `canaries` is how a canary ends, "" for not yet.
    """

    settings: Settings = SETTINGS
    now: float = 1000.0
    wall: float = WALL
    page: Reading[EngineSample] = NOTHING
    canaries: str = "ok"
    control: ControlState = field(init=False)
    open: list[str] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)
    moved: dict[str, float] = field(default_factory=dict)  # when a request last got something, by id
    ended: list[tuple[str, str]] = field(default_factory=list)  # (id, code) of all that control ended
    requests: int = 0
    sent: tuple[float, float] | None = None  # the canary under way: started, allowed
    refused: float | None = None
    unanswered: bool = False
    resting: str = ""
    xids: int = 0
    delivered_at: float = 0.0
    signs: HangSigns | None = None  # of the engine's processes, looked at now
    steps: tuple[CoreSteps, ...] | None = None  # of its cores, read now
    gpu: GpuSample | None = None  # what NVML reads now; None: nothing but XIDs

    def __post_init__(self) -> None:
        self.control = ControlState(self.settings, CO, self.now, self.wall + self.now)

    @property
    def state(self) -> str:
        return self.control.health.state.state

    # --- time ---

    def tick(self) -> str:
        """Half a second. Returns the verdict."""
        self.now += TICK_S
        self._end_canary()
        page = Value(self.page.value, self.now) if isinstance(self.page, Value) else self.page
        relay = RelayUse(0, 1, 0, len(self.open), 0.0, 0.0)
        xids = GpuSample(0, "GPU", "GPU-0", NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, ((31, self.xids),))
        gpu = self.gpu or xids
        signs = NOTHING if self.signs is None else Value(self.signs, self.now)
        readings = TickReadings(
            page,
            Value((gpu,), self.now),
            NOTHING,
            (relay,),
            self.refused,
            "vllm",
            self.unanswered,
            self.resting,
            hang_signs=signs,
            steps=NOTHING if self.steps is None else Value(self.steps, self.now),
        )
        self.control.tick(readings, self.now, self.wall + self.now)
        allowed = self.control.health.canary_due()
        if allowed is not None:
            self.control.health.canary_sent(self.now)
            self.sent = (self.now, allowed)
        return self.state

    def _end_canary(self) -> None:
        if self.sent is None:
            return
        started, allowed = self.sent
        starved = self.now - started >= allowed
        if self.canaries and (self.canaries != "starved" or starved):
            self.control.canary_ended(CanaryResult(self.canaries, started, self.now, allowed))  # type: ignore[arg-type]
            self.sent = None

    def served(self) -> Pod:
        """Past start-up, by a canary's token."""
        for _ in range(6):
            self.tick()
        assert self.state == "idle"
        return self

    # --- users ---

    def request(self, tokens: int = 500, streams: bool = True) -> None:
        """One more, through the relay."""
        self.requests += 1
        id = str(self.requests)
        self.open.append(id)
        self.moved[id] = self.now
        work = RequestSize(tokens, output=64)
        self.control.on_event(0, Admitted(id, self.now, "t", "m", "chat", streams, work, 64, 1.0))

    def deliver(self, place: int = 0, tokens: int = 1) -> None:
        """Tokens of an open request, by default the oldest."""
        if not self.open:
            return
        id = self.open[place % len(self.open)]
        if id in self.blocked:
            return
        self.control.on_event(0, FirstToken(id, self.now))
        self.control.on_event(0, Delivered(id, self.now, tokens, 4 * tokens))
        self.moved[id] = self.delivered_at = self.now

    def settle(self, outcome: str = "ok", id: str = "", tokens: int = 1) -> None:
        """A request ends, by default the oldest."""
        if not self.open:
            return
        id = id or self.open[0]
        self.open.remove(id)
        self.blocked.discard(id)
        settled = Settled(id, self.now, outcome, 200, None, tokens, 4, None, self.now, 0.0)  # type: ignore[arg-type]
        self.control.on_event(0, settled)
        if outcome == "ok":
            self.delivered_at = self.now

    def read(self, place: int, *, on: bool) -> None:
        """A client stops reading, or goes on."""
        if not self.open:
            return
        id = self.open[place % len(self.open)]
        (self.blocked.discard if on else self.blocked.add)(id)
        self.moved[id] = self.now
        self.control.on_event(0, RequestBlocked(id, self.now, on=not on))

    def take_aborts(self) -> list[tuple[str, str]]:
        """(id, code) of each request that control wants ended."""
        ends = [(id, end.code) for _, end in self.control.health.take_aborts() for id in end.ids]
        self.ended += ends
        return ends

    def on_command(self, ends: list[tuple[str, str]]) -> None:
        """What the relay does of it."""
        for id, _ in ends:
            if id in self.open:
                self.settle("stalled", id)

    # --- operators, engine, and ourselves ---

    def order(self, what: str, *, on: bool) -> None:
        """The relay saw an order that stops the engine on purpose, or lets it go on."""
        self.control.on_event(0, EnginePauseChanged(self.now, what, on))

    def call(self, id: int, what: str, *, on: bool, taken: bool) -> None:
        """A call that directs the engine is with it, or over."""
        self.control.on_event(0, Directing(self.now, id, what, on, taken and not on))

    def relay_dies(self) -> None:
        """All its requests are lost."""
        self.control.relay_lost(0, self.now)
        self.open.clear()
        self.blocked.clear()

    def restart(self, *, remembers: bool) -> None:
        """The sidecar restarts; what the old one kept goes through the form of its file."""
        kept = (
            saved_state.from_plain(saved_state.SavedState, saved_state.to_plain(self.control.save()))
            if remembers
            else None
        )
        self.control = ControlState(self.settings, CO, self.now, self.wall + self.now)
        self.sent = None
        self.open.clear()  # those of the old process's relays are not known to the new one
        self.blocked.clear()
        if kept is not None:
            self.control.restore(kept, self.now, same=True)
