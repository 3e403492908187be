"""The pictures of docs/verdict.md, drawn by what decides in production: a silence in time, the balance, a queue.

`docs/generate.py` writes them. Colours are chosen for light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sidecar.events import CanaryResult
from sidecar.health.canary_schedule import canary_allowed
from sidecar.health.latency_model import UNKNOWN_SLOWNESS, LatencyModel
from sidecar.health.probes import FAILS
from sidecar.health.progress import (
    LEARNED_ANSWERS,
    Progress,
    UnreadWork,
    allowed_silence,
    early_prefill,
    silence_limits,
)
from sidecar.health.token_balance import TokenBalance
from sidecar.health.verdict import VerdictInputs, VerdictState, is_canary_due, judge
from sidecar.load.cost_model import Coefficients, RequestSize, terms
from sidecar.readings import EngineSample
from sidecar.settings import Settings

WIDTH: Final = 760
LEFT, RIGHT, TOP, BOTTOM = 64, 730, 46, 40  # of the plot; the bottom is a margin
STYLE: Final = """\
text { font: 13px system-ui, sans-serif; fill: #57606a } .title { font-size: 15px; font-weight: 600 }
.axis { stroke: #8c959f; stroke-width: 1 } .mark { stroke: #8c959f; stroke-dasharray: 4 4 } path { fill: none }
.good { stroke: #2da44e; stroke-width: 2.5 } .bad { stroke: #e5534b; stroke-width: 2.5 }
.well { fill: #2da44e } .ill { fill: #e5534b } .soft { fill: #8c959f; opacity: .45 } .ask { fill: #4184e4 }
@media (prefers-color-scheme: dark) { text { fill: #adbac7 } }"""
# One stream whose tool call is withheld, or that is stuck, next to so many others; tokens per second of each.
OTHERS: Final = 3
PACE: Final = 20
BALANCE_S: Final = 60
PROMPT_TOKENS: Final = 4000
MAX_QUEUE: Final = 200


def drawings() -> dict[str, str]:
    """Every picture by its file's name."""
    return {"silence.svg": silence(), "balance.svg": balance(), "queue.svg": queue()}


# --- a silence in time ---


@dataclass(frozen=True, slots=True)
class Hang:
    """A hang of a learned engine during one stream, judged twice a second: when what happened, in seconds."""

    floor: float
    kill: float
    unready: float
    unlive: float
    canaries: tuple[tuple[float, float], ...]  # sent, ended


def hang() -> Hang:
    """Judge a stream that falls silent; canaries get nothing."""
    limits = silence_limits(Settings())
    progress = Progress(limits)
    progress.learned.answers, progress.learned.concurrent = LEARNED_ANSWERS, 8
    progress.delivered(1000.0)
    work = replace(UnreadWork(since=990.0), first_at=995.0, route="chat", delivered=100, last_at=1000.0, shows=True)
    state = VerdictState("progressing", "progress", since=990.0, served=True, engine_since=900.0)
    canary: CanaryResult | None = None
    until, canaries, changed = 0.0, [], {"ready": 0.0, "live": 0.0}
    for tick in range(1, 400):
        now = 1000.0 + tick / 2
        evidence = progress.evidence([work], now)
        if canaries and until and now >= until:
            canary, until = CanaryResult("starved", canaries[-1][0], now, 0.0), 0.0
        state, _ = judge(state, VerdictInputs(now, evidence, canary, can_ask=True))
        for kind in ("ready", "live"):
            if state.state in FAILS[kind] and not changed[kind]:  # type: ignore[index]
                changed[kind] = now - 1000.0
        if changed["live"]:
            break
        if not until and is_canary_due(state, evidence, canary.ended if canary else None, 15.0):
            until = now + canary_allowed(state.state, evidence, (), limits)
            canaries.append((now, until))
    sent = tuple((began - 1000.0, ended - 1000.0) for began, ended in canaries)
    return Hang(limits.floor, limits.kill, changed["ready"], changed["live"], sent)


def silence() -> str:
    """When a silence is asked about, withdraws readiness and fails liveness."""
    found, end = hang(), 100.0

    def x(seconds: float) -> float:
        return round(LEFT + 50 + (RIGHT - LEFT - 50) * (seconds + 10) / (end + 10), 1)

    rows = {"tokens": 60, "canary": 100, "readiness": 140, "liveness": 180}
    parts = [text(16, y + 14, name) for name, y in rows.items()]
    parts += [box(x(-10 + n * 0.5), rows["tokens"], 2, 20, "well") for n in range(21)]
    parts += [box(x(0), rows["tokens"], x(end) - x(0), 20, "soft"), text(x(2), rows["tokens"] + 14, "silence")]
    for began, ended in found.canaries:
        parts.append(box(x(began), rows["canary"], max(2.0, x(min(ended, end)) - x(began)), 20, "ask"))
    parts.append(text(x(found.unlive) + 6, rows["canary"] + 14, "got nothing"))
    for name, at in (("readiness", found.unready), ("liveness", found.unlive)):
        parts.append(box(x(-10), rows[name], x(at) - x(-10), 20, "well"))
        parts.append(box(x(at), rows[name], x(end) - x(at), 20, "ill"))
    marks = (
        (0.0, "last token"),
        (found.floor, f"floor {found.floor:.0f} s"),
        (found.kill, f"kill bound {found.kill:.0f} s"),
    )
    parts += [line(x(at), 52, x(at), 214) + text(x(at), 230, name, "middle") for at, name in marks]
    return svg(244, "A hang during one stream: readiness goes at the floor, liveness at the kill bound", parts)


# --- the balance ---


def levels(*, is_stuck: bool) -> list[float]:
    """The level each second since a stream fell silent, as seen from where it was then."""
    found = TokenBalance()
    before = EngineSample(generation_tokens=0.0, running=OTHERS + 1)
    found.read(before, 0.0, None, moving=OTHERS + 1, silent=0, waiting=0, canary=False)
    generated, seen = 0.0, []
    for second in range(1, BALANCE_S + 11):
        is_silent = second > 10
        running = OTHERS + (0 if is_stuck and is_silent else 1)
        generated += PACE * running
        for _ in range(OTHERS + (0 if is_silent else 1)):
            found.delivered(PACE, second - 0.5)
        sample = EngineSample(generation_tokens=generated, running=OTHERS + 1)
        silent = int(is_silent)
        found.read(sample, float(second), before, moving=OTHERS + 1 - silent, silent=silent, waiting=0, canary=False)
        before = sample
        if second >= 10:
            seen.append(found.level)
    return [level - seen[0] for level in seen]


def balance() -> str:
    """Generated minus delivered, for a tool call that is withheld and for a stream that is stuck."""
    well, ill = levels(is_stuck=False), levels(is_stuck=True)
    plot = Plot(BALANCE_S, min(ill) * 1.3, max(well) * 1.1, 300)
    parts = [
        *plot.axes("seconds since the stream last brought something", "tokens, less what a working one would get"),
        plot.curve(list(enumerate(well)), "good"),
        plot.curve(list(enumerate(ill)), "bad"),
        text(plot.x(BALANCE_S * 0.97), plot.y(well[-1]) + 66, "withheld: the engine works for it", "end"),
        text(plot.x(BALANCE_S * 0.98), plot.y(0) - 12, "it is stuck: the others get all", "end"),
    ]
    return svg(300, f"Generated minus delivered, for one silent stream next to {OTHERS} others", parts)


# --- a queue ---


def queue() -> str:
    """Seconds that a queue of prompts may be silent: the longest piece or one batch, and what the sum would be."""
    limits = silence_limits(Settings())
    prefill = LatencyModel().seconds(
        terms(RequestSize(uncached=PROMPT_TOKENS), Coefficients()).before_first_token / 1000
    )
    one = replace(UnreadWork(since=0.0), route="chat", prefill=prefill, prompt_tokens=PROMPT_TOKENS)
    summed, longest = [], []
    for count in range(0, MAX_QUEUE + 1, 5):
        piece = early_prefill([one] * count, 0.0, limits.floor) if count else 0.0
        longest.append((count, allowed_silence(piece, limits.floor, 0.0, limits)[0]))
        summed.append((count, allowed_silence(prefill * count, limits.floor, 0.0, limits)[0]))
    plot = Plot(MAX_QUEUE, 0.0, max(value for _, value in summed) * 1.1, 300)
    parts = [
        *plot.axes(
            f"prompts of {PROMPT_TOKENS:,} tokens that wait, on a machine {UNKNOWN_SLOWNESS:.0f} times slower than its "
            "coefficients",
            "allowed silence, s",
        ),
        plot.curve(summed, "bad"),
        plot.curve(longest, "good"),
        text(
            plot.x(MAX_QUEUE * 0.6),
            plot.y(summed[len(summed) * 6 // 10][1]) - 14,
            "the sum over the queue (no longer)",
            "end",
        ),
        text(
            plot.x(MAX_QUEUE),
            plot.y(longest[-1][1]) - 8,
            f"one batch or the longest prompt: {longest[-1][1]:.0f} s",
            "end",
        ),
    ]
    return svg(300, "Patience over a queue: something must be delivered within its longest piece", parts)


# --- shapes ---


@dataclass(frozen=True, slots=True)
class Plot:
    """A plane of `width` units from 0, and of heights from `low` to `high`; `size` is its height in pixels."""

    width: float
    low: float
    high: float
    size: int

    def x(self, value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * value / self.width, 1)

    def y(self, value: float) -> float:
        bottom = self.size - BOTTOM
        return round(bottom - (bottom - TOP) * (value - self.low) / (self.high - self.low), 1)

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        """A line through the points."""
        steps = " L".join(f"{self.x(a)} {self.y(b)}" for a, b in points)
        return f'<path class="{kind}" d="M{steps}"/>'

    def axes(self, across: str, up: str) -> list[str]:
        """Both axes with their names and some numbers."""
        parts = [line(LEFT, self.y(0), RIGHT, self.y(0), "axis"), line(LEFT, TOP, LEFT, self.size - BOTTOM, "axis")]
        below, widths = self.size - BOTTOM + 17, [self.width * share for share in (0.25, 0.5, 0.75, 1.0)]
        parts += [text(self.x(width), below, f"{width:.0f}", "middle") for width in widths]
        for share in (0.0, 0.5, 1.0):
            value = share * self.high / 1.1
            parts.append(text(LEFT - 6, self.y(value) + 4, f"{value:.0f}", "end"))
        return [*parts, text(RIGHT, self.size - 6, across, "end"), text(LEFT + 6, TOP + 4, up)]


def svg(height: int, title: str, parts: Iterable[str]) -> str:
    """A whole file."""
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    shown = f'<text class="title" x="16" y="24">{title}</text>'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", shown, *parts, "</svg>", ""])


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{round(width, 1)}" height="{height}"/>'


def line(x: float, y: float, to_x: float, to_y: float, kind: str = "mark") -> str:
    return f'<line class="{kind}" x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}"/>'
