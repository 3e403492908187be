"""The field's detectors, re-implemented after docs/health.md: pure state machines over what each of them can see.

Rules: a detector is polled once a second and says whether its check fails now. It is given the better of both worlds: its
detection counts from its first failing check, a false kill counts only after three failing checks in a row at kubelet's period
of 10 s (none for the detector that kills by itself).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

PERIOD = 10.0  # seconds between kubelet's probes
THRESHOLD = 3


@dataclass(frozen=True, slots=True)
class Seen:
    """What the detectors may see at `now`. Ages in seconds. `users` is what the frontend counts as outstanding."""

    now: float
    health_status: int
    health_seconds: float
    running: float
    waiting: float
    token_age: float
    loop_age: float
    chunk_age: float
    iterations: float
    users: int
    canary: Callable[[str, float], bool | None]  # (whose, limit in seconds) -> passed, failed, or still open


def vllm_health(s: Seen, memory: dict[str, float]) -> bool:
    """vLLM `/health`: the engine's own `errored` flag; kubelet waits for its answer as long as it takes."""
    return s.health_status not in (200, 0)


def kubelet_default(s: Seen, memory: dict[str, float]) -> bool:
    """`/health` under kubelet's default time limit of 1 s."""
    return s.health_status != 200 or s.health_seconds > 1.0


def vllm_decode(s: Seen, memory: dict[str, float]) -> bool:
    """vLLM PR 45526: running > 0 and the last token is older than 60 s."""
    return s.running > 0 and s.token_age > 60.0


def gonka(s: Seen, memory: dict[str, float]) -> bool:
    """gonka PR 1421: with requests, the iteration counter is frozen for 120 s."""
    if memory.get("count") != s.iterations or s.running + s.waiting == 0:
        memory["count"], memory["since"] = s.iterations, s.now
    return s.now - memory["since"] > 120.0


def sglang(s: Seen, memory: dict[str, float]) -> bool:
    """SGLang `/health_generate`: any token within 20 s of a one-token request, asked each 10 s."""
    passed = s.canary("sglang", 20.0)
    if passed is False and s.token_age > 20.0:
        memory["failing"] = 1.0
    elif passed or s.token_age <= 20.0:
        memory["failing"] = 0.0
    return bool(memory.get("failing"))


def lmdeploy(s: Seen, memory: dict[str, float]) -> bool:
    """LMDeploy: the scheduler's tick is older than 90 s."""
    return s.loop_age > 90.0


def dynamo(s: Seen, memory: dict[str, float]) -> bool:
    """Dynamo: after 10 s without a chunk a canary, whose first chunk must come within 3 s."""
    if s.chunk_age < 10.0:
        memory["failing"] = 0.0
        return False
    passed = s.canary("dynamo", 3.0)
    if passed is not None:
        memory["failing"] = float(not passed)
    return bool(memory.get("failing"))


def tensorrt(s: Seen, memory: dict[str, float]) -> bool:
    """TensorRT-LLM: the executor's loop did not come round for 300 s."""
    return s.loop_age > 300.0


CHECKS: dict[str, Callable[[Seen, dict[str, float]], bool]] = {
    "vLLM /health": vllm_health,
    "kubelet default 1 s": kubelet_default,
    "vLLM PR 45526": vllm_decode,
    "gonka PR 1421": gonka,
    "SGLang /health_generate": sglang,
    "LMDeploy 90 s": lmdeploy,
    "Dynamo canary": dynamo,
    "TensorRT-LLM 300 s": tensorrt,
}
KILLS_ITSELF = ("TensorRT-LLM 300 s",)


@dataclass(slots=True)
class Baseline:
    """One detector at work: since when its check fails, and when that would have killed."""

    name: str
    memory: dict[str, float] = field(default_factory=dict)
    failing_since: float | None = None
    killed_at: float | None = None

    def poll(self, seen: Seen) -> None:
        """One look, once a second."""
        fails = CHECKS[self.name](seen, self.memory)
        if not fails:
            self.failing_since = None
            return
        if self.failing_since is None:
            self.failing_since = seen.now
        patience = 0.0 if self.name in KILLS_ITSELF else PERIOD * (THRESHOLD - 1)
        if self.killed_at is None and seen.now - self.failing_since >= patience:
            self.killed_at = seen.now
