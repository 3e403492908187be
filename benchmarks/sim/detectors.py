"""The field's detectors, re-implemented after docs/health.md: pure state machines over what each of them can see.

Rules: a detector is polled once a second and says whether its check fails now; its own limits are its published ones.
It is given the better of both worlds: its detection counts from its first failing check; it kills only when its checks
failed for as long as its `threshold` of probes takes (kubelet's defaults, 3 probes in 10 s each, where nothing else is
published).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

PROBE_INTERVAL_S = 10.0  # seconds between kubelet's probes, by default
PROBE_THRESHOLD = 3  # failing probes in a row, by default


@dataclass(frozen=True, slots=True)
class Seen:
    """What the detectors may see at `now`. Ages in seconds. `users` is what the frontend counts as outstanding."""

    now: float
    health_status: int  # 0: no answer at all
    health_seconds: float
    running: float
    waiting: float
    token_age: float
    loop_age: float
    chunk_age: float
    iterations: float
    users: int
    canary: Callable[[str, float], bool | None]  # (whose, limit in seconds) -> passed, failed, or still open


Fails = Callable[[Seen, dict[str, float]], bool]


def vllm_health(s: Seen, memory: dict[str, float]) -> bool:
    """The engine's own `errored` flag; the probe waits for its answer as long as it takes."""
    return s.health_status not in (200, 0)


def kubelet_default(s: Seen, memory: dict[str, float]) -> bool:
    """The same flag under kubelet's default time limit of 1 s, as llm-d's and most charts leave it."""
    return s.health_status != 200 or s.health_seconds > 1.0


def static_page(s: Seen, memory: dict[str, float]) -> bool:
    """A page that says 200 while the API process answers at all, within kubelet's default limit of 1 s."""
    return s.health_status == 0 or s.health_seconds > 1.0


def ray_serve(s: Seen, memory: dict[str, float]) -> bool:
    """The engine's flag through the replica's `check_health`, asked each 10 s with a limit of 30 s."""
    return s.health_status != 200 or s.health_seconds > 30.0


def vllm_decode(s: Seen, memory: dict[str, float]) -> bool:
    """running > 0 and the last token is older than 60 s."""
    return s.running > 0 and s.token_age > 60.0


def gonka(s: Seen, memory: dict[str, float]) -> bool:
    """With requests, the iteration counter is frozen for 120 s."""
    if memory.get("count") != s.iterations or s.running + s.waiting == 0:
        memory["count"], memory["since"] = s.iterations, s.now
    return s.now - memory["since"] > 120.0


def sglang(s: Seen, memory: dict[str, float]) -> bool:
    """Any token within 20 s of a one-token request, asked each 10 s."""
    passed = s.canary("sglang", 20.0)
    if passed is False and s.token_age > 20.0:
        memory["failing"] = 1.0
    elif passed or s.token_age <= 20.0:
        memory["failing"] = 0.0
    return bool(memory.get("failing"))


def lmdeploy(s: Seen, memory: dict[str, float]) -> bool:
    """The scheduler's tick is older than 90 s."""
    return s.loop_age > 90.0


def dynamo(s: Seen, memory: dict[str, float]) -> bool:
    """After 10 s without a chunk a canary, whose first chunk must come within 3 s."""
    if s.chunk_age < 10.0:
        memory["failing"] = 0.0
        return False
    passed = s.canary("dynamo", 3.0)
    if passed is not None:
        memory["failing"] = float(not passed)
    return bool(memory.get("failing"))


def tensorrt(s: Seen, memory: dict[str, float]) -> bool:
    """The executor's loop did not come round for 300 s."""
    return s.loop_age > 300.0


@dataclass(frozen=True, slots=True)
class Check:
    """One row: a detector's name, its check, and how its failing checks become a kill."""

    name: str
    fails: Fails
    period: float = PROBE_INTERVAL_S
    threshold: int = PROBE_THRESHOLD

    @property
    def patience(self) -> float:
        """Seconds for which a check must fail without a break before it kills."""
        return self.period * (self.threshold - 1)


CHECKS: tuple[Check, ...] = (
    Check("vLLM /health", vllm_health),
    Check("llm-d, kubelet 1 s", kubelet_default),
    Check("KServe, NIM: static page", static_page),
    Check("Ray Serve", ray_serve),
    Check("vLLM PR 45526", vllm_decode),
    Check("gonka PR 1421", gonka),
    Check("SGLang /health_generate", sglang),
    Check("LMDeploy 90 s", lmdeploy),
    Check("Dynamo canary", dynamo),
    Check("TensorRT-LLM 300 s", tensorrt, threshold=1),  # it ends its own process
)


@dataclass(slots=True)
class Baseline:
    """One detector at work: since when its check fails, and the mistakes or finds that came of it.

    `wrong`: seconds for which its kill would have stood, were nothing killed (Chen's mistake duration, of a healthy
    engine).
    """

    check: Check
    memory: dict[str, float] = field(default_factory=dict)
    failing_since: float | None = None
    killed_at: float | None = None
    wrong: float = 0.0
    _looked_at: float | None = None

    @property
    def name(self) -> str:
        return self.check.name

    def poll(self, seen: Seen) -> None:
        """One look, once a second."""
        since, self._looked_at = self._looked_at, seen.now
        if not self.check.fails(seen, self.memory):
            self.failing_since = None
            return
        if self.failing_since is None:
            self.failing_since = seen.now
        if seen.now - self.failing_since >= self.check.patience:
            self.wrong += 0.0 if since is None or self.killed_at is None else seen.now - since
            self.killed_at = seen.now if self.killed_at is None else self.killed_at
