"""Engine-weeks: calm time that is passed over, and stretches in full resolution where a verdict could change.

What a week contains, in full resolution, at one newly drawn site: half a minute of ordinary traffic at a drawn place of
its trace; the stories of alarms.py at drawn times, at RATE of their weekly rates; of its natural windows (below) the
most dangerous one and one by lot. All the rest of its seven days is passed over. A figure per engine-week is therefore
one per week of *these rates of alarms*, whose traffic in between is judged by the argument below, not simulated.

Why passing over hides no false kill. A verdict leaves the calm states (idle, progressing, quiet) only through: an
exemption, a part that hangs, requests that were overtaken, left unserved or refused, the sidecar's own trouble, a
restart, a refused port, a canary that does not pass, or a silence longer than `allowed`. All but the last are alarms
here, always in full resolution, or need an engine that is not healthy. A healthy engine's silence can end in a kill
only when it outlasts `allowed` and the bound of kills (`silence_kill`), and a canary
starves in it. It is bounded per arrival by `sites.longest_gap`, in whatever order requests are scheduled, and `allowed`
from below by `sites.least_allowed` (nothing learned; all that is learned lengthens it). Arrivals whose bound comes to
80 % of the larger of `allowed` and the bound of kills are the natural windows; elsewhere no kill is possible. They are
many where the hardware is far slower than the coefficients predict: the bound takes the sidecar for one that never
learned so. What users teach in time that is passed over is the least that they could: each prefill as if alone on the
engine, and no gap at all. Readiness is not covered by this argument: a silence beyond `allowed` that is passed over may
have withdrawn it. tests/health/test_verdict_sim.py holds all this against full resolution.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace

from sidecar.health.latency_model import MAX_PREFILLS
from sidecar.health.progress import SilenceLimits
from sidecar.load import cost_model
from sim.alarms import ALARMS, Alarm
from sim.seqs import Site
from sim.sites import draw, kill_bound, prefills, slice_of, windows
from sim.traces import Trace
from sim.world import CALM, UNLIVE, World

WEEK_S = 7 * 86_400.0
RATE = 0.08  # of the weekly rates of the alarms: what 10,000 weeks in 25 minutes on two cores leave room for
LEAD_S = 20.0  # seconds of traffic before a story
AFTER_S = 30.0
DRAIN_S = 60.0  # seconds for outstanding work to end; then its clients hang up
ORDINARY_S = 30.0  # seconds of ordinary traffic in each week
OURS = ("sidecar, liveness", "sidecar, readiness")
NATURAL, PLAIN = "natural window", "ordinary traffic"
BUSY = 0.7  # share of the calm time in which users come


@dataclass(frozen=True, slots=True)
class Kill:
    """One false kill, or requests that were ended while the engine was healthy (`after` None): where to find it again,
    and what led to it."""

    seed: str
    alarm: str
    after: float | None  # seconds from the story's begin
    site: Site
    trail: tuple[tuple[float, str, str], ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Traffic of the site's own, around second `at` of its trace and for `seconds` after it."""

    name: str
    at: float
    seconds: float


@dataclass(slots=True)
class Tally:
    """Sums over weeks by alarm; `kills` by (alarm, level of proof), `baseline` by (detector, alarm), `wrong` seconds by
    detector: for how long a mistake stood, or would have, were the engine not killed for it. `worst`: the largest ratio
    among the windows that were run.

    `levels`: weeks by what can be seen of the engine besides, `mistaken`: false kills by the same, without those of
    stories that nothing shows. `unready`: times that /readyz failed; `cut`: requests that the control ended; `harmed`:
    canaries that did harm.
    """

    weeks: float = 0.0
    full: float = 0.0  # seconds in full resolution
    windows: int = 0  # natural windows that the weeks held, by the bound
    drawn: int = 0  # of them in full resolution
    events: dict[str, int] = field(default_factory=dict)
    suspects: dict[str, int] = field(default_factory=dict)
    unready: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    harmed: dict[str, int] = field(default_factory=dict)
    looked: int = 0  # ticks at which the engine's processes would be looked at
    trails: list[str] = field(default_factory=list)  # of each event, a hash of its verdicts
    levels: dict[str, float] = field(default_factory=dict)
    mistaken: dict[str, int] = field(default_factory=dict)
    kills: dict[tuple[str, str], int] = field(default_factory=dict)
    unrecovered: int = 0
    baseline: dict[tuple[str, str], int] = field(default_factory=dict)
    wrong: dict[str, float] = field(default_factory=dict)
    worst: float = 0.0
    examples: list[Kill] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take another's sums into this one."""
        self.weeks += other.weeks
        self.full += other.full
        self.windows += other.windows
        self.drawn += other.drawn
        self.unrecovered += other.unrecovered
        self.looked += other.looked
        for name in ("events", "suspects", "unready", "cut", "harmed", "levels", "mistaken", "kills", "baseline"):
            mine: dict[object, float] = getattr(self, name)
            for key, n in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + n
        self.worst = max(self.worst, other.worst)
        for who, seconds in other.wrong.items():
            self.wrong[who] = self.wrong.get(who, 0.0) + seconds
        self.examples.extend(other.examples)


def label(alarm: Alarm) -> str:
    """An alarm's row in tables."""
    if alarm.kind:
        return f"kind {alarm.kind}: {alarm.text}"
    return f"{alarm.number}: {alarm.text}" if alarm.number else alarm.text


HIDDEN = {label(alarm) for alarm in ALARMS if alarm.hidden}


def week(
    seed: str,
    traces: dict[str, Trace],
    co: cost_model.Coefficients,
    *,
    only: str = "",
    compare: bool = True,
    level: str = "",
    reports: bool = False,
) -> Tally:
    """One engine-week. `only` keeps the alarms whose label begins so. `level`: what can be seen of its engine besides,
    instead of what its site draws. `reports`: make the control's reports, too. Deterministic in `seed`."""
    rng = random.Random(seed)
    site = draw(rng, traces, co)
    site = replace(site, proof=level or site.proof)
    w = World(site, rng, compare, co=co, reports=reports)
    tally = Tally()
    natural = [] if only else stretches(w, traces, tally)
    start, end = w.now, w.now + WEEK_S
    w.run(15)
    full = 15.0
    stories = [(a.per_week * RATE, a) for a in ALARMS if label(a).startswith(only)]
    plan: list[tuple[float, Alarm | Stretch]] = [
        (rng.uniform(0, WEEK_S - 7200), a) for rate, a in stories for _ in range(poisson(rng, rate))
    ]
    plan += [(rng.uniform(0, WEEK_S - 7200), stretch) for stretch in natural]
    for at, what in sorted(plan, key=lambda p: p[0]):
        if w.now < start + at:
            pass_over(w, start + at - w.now, rng.random() < BUSY, traces)
        began = w.now - w.passed
        w = event(w, what, traces, tally, seed)
        full += w.now - w.passed - began
    if w.now < end:
        pass_over(w, end - w.now, True, traces)
    tally.weeks, tally.full = (w.now - start) / WEEK_S, full
    tally.levels[site.proof] = tally.weeks
    tally.looked += w.looked
    return tally


def pass_over(w: World, seconds: float, busy: bool, traces: dict[str, Trace]) -> None:
    """Skip calm time; users teach what as many of the site's streams as came, 64 at most, would have taught."""
    trace = prefills(traces[w.site.trace], w.co)
    came = seconds * w.site.rate * len(trace) / (traces[w.site.trace][-1].at + 1.0) * w.site.streams
    w.skip(seconds, busy, w.rng.choices(trace, k=min(MAX_PREFILLS, int(came))))


def stretches(w: World, traces: dict[str, Trace], tally: Tally) -> list[Stretch]:
    """Count the week's natural windows; return what of its own traffic is run in full."""
    trace = traces[w.site.trace]
    found = windows(trace, w.site, w.co, SilenceLimits(), kill_bound())
    tally.windows += round(len(found) * WEEK_S * BUSY * w.site.rate / (trace[-1].at + 1.0))
    plain = Stretch(PLAIN, w.rng.uniform(0, trace[-1].at), ORDINARY_S)
    if not found:
        return [plain]
    worst, by_lot = max(found), w.rng.choice(found)
    tally.worst = worst[0]
    return [plain, *(Stretch(NATURAL, trace[i].at, AFTER_S) for _, i in {worst, by_lot})]


def poisson(rng: random.Random, mean: float) -> int:
    """A Poisson number."""
    n, left = 0, rng.expovariate(1.0)
    while left < mean:
        n, left = n + 1, left + rng.expovariate(1.0)
    return n


def event(w: World, what: Alarm | Stretch, traces: dict[str, Trace], tally: Tally, seed: str) -> World:
    """One story, or one stretch of traffic, in full resolution. Returns the world to go on with."""
    trace, began = traces[w.site.trace], w.now
    rate = w.site.rate
    w.forget_baselines()
    if isinstance(what, Alarm):
        w.traffic(slice_of(trace, w.rng.uniform(0, trace[-1].at), rate, w.now))
        w.run(LEAD_S)
        what.story(w)
        w.run(AFTER_S)
    else:
        lead = min(what.at, LEAD_S * rate)
        w.traffic(slice_of(trace, what.at - lead, rate, w.now))
        w.run(min(lead / rate, LEAD_S) + what.seconds)
    settle(w)
    return judged(w, label(what) if isinstance(what, Alarm) else what.name, began, tally, seed)


def settle(w: World) -> None:
    """Let the users' work end and the verdict become calm again."""
    w.engine.heal()
    if not w.drained(DRAIN_S):
        for seq in list(w.users.values()):
            w.abort(seq)
    until = w.now + 1200
    w.run(5)
    while w.verdict not in CALM and w.now < until:
        w.tick()


def judged(w: World, name: str, began: float, tally: Tally, seed: str) -> World:
    """Book what an event did to the verdicts. A world that was killed, or did not recover, is replaced by a new one."""
    seen = [c for c in w.trail if c.at >= began]
    tally.drawn += name == NATURAL
    tally.trails.append(hashlib.sha256(repr((name, w.trail)).encode()).hexdigest()[:16])
    for sums, n in (
        (tally.events, 1),
        (tally.suspects, any(c.state == "suspect" for c in seen)),
        (tally.unready, any(not c.ready for c in seen)),
        (tally.cut, w.cut),
        (tally.harmed, w.engine.harmed),
    ):
        if n:
            sums[name] = sums.get(name, 0) + n
    for who, states in zip(OURS, (UNLIVE, ("suspect", *UNLIVE)), strict=True):
        tally.wrong[who] = tally.wrong.get(who, 0.0) + w.spent(states, began)
    for baseline in w.rivals.baselines:
        tally.wrong[baseline.name] = tally.wrong.get(baseline.name, 0.0) + baseline.wrong
        if baseline.killed_at is not None:
            key = (baseline.name, name)
            tally.baseline[key] = tally.baseline.get(key, 0) + 1
    killed = w.killed(began)
    if killed is not None:
        proof = (name, next(c.proof for c in seen if c.at == killed and c.state in UNLIVE))
        tally.kills[proof] = tally.kills.get(proof, 0) + 1
        if name not in HIDDEN:
            tally.mistaken[w.site.proof] = tally.mistaken.get(w.site.proof, 0) + 1
    if killed is not None or w.cut:
        start = max(began, w.story_at)
        after = None if killed is None else killed - start
        trail = tuple((round(c.at - start, 1), c.state, c.reason) for c in seen)[:20]
        tally.examples.append(Kill(seed, name, after, w.site, trail))
    w.trail.clear()
    w.cut = w.engine.harmed = 0
    if w.verdict in CALM and not w.users:
        return w
    tally.unrecovered += 1
    fresh = World(w.site, w.rng, w.compare, co=w.co, now=w.now, passed=w.passed, looked=w.looked, reports=w.reports)
    fresh.run(15)
    fresh.trail.clear()
    return fresh
