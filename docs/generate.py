"""Writes what documents take from the code: tables of the README, docs/verdict.md, tables of other documents, deploy/kubernetes.

    python docs/generate.py            write      (make docs)
    python docs/generate.py --check    exit 1 and name the files that differ

Rules: what is written depends on the code alone, on docs/verdict-figures.md and on the last runs in benchmarks/results; prose stands in the documents, between the marks stands what is generated.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from sidecar import settings
from sidecar.events import STATES, State
from sidecar.health.kill_policy import ESCALATIONS, HOLDS
from sidecar.health.probes import FAILS
from sidecar.health.reasons import CAUSES, REASON_TEXTS
from sidecar.health.verdict import CONDITIONS, TABLE
from sidecar.kernels import families
from sidecar.kernels.grid import ROWS, STRIPS, TILES, PatchSpec, TileSpec
from sidecar.load.cost_model import Coefficients
from sidecar.report.metrics import METRICS
from sidecar.settings import Settings, spelled
from sidecar.tools import cel
from sidecar.tools.manifests.render import render
from sidecar.tools.manifests.settings import ManifestSettings
from sidecar.tools.scripted_engine import hang_catalogue
from sidecar.tools.scripted_engine.faults import FAULTS
from sidecar.tools.scripted_engine.hang_catalogue import OWED, HangCase

ROOT: Final = Path(__file__).resolve().parent.parent
GATEWAY: Final = ROOT / "deploy" / "envoy-ai-gateway" / "milli-mu.yaml"
RESULTS: Final = ROOT / "benchmarks" / "results"
FIGURES: Final = ROOT / "docs" / "verdict-figures.md"  # of runs, kept by hand

ACCURACY: Final = r"MAPE ([\d.]+)%, P90 ([\d.]+)%, R2 [-\d.]+"  # as `sidecar calibrate` reports it

MEANING: Final[dict[State, str]] = {
    "starting": "no token yet since the engine started",
    "idle": "nothing is outstanding",
    "progressing": "tokens moved within the last two seconds",
    "quiet": "work is outstanding and silent, within the time that it may be",
    "suspect": "silent for too long; a canary is under way to confirm",
    "stalled": "silent for too long, and the canary failed or starved too",
    "dead": "no connection is taken",
    "exempt": "asleep, paused, or draining: not judged",
    "unknown": "the sidecar cannot tell, and says so; no probe fails",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""
    lines = [list(head), *(list(row) for row in rows)]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(lines[0]), *texts[1:]]) + "\n"


def settings_table() -> str:
    """Every setting of `sidecar run`."""
    return table(
        ("flag", "default", "meaning"),
        ((f"`{spelled(f.name)}`", shown(f), f.metadata["help"]) for f in fields(Settings)),
    )


def shown(f: Any) -> str:
    """A setting's default, as `--help` shows it."""
    text = settings.shown(f)
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

    def numbers(values: Iterable[int]) -> str:
        return ", ".join(map(str, values))

    rows = ((f"`{name}`", f.text, numbers(f.modes), numbers(f.alarms)) for name, f in FAULTS.items())
    return table(("fault", "what it does", "hang modes", "alarms"), rows)


def cases_table(cases: Iterable[HangCase]) -> str:
    """Every case of the catalogue: how it is played, and what is owed to it."""
    rows = ((str(c.number), c.text, codes(c.faults), OWED[c.owed], codes(c.reasons)) for c in cases)
    return table(("", "case", "fault", "what is owed", "reason"), rows)


def codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def holds_table() -> str:
    """Why a stalled engine is not killed now, and what ends that."""
    rows = ((f"`{reason}`", text, ESCALATIONS.get(reason, "time")) for reason, _, text in HOLDS)
    return table(("reason", "holds when", "what ends it"), rows)


def families_table() -> str:
    """Every known image processor: what it does, and what /v1/preprocess makes."""
    rows = []
    lies = {TILES: "tiles", ROWS: "patches", STRIPS: "patches"}
    for name in families.FAMILIES:
        usual = {"size": {"shortest_edge": 336}, "crop_size": 336} if name == "LlavaNextImageProcessor" else {}
        spec = families.from_config({"image_processor_type": name, **usual})
        assert spec is not None, f"{name} cannot be read with usual settings"
        made = "patches" if isinstance(spec, PatchSpec) else "planes" if spec.tensors else "not made here"
        made = lies[spec.layout] if isinstance(spec, TileSpec) else made
        rows.append((f"`{name}`", (type(spec).__doc__ or "").splitlines()[0], made, "yes" if spec.inline else "passes"))
    return table(("processor", "what it does", "`pixel_values`", "inline, shm"), rows)


def calibration_tables() -> str:
    """What the last runs of benchmarks/calibration.py found, of each model: errors on held-out shapes, and the runs themselves."""
    errors, runs, plots = [], [], []
    for kind in ("text", "vision"):
        path = max(RESULTS.glob(f"calibration-{kind}-*.md"))
        told = path.read_text()
        for name, *numbers in re.findall(
            rf"^(held out|of these \w+): {ACCURACY}; alpha-beta line: {ACCURACY}", told, re.MULTILINE
        ):
            mape, p90, line, line_p90 = map(float, numbers)
            met = "met" if mape <= 10 and p90 <= 25 and mape <= line / 2 else "missed"
            shapes = f"{kind} model" if name == "held out" else f"its {name.removeprefix('of these ')} alone"
            row = (shapes, f"{mape} % / {p90} %", f"{line} % / {line_p90} %", met if name == "held out" else "")
            errors.append(row)
        varies, apart, waited = (float(n) for n in re.findall(r"(?:shapes|lie|differ by|core in) ([\d.]+)%", told))
        seconds, date, took = re.findall(r"--seconds (\S+)`, (\S+); (\d+) s", told)[0]
        (unit,) = re.findall(r"1 MU = ([\d.]+)", told)
        met = "met" if varies <= 10 else "missed"
        runs.append(
            (
                f"{kind} model",
                date,
                f"{took} s of {seconds}",
                f"{varies} % ({met})",
                f"{apart} %",
                f"{waited} %",
                f"{unit} ms",
            )
        )
        plots.append(f"![{kind} model](../benchmarks/results/{path.stem}.svg)")
    found = table(
        ("held-out shapes", "cost model, MAPE / P90", "alpha-beta line", "<= 10 % / 25 %, half of the line's"), errors
    )
    of = ("", "run on", "took", "capacity varies (<= 10 %)", "turns of a shape apart", "without a core", "1 MU")
    return "\n".join([found, table(of, runs), " ".join(plots), ""])


def verdict_page() -> str:
    """docs/verdict.md."""
    conditions = ((str(n), f"`{name}`", text) for n, (name, _, text) in enumerate(CONDITIONS, 1))
    rows = (
        (f"`{name}`", "any other" if state == "*" and len(row) > 1 else "any" if state == "*" else f"`{state}`", f"`{to}`", f"`{why}`")
        for name, row in TABLE.items()
        for state, (to, why) in row.items()
    )  # fmt: skip
    return f"""\
# The verdict

Generated from `sidecar/health/verdict.py` and `sidecar/health/probes.py` by `make docs`. Why it is so: [health.md](health.md).

## Verdicts

{verdict_table()}
`/startupz` passes once the engine has served a token since it started, or has refused the canary itself (4xx) three times; never
while the verdict is `stalled` or `dead`.

## Conditions

Twice a second the first condition that holds decides.

{table(("", "condition", "holds when"), conditions)}
## Transitions

The present state picks the line of the condition that decided. Some reasons are more exact than the one in this table: `exempt`
and `own_lag` name what holds the verdict back (`draining`, `engine_sleeping`, ...; `own_pause`, `clock_jump`, `relay_blind`), `part`
the part that hangs, `no_progress` the cause of the silence (below), `awaiting_first_token` becomes `startup_stuck`; `kept` keeps
the reason that there was.

{table(("condition", "from", "to", "reason"), rows)}
## Causes of a silence

The first that holds names the reason of a silence of the whole engine; what none explains is `no_progress`. A cause decides nothing.

{table(("", "reason", "holds when"), ((str(n), f"`{code}`", text) for n, (code, _, text) in enumerate(CAUSES, 1)))}
## Reasons in words

{table(("reason", "meaning"), ((f"`{code}`", text) for code, text in REASON_TEXTS.items()))}
## As a picture

`any` stands for every state that a condition does not name on its own.

```mermaid
{diagram()}```

{FIGURES.read_text()}"""


def diagram() -> str:
    """The table's changes of state as a mermaid diagram; conditions between the same two states share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for name, row in TABLE.items():
        for state, (to, _) in row.items():
            if state != to:
                arrows.setdefault(("any" if state == "*" else state, to), []).append(name)
    lines = [f"    {a} --> {b}: {', '.join(names)}" for (a, b), names in arrows.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> starting", *lines]) + "\n"


BLOCKS: Final[dict[str, Callable[[], str]]] = {
    "settings": settings_table,
    "metrics": metrics_table,
    "verdicts": verdict_table,
    "faults": faults_table,
    "holds": holds_table,
    "families": families_table,
    "calibration": calibration_tables,
    "modes": lambda: cases_table(hang_catalogue.MODES),
    "alarms": lambda: cases_table(hang_catalogue.ALARMS),
}
_BLOCK: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(document: str) -> str:
    """A document with its generated parts made anew."""
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}{m[3]}", document)


def outputs() -> dict[Path, str]:
    """Every generated file and its content."""
    safe = ManifestSettings()
    kubernetes = ROOT / "deploy" / "kubernetes"
    return {
        **{
            path: filled(path.read_text())
            for path in (
                ROOT / "README.md",
                *(ROOT / "docs" / f"{page}.md" for page in ("health", "fleet", "images", "model-units")),
            )
        },
        ROOT / "docs" / "verdict.md": verdict_page(),
        GATEWAY: re.sub(r'(?<= cel: )".*"', f'"{cel.expression(Coefficients())}"', GATEWAY.read_text()),
        kubernetes / "vllm.yaml": render(safe),
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
