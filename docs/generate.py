"""Writes what documents take from the code: tables and pictures of docs/*.md, docs/verdict.md, deploy/kubernetes.

    python docs/generate.py            write      (make docs)
    python docs/generate.py --check    exit 1 and name the files that differ

Rules: what is written depends on the code alone and on the last runs in benchmarks/results; prose stands in the
documents, between the marks stands what is generated.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import click

from sidecar import __main__, errors, settings
from sidecar.control.admin_api import make_app
from sidecar.engines import image_loading
from sidecar.engines.image_loading import ENGINE_REASONS
from sidecar.events import STATES, State
from sidecar.flags import headings
from sidecar.health.hang_classes import HANG_CLASSES, HangClass
from sidecar.health.kill_policy import ESCALATIONS, HOLDS
from sidecar.health.probes import FAILS
from sidecar.health.reasons import CAUSES, REASON_TEXTS, STATE_TEXTS
from sidecar.health.verdict import CONDITIONS, TABLE, UNASKED_KILLS
from sidecar.images.pass_reasons import PASS_REASONS
from sidecar.kernels import families
from sidecar.kernels.grid import FILLED_ROWS, MIXED, ROWS, STRIPS, TILES, PatchSpec, TileSpec
from sidecar.load.cost_model import Coefficients
from sidecar.relay.media import preprocess_api
from sidecar.report.metrics import METRICS
from sidecar.settings import Settings, format_key
from sidecar.tools import cel
from sidecar.tools.manifests import chart, component, llm_d
from sidecar.tools.manifests.inject import InjectSettings, inject
from sidecar.tools.manifests.render import render
from sidecar.tools.manifests.settings import ManifestSettings
from sidecar.tools.scripted_engine import hang_catalogue
from sidecar.tools.scripted_engine.faults import FAULTS
from sidecar.tools.scripted_engine.hang_catalogue import OWED, HangCase

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"
GATEWAY: Final = ROOT / "deploy" / "envoy-ai-gateway" / "milli-mu.yaml"
RESULTS: Final = ROOT / "benchmarks" / "results"

FLOOR, KILL = Settings().silence_floor, Settings().silence_kill

ACCURACY: Final = r"MAPE ([\d.]+)%, median ([\d.]+)%, P90 ([\d.]+)%, R2 [-\d.]+"  # as `sidecar calibrate` reports it

# The last runs of benchmarks/calibration.py: --kind, and what was measured.
CALIBRATIONS: Final = {
    "text": "vLLM 0.32, text model",
    "vision": "vLLM 0.32, vision model",
    "llamacpp-text": "llama.cpp b10434, text model",
    "llamacpp-vision": "llama.cpp b10434, vision model",
}

MEANING: Final[dict[State, str]] = {
    "starting": "no token yet since the engine started",
    "idle": "nothing is outstanding",
    "progressing": "tokens moved within the last two seconds",
    "quiet": "work is outstanding and silent, within the time that it may be",
    "suspect": "silent beyond the allowed time, refusing work, or a part of it hangs",
    "stalled": "silent beyond the kill bound, and a canary or the engine's counters confirm it",
    "dead": "no connection is taken",
    "exempt": "asleep, paused, or draining: not judged",
    "unknown": "the sidecar cannot tell; no probe fails, except readiness after its own restart amid a stall",
}

# What each path of the admin port answers; a route without a text ends the run.
ANSWERS: Final[dict[str, str]] = {
    "/livez": "503 while the verdict is `stalled` or `dead`; 200 while a kill is [held back](kill-policy.md)",
    "/readyz": "503 for `starting`, `suspect`, `stalled`, `dead`, `exempt`, and while draining; never for mere load",
    "/startupz": "200 once the engine has served a token since it started",
    "/healthz": "the sidecar's own health; nothing about the engine",
    "/status": "what `sidecar status` shows, as JSON: verdict, probes, pod, model, requests, latencies, GPUs, tenants",
    "/load": "load as JSON: model units, tokens, requests, GPUs, verdict; `?unit=milli`: whole thousandths of MU",
    "/cost": "what a request costs, [term by term](model-units.md#cost): `/cost?in=3500&cached=0&out=300&images=1`",
    "/coefficients": "the coefficients in use, as a file for `--coefficients`",
    "/coefficients/shadow": "the [re-fit](model-units.md#online-re-fit-and-drift) as a file; 404 before 20 windows",
    "/verdicts": "recent changes of the verdict with their evidence, at most 50",
    "/diagnoses": "the [diagnoses](diagnosis.md) that are kept",
    "/diagnoses/{id}": "one of them; a page where a browser asks, else JSON",
    "/metrics": "the sidecar's series as Prometheus text or OpenMetrics",
    "/": "the live page",
    "/events": "its server-sent events",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""
    lines = [list(head), *(list(row) for row in rows)]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(lines[0]), *texts[1:]]) + "\n"


def settings_table() -> str:
    """Every setting of `sidecar run`, below its heading."""
    parts: dict[str, list[tuple[str, str, str]]] = {}
    for f, heading in zip(fields(Settings), headings(fields(Settings)).values(), strict=True):
        row = f"`{format_key(f.name)}`", shown(f), f.metadata["help"] + choices(f)
        parts.setdefault(heading, []).append(row)
    return "\n".join(f"### {name}\n\n{table(('flag', 'default', 'meaning'), rows)}" for name, rows in parts.items())


def choices(field: Any) -> str:
    """The values of a setting that takes one of a few."""
    expected = field.metadata["parser"].expected
    return f"; {expected}" if expected.startswith(("one of ", "some of ")) else ""


def commands() -> dict[str, click.Command]:
    """Every command that users see, by name, `run` first."""
    context = click.Context(__main__.cli)
    known = {name: __main__.cli.get_command(context, name) for name in __main__.cli.list_commands(context)}
    seen = {name: command for name, command in known.items() if command is not None and not command.hidden}
    return dict(sorted(seen.items(), key=lambda item: (item[0] != "run", item[0])))


def with_subcommands() -> dict[str, click.Command]:
    """Every command and those below it."""
    found: dict[str, click.Command] = {}
    for name, command in commands().items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {below}": it for below, it in command.commands.items()}
    return found


def commands_table() -> str:
    """Every command in one line."""
    rows = ((f"`sidecar {name}`", " ".join((c.help or "").split())) for name, c in with_subcommands().items())
    return table(("command", "does"), rows)


def flags_tables() -> str:
    """The flags of every command but `run` and `doctor`, which takes those of `run`."""
    parts = []
    for name, command in with_subcommands().items():
        options = [p for p in command.params if isinstance(p, click.Option) and p.name != "config"]
        rows = [(f"`{o.opts[0]}`", " ".join((o.help or "").split())) for o in options]
        if name not in ("run", "doctor"):
            parts.append(f"### `sidecar {name}`\n\n{table(('flag', 'meaning [default]'), rows)}")
    return "\n".join(parts)


def endpoints_table() -> str:
    """Every path of the admin port."""
    app = make_app(None)  # type: ignore[arg-type]  # routes need no loop
    paths = dict.fromkeys(resource.canonical for resource in app.router.resources())
    return table(("path", "answer"), ((f"`GET {path}`", ANSWERS[path]) for path in paths))


def errors_table() -> str:
    """Every error that a client can get from the sidecar itself."""
    rows = ((f"`{e.code}`", str(e.status), first_line(e)) for e in request_errors(errors.RequestError))
    return table(("code", "status", "meaning"), rows)


def request_errors(base: type[errors.RequestError]) -> Iterable[type[errors.RequestError]]:
    """The classes below `base`, in the order of the file."""
    found = (value for value in (vars(errors) | vars(preprocess_api)).values() if isinstance(value, type))
    return (value for value in found if issubclass(value, base) and value is not base)


def first_line(thing: Any) -> str:
    """The first sentence of a docstring, which may be wrapped."""
    return " ".join((thing.__doc__ or "").split("\n\n")[0].split())


def shown(f: Any) -> str:
    """A setting's default, as `--help` shows it."""
    text = settings.format_default(f)
    return text if text == "none" else f"`{text}`"


def metrics_table() -> str:
    """Every metric."""
    rows = ((f"`{m.name}`" + (f" `{{{','.join(m.labels)}}}`" if m.labels else ""), m.kind, m.help) for m in METRICS)
    return table(("metric", "kind", "meaning"), rows)


def verdict_table() -> str:
    """Every verdict, and which probes it fails. A state that fails start-up only by its own nature is not repeated."""

    def answer(kind: Any, state: State) -> str:
        return "503" if state in FAILS[kind] else "200"

    rows = ((f"`{s}`", MEANING[s], answer("live", s), answer("ready", s)) for s in STATES)
    return table(("verdict", "meaning", "/livez", "/readyz"), rows)


def faults_table() -> str:
    """Every fault of the scripted engine, with the modes and alarms that it plays."""

    def numbers(fault: str, cases: Iterable[HangCase]) -> str:
        return ", ".join(map(str, hang_catalogue.numbers_of(fault, cases)))

    modes, alarms = hang_catalogue.MODES, hang_catalogue.ALARMS
    rows = ((f"`{name}`", f.text, numbers(name, modes), numbers(name, alarms)) for name, f in FAULTS.items())
    return table(("fault", "what it does", "hang modes", "alarms"), rows)


def cases_table(cases: Iterable[HangCase]) -> str:
    """Every case of the catalogue: how it is played, and what is owed to it."""
    rows = ((str(c.number), c.text, codes(c.faults), OWED[c.owed], codes(c.reasons)) for c in cases)
    return table(("", "case", "fault", "what is owed", "reason"), rows)


def codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def holds_table() -> str:
    """Why a stalled engine is not killed now, and what ends that."""
    rows = ((reason_link(reason), text, ESCALATIONS.get(reason, "time")) for reason, _, text in HOLDS)
    return table(("reason", "holds when", "what ends it"), rows)


def families_table() -> str:
    """Every known image processor: what it does, and what /v1/preprocess makes."""
    rows = []
    lies = {TILES: "tiles", MIXED: "tiles", ROWS: "patches", FILLED_ROWS: "patches", STRIPS: "patches"}
    for name, family in families.FAMILIES.items():
        spec = family.spec_class
        made = "patches" if issubclass(spec, PatchSpec) else "planes" if spec.tensors else "not made here"
        made = lies[spec.layout] if issubclass(spec, TileSpec) else made
        rows.append((f"`{name}`", (spec.__doc__ or "").splitlines()[0], made, "yes" if spec.inline else "passes"))
    return table(("processor", "what it does", "`pixel_values`", "inline, shm"), rows)


def image_rows_table() -> str:
    """Which engines get prepared images."""
    rows = (
        (
            row.kind,
            row.versions.replace("*", "any"),
            *(value.replace("*", "any") for value in (row.tokenizer, row.architecture, row.processor)),
            f"passes: {ENGINE_REASONS[row.reason]}" if row.reason else "prepared",
        )
        for row in image_loading.ROWS
    )
    return table(("engine", "versions", "tokenizer", "architecture", "processor", "images"), rows)


def pass_reasons_table() -> str:
    """Why images pass."""
    return table(("`reason`", "the image passes because"), ((f"`{code}`", text) for code, text in PASS_REASONS.items()))


def calibration_tables() -> str:
    """What the last runs of benchmarks/calibration.py found: errors on held-out shapes, and the runs themselves."""
    errors, runs, plots = [], [], []
    for kind, engine in CALIBRATIONS.items():
        path = max(RESULTS.glob(f"calibration-{kind}-*.md"))
        text = path.read_text()
        for name, *numbers in re.findall(
            rf"^(held out|of these \w+): {ACCURACY}; alpha-beta line: {ACCURACY}", text, re.MULTILINE
        ):
            mape, median, p90, line, _, line_p90 = map(float, numbers)
            met = "met" if mape <= 6 and p90 <= 25 and mape <= line / 2 else "missed"
            shapes = engine if name == "held out" else f"its {name.removeprefix('of these ')} alone"
            errors.append((shapes, f"{mape} % / {median} % / {p90} %", f"{line} % / {line_p90} %", met))
        varies, apart, waited = (float(n) for n in re.findall(r"(?:differ by|core in) ([\d.]+)%", text))
        seconds, date, took, load = re.findall(r"--seconds (\S+)`, (\S+); (\d+) s in all; load average (.+)\.", text)[0]
        (unit,) = re.findall(r"1 MU = ([\d.]+)", text)
        capacity = re.findall(r"capacity with (\d+) open: ([\d.]+) MU per minute", text)
        rate = f"{capacity[0][1]} MU/min with {capacity[0][0]} open" if capacity else "not named: not full"
        met = "met" if varies <= 10 else "missed"
        runs.append(
            (
                engine,
                date,
                f"{took} s of {seconds}",
                load,
                rate,
                f"{varies} % ({met})",
                f"{apart} %",
                f"{waited} %",
                f"{unit} ms",
            )
        )
        plots.append(f"![{engine}](../benchmarks/results/{path.stem}.svg)")
    of = (
        "held-out shapes",
        "cost model: MAPE / median / P90",
        "alpha-beta line: MAPE / P90",
        "<= 6 %, P90 <= 25 %, half of the line's",
    )
    ran = (
        "",
        "run on",
        "took",
        "load average",
        "capacity",
        "rates vary (<= 10 %)",
        "turns of a shape apart",
        "without a core",
        "1 MU",
    )
    return "\n".join([table(of, errors), table(ran, runs), *plots, ""])


def hang_classes_table() -> str:
    """The rows of HANG_CLASSES: signs as in the code."""

    def cell(name: str, value: str | bool) -> str:
        return f"{name} {value}" if isinstance(value, str) else name if value else f"no {name}"

    def signs(row: HangClass) -> str:
        named = ((each.name, getattr(row, each.name)) for each in fields(row)[4:])
        return ", ".join(cell(name.replace("_", " "), value) for name, value in named if value is not None)

    rows = (
        (f"`{row.name}`", row.text, signs(row), "proves" if row.proves else "waits" if row.waits else "")
        for row in HANG_CLASSES
    )
    return table(("class", "what it is", "signs", ""), rows)


def seen_tables() -> str:
    """What each real engine showed in the cases of tests/real_engines: a table for each page of engines."""
    kept = json.loads((DOCS / "engines" / "seen.json").read_text())
    rows: dict[str, str] = kept["cases"]
    parts = []
    for page in dict.fromkeys(engine["page"] for engine in kept["engines"].values()):
        engines = {name: engine for name, engine in kept["engines"].items() if engine["page"] == page}
        head = ("case", *(f"{name} ({engine['date']}, {engine['machine']})" for name, engine in engines.items()))
        cells = ((case.replace("_", " "), *(e["cells"].get(case, "") for e in engines.values())) for case in rows)
        parts.append(f"## {page}\n\nHow to start it: [{page}.md]({page}.md).\n\n{table(head, cells)}")
    legend = table(("case", "holds"), ((case.replace("_", " "), text) for case, text in rows.items()))
    return "\n".join([legend, *parts])


def verdict_page() -> str:
    """docs/verdict.md."""
    conditions = ((str(n), f"`{name}`", text) for n, (name, _, text) in enumerate(CONDITIONS, 1))

    def origin(state: str, others: bool) -> str:
        return f"`{state}`" if state != "*" else "any other" if others else "any"

    rows = (
        (f"`{name}`", origin(state, len(row) > 1), f"`{to}`", f"`{why}`")
        for name, row in TABLE.items()
        for state, (to, why) in row.items()
    )
    return f"""\
# The verdict

Generated from `sidecar/health/verdict.py` and `sidecar/health/reasons.py` by `make docs`. What a verdict rests on is in
[health.md](health.md), which probes it fails in [reference.md](reference.md#verdicts-and-probes), what to do about each
reason in [runbook.md](runbook.md).

## Two times

Readiness is cheap: traffic goes elsewhere. A restart costs minutes of loading. So there are two bounds.

![A silence on a time line](assets/silence.svg)

- **Allowed silence** withdraws readiness (`suspect`). It is the floor, {FLOOR:.0f} s, unless the outstanding work may
  take longer: three times its longest predicted piece, or twice the longest gap that this engine has shown.
- **The kill bound** fails liveness (`stalled`). It is {KILL:.0f} s and what a prefill takes on top, never below what is
  allowed. A canary is asked shortly before the allowed silence ends and is given all the time until then: if it passes,
  nothing is killed.
- Where no canary passes, the engine's own counters may confirm: work runs, and none of them moves. Where they cannot,
  {UNASKED_KILLS:.0f} times the kill bound of users' silence is enough.
- A doubt that comes back within two minutes takes 30 s of calm before the pod is ready again, so that routers see no
  endpoint that flaps.

How a kill may still be held back is in [kill-policy.md](kill-policy.md).

## The balance

A stream that is silent on the wire need not be stuck: a parser holds back the arguments of a tool call, thoughts are
hidden, an answer comes in one piece. A stop-watch cannot tell these from a hang, so tokens are counted: those that the
engine says it generated, less those that streams delivered. What is left was generated for the silent ones.

![The balance of one silent stream](assets/balance.svg)

While the balance rises, the engine works for the silent stream and its time restarts. When the stream is stuck, what is
generated is what the others get, and the balance falls by a quarter of what a working stream would have had. A
stream that would long have all that its client allows is no longer believed. Engines that count no tokens, or only at
the end of a request, get the time of what the client allows (`max_tokens`, else the model's longest context) before
liveness fails.

## Patience over a queue

Two hundred prompts that wait do not make a silence of two hundred prefills normal: the first answer must begin within
the longest one of them, or within one batch.

![Allowed silence over a queue](assets/queue.svg)

A prompt far longer than any that this machine was seen to compute may take until `--silence-cap`, unless
`--coefficients` says how fast it is.

## Figures

Simulated: the production verdict under a simulated clock, 10,000 engine-weeks with the alarms of the
[catalogue](health.md) and of public failure reports, and six rounds of every hang;
`benchmarks/verdict_sim.py --weeks 10000 --trials 6 --seed 32`, 2026-11-30, two shared cores of an AMD EPYC.

| figure | found | with one bound for both probes, 200 weeks |
|---|---|---|
| false kills | 0 in 21,959 events | 16 in 501 |
| healthy requests ended | 0 | 57 |
| readiness withdrawn, queues empty, from the engine's last token: p50 / p99 | 13 / 19 s | p99 103 s |
| readiness withdrawn, queues full, from the engine's last token: p50 / p99 | 12 / 16 s | p99 268 s |
| the same from the fault, after which running requests may go on: p99 | 22 s, 34 s | |
| kill, queues empty or full: p50 / p99 | 77 / 107 s | p99 292 s |
| hangs of public failure reports, with their own reason | 108 of 108 | 2 of 18 |

- The 10,000 weeks before these (seed 31) had 14 false kills. Twelve were the simulator's own: it passed over calm hours
  while a canary or work of others was under way, which was then an hour old. Two were real: a prompt of 560,000 tokens
  past the relay, while the sidecar was restarted. Both were mended. One of those weeks still has one: on a machine 16
  times slower than its coefficients, shared with others' work past the relay, and without counters, an idle engine is
  taken for hung.
- During a prompt far longer than any seen, on a machine of unknown speed, 14 of 72 hangs were found within the trial.
  The others wait for `--silence-cap`.
- Stops that an operator orders past the relay, without any sign, are taken for hangs: 100 such kills.
- An engine that hangs 12, 20 or 30 minutes after each recovery is unready for 1.03 to 1.04 times as long as with
  simple restarts (`benchmarks/brake.py --days 10`, same day and machine); before it was 3.1 to 3.9 times. For
  hangs at random times it is 1.2 to 1.6 times.

The same weeks and hangs at each level of proof, simulated, 2026-12-01, seed 41: 1,730 weeks at each, of the 10,000 that
are wanted, and one round of hangs ([all of it](../benchmarks/results/proof-levels-2026-12-01.md),
`benchmarks/proof_levels.py --weeks 10000 --seed 41 --keep FILE`, which can be resumed). Seconds are p50 / p99,
readiness from the engine's last token.

| seen of the engine | false kills, 3,878 events | hangs found | readiness | killed with a proof | killed without |
|---|---|---|---|---|---|
| nothing | 0 | 49 of 49 | 13 / 20 | 3 of 45: 31 / 31 | 80 / 96 |
| its processes | 0 | 49 of 49 | 13 / 20 | 17 of 45: 31 / 38 | 80 / 96 |
| its steps | 0 | 49 of 49 | 12 / 20 | 3 of 45: 30 / 30 | 80 / 106 |
| both | 0 | 49 of 49 | 12 / 20 | 17 of 45: 30 / 38 | 80 / 106 |

- A lock of all threads that would have been released after up to 60 s is killed by proof, at 52 s in two of these
  weeks: nothing shows that it ends. It counts as a hidden stop, not as a false kill; so do the stops that an operator
  orders past the relay: 14 at each level.

Next to real engines, default settings, stopped by a signal, single runs on a busy machine, 2026-11-30: seconds until
readiness and liveness fail, and from the end of the stop until ready again.

| engine | stopped | idle | amid four streams |
|---|---|---|---|
| llama.cpp build 11669, 4 slots | the server (nothing answers) | 13.5 / 107, 1.0 | 13.0 / 103, 1.2 |
| llama.cpp, 4 slots | its decoding thread | 16.2 / 83, 3.3 | 13.2 / 75, 0.8 |
| llama.cpp, 1 slot | its decoding thread | 23.5 / 87, 3.3 | |
| llama.cpp, router mode | the loaded model's process | 16.5 / 83, 4.0 | |
| SGLang 0.5.23 (CPU) | the scheduler | 13.1 / 80, 3.0 | 13.3 / 76, 1.1 |
| SGLang 0.5.23 (CPU) | the HTTP process | | 12.8 / 103, 0.6 |

- With an engine of which fewer than ten streams have begun, readiness waits for 60 s: the floor is not known yet.
- A stopped detokenizer of SGLang is found late amid streams that it had begun: the scheduler goes on generating for
  them, and that is progress. With requests that go on coming it is found in 15 s (`work_unserved`).
- llama.cpp: 9,000 tokens of prompt on one thread (151 s, gaps of up to 52 s) cost no readiness; one slot's prompt cache
  is taken by no canary but that of the start, and only with `--cache-ram 0`; in router mode no other model is loaded;
  400 of 400 streams, each on a connection of its own, come through.

Targets:

| figure | target |
|---|---|
| false kills and cut healthy requests in 10,000 simulated engine-weeks | 0 |
| readiness withdrawn after a hang of the whole engine, p99, queues empty or full | <= 20 s |
| kill, p99, without a proof beyond silence and a canary | <= 120 s |
| kill, p99, with a proof | <= 40 s |
| hours per day unready of an engine that hangs every 12 or 30 minutes | within 1.3 times those of simple restarts |

## Conditions

Twice a second the first condition that holds decides.

{table(("", "condition", "holds when"), conditions)}
## Transitions

The present state picks the row of the condition that decided. Some reasons are more exact than the one in this table:

- `exempt` and `own_lag` name what holds the verdict back: `draining`, `engine_sleeping`, ...; `own_pause`,
  `clock_jump`, `relay_blind`, `sidecar_restarted`.
- `part` names the part that hangs, `no_progress` and `canary_lost` the cause of the silence (below).
- `awaiting_first_token` becomes `startup_stuck`; `kept` keeps the reason that there was.

{table(("condition", "from", "to", "reason"), rows)}
## Causes of a silence

The first that holds names the reason of a silence of the whole engine. What none explains is `no_progress`, or
`canary_lost` while nothing is outstanding. A cause decides nothing.

{table(("", "reason", "holds when"), ((str(n), f"`{code}`", text) for n, (code, _, text) in enumerate(CAUSES, 1)))}
## Reasons in words

{table(("reason", "meaning"), ((reason_link(code), text) for code, text in (REASON_TEXTS | STATE_TEXTS).items()))}
## As a picture

`any` stands for every state that a condition does not name on its own.

```mermaid
{diagram()}```
"""


def reason_link(code: str) -> str:
    """A code, with its paragraph of the runbook behind it."""
    return f"[`{code}`](runbook.md#{code})"


def diagram() -> str:
    """The table's changes of state as a mermaid diagram; conditions between the same two states share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for name, row in TABLE.items():
        for state, (to, _) in row.items():
            if state != to:
                arrows.setdefault(("any" if state == "*" else state, to), []).append(name)
    lines = [f"    {a} --> {b}: {', '.join(names)}" for (a, b), names in arrows.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> starting", *lines]) + "\n"


def pictures() -> dict[str, Any]:
    """What docs/pictures.py defines; docs is no package."""
    return runpy.run_path(str(DOCS / "pictures.py"))


BLOCKS: Final[dict[str, Callable[[], str]]] = {
    "commands": commands_table,
    "settings": settings_table,
    "flags": flags_tables,
    "endpoints": endpoints_table,
    "errors": errors_table,
    "metrics": metrics_table,
    "verdicts": verdict_table,
    "faults": faults_table,
    "holds": holds_table,
    "families": families_table,
    "image_rows": image_rows_table,
    "pass_reasons": pass_reasons_table,
    "calibration": calibration_tables,
    "hang_classes": hang_classes_table,
    "seen": seen_tables,
    "modes": lambda: cases_table(hang_catalogue.MODES),
    "alarms": lambda: cases_table(hang_catalogue.ALARMS),
}
_BLOCK: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(document: str) -> str:
    """A document with its generated parts written again."""
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}{m[3]}", document)


def outputs() -> dict[Path, str]:
    """Every generated file and its content."""
    safe = ManifestSettings()
    kubernetes = ROOT / "deploy" / "kubernetes"
    group = kubernetes.parent / "lws" / "group.yaml"
    return {
        **{path: filled(text) for path in DOCS.rglob("*.md") if _BLOCK.search(text := path.read_text())},
        DOCS / "verdict.md": verdict_page(),
        **{DOCS / "assets" / name: drawing for name, drawing in pictures()["drawings"]().items()},
        GATEWAY: re.sub(r'(?<= cel: )".*"', f'"{cel.expression(Coefficients())}"', GATEWAY.read_text()),
        **{kubernetes.parent / "helm" / name: text for name, text in chart.files(safe).items()},
        **{kubernetes.parent / "kustomize" / name: text for name, text in component.files(safe).items()},
        group.with_name("group-with-sidecar.yaml"): inject(group.read_text(), InjectSettings())[0],
        kubernetes.parent / "llm-d" / "modelservice-values.yaml": llm_d.render_values(replace(safe, container="vllm")),
        kubernetes / "vllm.yaml": render(safe),
        kubernetes / "vllm-restart-rules.yaml": render(replace(safe, probe="restart-rules")),
        kubernetes / "vllm-dra.yaml": render(replace(safe, gpu_access="dra")),
        kubernetes / "vllm-http-probe.yaml": render(replace(safe, probe="http")),
    }


def differing() -> list[Path]:
    """Generated files that are not what the code says now."""
    return [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]


def main(argv: list[str]) -> int:
    """Write, or check. Returns the exit code."""
    stale, contents = differing(), outputs()
    for path in stale:
        print(f"{'differs: ' if '--check' in argv else 'wrote '}{path.relative_to(ROOT)}")
        if "--check" not in argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents[path])
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
