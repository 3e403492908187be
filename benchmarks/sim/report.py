"""Tallies and trials as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil

from sim.alarms import ALARMS
from sim.detectors import CHECKS
from sim.modes import CASES, FULL, LOADS, Trial
from sim.proofs import LEVELS
from sim.weeks import BUSY, HIDDEN, NATURAL, OURS, PLAIN, RATE, WEEK_S, Tally, label
from sim.world import UNPROVEN

NAMES = tuple(check.name for check in CHECKS)
EXTRA_PROBE_S = 10.0  # seconds that the manifests' liveness probe takes more: three probes in 5 s each
API_BLOCKED = 12  # the mode whose hang looks like work that blocks the API, which gets more patience
NO_FALSE = 3.0  # rule of three: none seen in n means a rate under 3/n, with 95 % confidence

Times = Sequence[float | None]


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile of at least one value."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def times(trials: Iterable[Trial], detector: str) -> list[float | None]:
    """Detection seconds of one detector, None where it missed."""
    return [{OURS[0]: t.liveness, OURS[1]: t.readiness, **t.baselines}[detector] for t in trials]


def kill_times(trials: Iterable[Trial], detector: str) -> list[float | None]:
    """Seconds until its failing probes would have killed."""
    ours = ((None if t.liveness is None else t.liveness + EXTRA_PROBE_S) for t in trials) if detector == OURS[0] else ()
    return list(ours) or [t.kills[detector] for t in trials]


def cell(found: Times) -> str:
    """`share, p50 / p99` of a list of detections."""
    seen = [s for s in found if s is not None]
    if not found:
        return ""
    share = f"{len(seen)}/{len(found)}"
    return f"{share} {quantile(seen, 0.5):.0f} / {quantile(seen, 0.99):.0f}" if seen else share


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


# --- detection ---


def figures(tally: Tally, trials: Sequence[Trial]) -> str:
    """What the tables below come to, held against the targets."""
    found = [t for t in trials if t.is_field]
    events = sum(n for alarm, n in tally.events.items() if alarm not in HIDDEN)
    cut = sum(n for alarm, n in tally.cut.items() if alarm not in HIDDEN)
    rows: list[tuple[object, ...]] = [
        (f"false kills, {events} events", mistakes(tally, OURS[0]), 0),
        ("healthy requests ended", cut, 0),
        ("canaries that did harm", sum(tally.harmed.values()), 0),
        (
            "hangs of the field's reports found, with a right reason",
            f"{sum(t.right for t in found)}/{len(found)}",
            "all",
        ),
    ]
    short = [t for t in trials if t.whole and t.load != LOADS[3]]
    for which, some in (("", short), (", without mode 12", [t for t in short if t.mode != API_BLOCKED])):
        for name, loads in {"empty": LOADS[:3], "full": (FULL,)}.items():
            mine = [t for t in some if t.load in loads]
            what = f"readiness withdrawn, queues {name}{which}: found/all, p50 / p99 s"
            rows.append((f"{what}, from the engine's last token", cell([t.since_token for t in mine]), "<= 20"))
            rows.append((f"{what}, from the fault", cell([t.readiness for t in mine]), ""))
        for proof in levels(t.proof for t in some):
            kills = cell([t.liveness for t in some if t.proof == proof])
            target = "<= 120" if proof == UNPROVEN else "<= 40"
            rows.append((f"kill, proof {proof}{which}: found/all, p50 / p99 s", kills, target))
    for level in LEVELS:
        weeks, wrong = tally.levels.get(level, 0.0), tally.mistaken.get(level, 0)
        rows.append((f"false kills, {weeks:.0f} weeks of engines of which is seen: {level}", wrong, 0))
        some = [t for t in short if t.mode != API_BLOCKED and t.level == level]
        rows.append((f"readiness withdrawn, seen: {level}, from the fault", cell([t.readiness for t in some]), ""))
        rows.append((f"kill, seen: {level}", cell([t.liveness for t in some]), ""))
    return table(("figure", "simulated", "target"), rows)


def summary(trials: Sequence[Trial]) -> str:
    """Per load, over the modes that stop the whole engine: found/all, p50 / p99 of each detector."""
    whole = [t for t in trials if t.whole]
    rows = [
        (name, *(cell(times([t for t in whole if t.load == load], name)) for load in LOADS)) for name in (*OURS, *NAMES)
    ]
    without = [t for t in whole if t.mode != API_BLOCKED]
    rows.insert(
        1, (f"{OURS[0]}, without mode 12", *(cell(times([t for t in without if t.load == x], OURS[0])) for x in LOADS))
    )
    return table(("detector", *LOADS), rows)


def levels(proofs: Iterable[str]) -> tuple[str, ...]:
    """The levels of proof that verdicts named, and `none`, which comes first."""
    return (UNPROVEN, *sorted(set(proofs) - {UNPROVEN}))


def by_queue(trials: Sequence[Trial]) -> str:
    """Seconds to the first failing /readyz, and to the verdict that kills, by what waited when the engine hung."""
    queues = {"empty": LOADS[:3], "long prefill": LOADS[3:4], "full: 200 prompts": (FULL,)}
    rows, proofs = [], levels(t.proof for t in trials)
    for name, loads in queues.items():
        mine = [t for t in trials if t.whole and t.load in loads]
        for what, some in (("", mine), (", without mode 12", [t for t in mine if t.mode != API_BLOCKED])):
            kills = (cell([t.liveness for t in some if t.proof == proof]) for proof in proofs)
            rows.append((name + what, cell([t.readiness for t in some]), *kills))
    return table(("queue", "readiness", *(f"kill, proof {proof}" for proof in proofs)), rows)


def field(trials: Sequence[Trial]) -> str:
    """One row per hang of the field's reports and load: what was expected, and what happened."""
    rows = []
    for mode, load in dict.fromkeys((t.mode, t.load) for t in trials if t.is_field):
        mine = [t for t in trials if (t.mode, t.load) == (mode, load)]
        case = CASES[mode]
        codes = sorted({code for t in mine for code in t.reasons})
        rows.append(
            (
                mode,
                case.text,
                load,
                case.owed,
                ", ".join(case.reasons),
                cell([t.found for t in mine]),
                f"{sum(t.right for t in mine)}/{len(mine)}",
                cell([t.readiness for t in mine]),
                cell([t.liveness for t in mine]),
                ", ".join(codes) or "-",
            )
        )
    head = ("kind", "hang", "load", "owed", "right reasons", "found", "rightly", "readiness", "kill", "all reasons")
    return table(head, sorted(rows))


def right(trials: Sequence[Trial]) -> str:
    """How many were found, and with a right reason."""
    whole = [t for t in trials if t.whole]
    found, named = sum(t.found is not None for t in whole), sum(t.right for t in whole)
    return f"Of {len(whole)} hangs of the whole engine {found} were found, {named} with a right reason code."


def long_prefills(trials: Sequence[Trial]) -> str:
    """Detection against three times the prefill that was outstanding: by the cost model, and as this site takes it."""
    late = [t for t in trials if t.whole and t.load == "long prefill" and t.mode != API_BLOCKED and t.predicted > 0]
    rows = []
    ways: dict[str, Callable[[Trial], float]] = {"cost model": lambda t: t.predicted, "this site": lambda t: t.real}
    ways["what the sidecar expected"] = lambda t: t.expected
    for name, of in ways.items():
        rest = [t.liveness - 3 * of(t) for t in late if t.liveness is not None]
        if rest:
            within = sum(r <= 30 for r in rest)
            rows.append((name, f"{within}/{len(late)}", f"{quantile(rest, 0.5):.0f}", f"{quantile(rest, 0.99):.0f}"))
    head = ("prefill by", "found within 3 x prefill + 30 s", "detection - 3 x prefill, p50 s", "p99 s")
    return table(head, rows)


def parts(trials: Sequence[Trial]) -> str:
    """One row per mode whose hang is a part's, one request's, or a start-up's: what is owed, and what came."""
    rows = []
    for mode in sorted({t.mode for t in trials if not t.whole and not t.is_field}):
        for load in LOADS:
            mine = [t for t in trials if (t.mode, t.load) == (mode, load)]
            if not mine:
                continue
            codes = sorted({c for t in mine for c in t.reasons})
            rows.append(
                (
                    mode,
                    load,
                    mine[0].owed,
                    ", ".join(CASES[mode].reasons),
                    cell([t.found for t in mine]),
                    f"{sum(t.right for t in mine)}/{len(mine)}",
                    cell([t.readiness for t in mine]),
                    cell([t.ended for t in mine]),
                    cell([t.liveness for t in mine]),
                    ", ".join(codes) or "-",
                )
            )
    head = (
        "mode",
        "load",
        "owed",
        "right reasons",
        "found",
        "rightly",
        "readiness",
        "request ended",
        "liveness",
        "all reasons",
    )
    return table(head, rows)


def detection(trials: Sequence[Trial]) -> str:
    """One row per mode and load, one column per detector: found/all, then p50 / p99 seconds."""
    rows = []
    for mode, at in sorted({(t.mode, LOADS.index(t.load)) for t in trials if not t.is_field}):
        mine = [t for t in trials if (t.mode, t.load) == (mode, LOADS[at])]
        codes = ", ".join(sorted({t.reasons[-1] for t in mine if t.reasons})) or "-"
        row = (
            mode,
            LOADS[at],
            *(cell(times(mine, n)) for n in (*OURS, *NAMES)),
            f"{sum(t.right for t in mine)}/{len(mine)}",
            codes,
        )
        rows.append(row)
    return table(("mode", "load", *OURS, *NAMES, "right reason", "last reason"), rows)


# --- mistakes ---


def alarms(tally: Tally) -> str:
    """One row per alarm: how often it happened; how often readiness was lost, and the engine suspected; its kills by
    level of proof; requests that were ended, canaries that did harm; and the kills of each baseline."""
    rows, proofs = [], levels(proof for _, proof in tally.kills)
    for name in (*(label(a) for a in ALARMS), NATURAL, PLAIN):
        if n := tally.events.get(name, 0):
            theirs = (tally.baseline.get((d, name), 0) for d in NAMES)
            sums = (each.get(name, 0) for each in (tally.unready, tally.suspects))
            kills = (tally.kills.get((name, proof), 0) for proof in proofs)
            rows.append((name, n, *sums, *kills, tally.cut.get(name, 0), tally.harmed.get(name, 0), *theirs))
    kinds = (f"killed, proof {proof}" for proof in proofs)
    return table(("alarm", "times", "unready", "suspect", *kinds, "requests ended", "harmed", *NAMES), rows)


def mistakes(tally: Tally, detector: str, *, hidden: bool = False) -> int:
    """False kills of a detector; those of stories that nothing shows only with `hidden`."""
    theirs = [(alarm, n) for (who, alarm), n in tally.baseline.items() if who == detector]
    by = [(alarm, n) for (alarm, _), n in tally.kills.items()] if detector == OURS[0] else theirs
    return sum(n for alarm, n in by if hidden or alarm not in HIDDEN)


def quality(tally: Tally, trials: Sequence[Trial]) -> str:
    """Chen, Toueg and Aguilera's terms for each detector, and whether the sidecar is ahead of it on each axis."""
    whole = [t for t in trials if t.whole]
    mine = axes(tally, whole, OURS[0])
    rows = []
    for name in (OURS[0], *NAMES):
        share, middle, late, kills = axes(tally, whole, name)
        every = mistakes(tally, name, hidden=True)
        duration = tally.wrong.get(name, 0.0) / every if every else 0.0
        accuracy = 1 - tally.wrong.get(name, 0.0) / (tally.weeks * WEEK_S)
        faster = (mine[0], -mine[1]) >= (share, -middle)
        ahead = "" if name == OURS[0] else f"{_word(faster)}; {_word(mine[3] <= kills)}"
        rows.append(
            (
                name,
                f"{share:.1%}",
                f"{middle:.0f}",
                f"{late:.0f}",
                f"{kills:.4f}",
                f"{every / tally.weeks:.4f}",
                f"{duration:.0f}",
                f"{accuracy:.7f}",
                ahead,
            )
        )
    return table(
        (
            "detector",
            "hangs found",
            "time to kill, p50 s",
            "p99 s",
            "false kills a week",
            "with hidden stops",
            "mistake lasts, s",
            "query accuracy",
            "sidecar ahead: finding; false kills",
        ),
        rows,
    )


def axes(tally: Tally, whole: Sequence[Trial], name: str) -> tuple[float, float, float, float]:
    """Share of the hangs found, time to kill (p50, p99; infinite where none was found), false kills per engine-week."""
    found = [s for s in kill_times(whole, name) if s is not None]
    middle, late = (quantile(found, 0.5), quantile(found, 0.99)) if found else (float("inf"),) * 2
    return len(found) / max(1, len(whole)), middle, late, mistakes(tally, name) / tally.weeks


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def coverage(tally: Tally) -> str:
    """How much was simulated, and how."""
    none = tally.drawn and not any(alarm == NATURAL for alarm, _ in tally.kills)
    return (
        f"{tally.weeks:.1f} engine-weeks, each at a newly drawn site. In full resolution: "
        f"{tally.full / tally.weeks:.0f} s of each ({100 * tally.full / (tally.weeks * WEEK_S):.3f} %, "
        f"{tally.full / WEEK_S:.2f} weeks in all), {sum(tally.events.values())} events: half a minute of ordinary "
        f"traffic, the alarms at {RATE:g} of their weekly rates, and of {tally.windows} natural windows by the bound "
        f"the most dangerous one of each week and one by lot, {tally.drawn} in all, the worst with a bound of "
        f"{tally.worst:.1f} times the least silence that can kill"
        + (f" (none a kill: under {NO_FALSE / tally.drawn:.2%} each, with 95 % confidence)" if none else "")
        + f". The rest was skipped, {BUSY:.0%} of it as time with users: benchmarks/sim/weeks.py shows why that hides "
        f"no false kill, and a test compares it with full resolution. {tally.unrecovered} worlds had to be replaced "
        "because the verdict was not calm again in time."
    )


def findings(tally: Tally, most: int = 3) -> str:
    """The first false kills, and ends of healthy requests, of each alarm: seed, site, trail."""
    lines: list[str] = []
    for name in sorted({k.alarm for k in tally.examples}):
        for kill in [k for k in tally.examples if k.alarm == name][:most]:
            trail = "; ".join(f"{at} {state} ({reason})" for at, state, reason in kill.trail)
            s = kill.site
            done = "requests ended" if kill.after is None else f"killed after {kill.after:.1f} s"
            lines.append(
                f"- {name}: `--only-week {kill.seed}`; {done}; trace {s.trace}, "
                f"slowness {s.slowness:.2f}, streams {s.streams}, lacks {sorted(s.lacks)}, page {s.page}, "
                f"ranks {s.ranks}, shared {s.shared}: {trail}"
            )
    return "\n".join(lines) or "None."
