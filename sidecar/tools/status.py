"""Show how the engine is in one line, and by the exit code.

    sidecar status || sidecar status --json

Exit codes: 0 it is ready; 1 it is not, and the line says why; 3 that is not known: the sidecar does not answer, or it
cannot tell either. 2 is wrong usage, as everywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.flags import address, flag
from sidecar.settings import Settings
from sidecar.tools import terminal
from sidecar.tools.admin_port import NoAnswer, fetch_status
from sidecar.tools.terminal import amount, paint, safe, span

READY, NOT_READY, NOT_KNOWN = 0, 1, 3
# States whose line tells the load; the lines of the others tell what is wrong.
SERVING: Final = frozenset({"progressing", "idle", "quiet"})


@dataclass(frozen=True, slots=True)
class StatusSettings:
    """Settings of `sidecar status`."""

    admin: tuple[str, int] = flag(Settings().admin, address, "Admin address of the sidecar")


def main(settings: StatusSettings, as_json: bool = False) -> int:
    """Print the line. Returns READY, NOT_READY or NOT_KNOWN."""
    terminal.replace_unknown(sys.stdout)
    try:
        status = fetch_status(settings.admin)
    except NoAnswer as e:
        print(json.dumps({"state": None, "error": str(e)}, indent=1) if as_json else f"? {e}")
        return NOT_KNOWN
    print(json.dumps(status, indent=1) if as_json else line(status, colours=terminal.has_colours(sys.stdout)))
    return exit_code(status)


def exit_code(status: Mapping[str, Any]) -> int:
    """What a status is for a script."""
    if status.get("state") == "unknown":
        return NOT_KNOWN
    return READY if _probes(status).get("ready") else NOT_READY


def line(status: Mapping[str, Any], *, colours: bool) -> str:
    """A status in one line: the verdict and since when, the load or what is wrong, and where that is."""
    state = safe(status.get("state", "unknown"))
    is_ready = exit_code(status) == READY
    parts = [] if is_ready else ["not ready" if state != "unknown" else "not judged"]
    parts += ["draining"] if status.get("draining") else []
    if is_ready or state in SERVING:
        parts.append(load_text(status))
    else:
        parts.append(safe(status.get("detail") or status.get("reason", "")))
    what = f"{headline(status, colours=colours)}: {', '.join(parts)}"
    if act := status.get("operator_must_act"):
        what += f"; an operator must act: {safe(act)}"
    return f"{what}; {origin(status)}"


def headline(status: Mapping[str, Any], *, colours: bool) -> str:
    """The verdict with its sign, and for how long it has been so."""
    state = safe(status.get("state", "unknown"))
    age = max(0.0, _number(status, "at") - _number(status, "since"))
    sign, colour = terminal.STATES.get(state, terminal.STATES["unknown"])
    return f"{paint(f'{sign} {state}', 'bold', colour, on=colours)} for {span(max(1.0, age))}"


def load_text(status: Mapping[str, Any]) -> str:
    """Requests, tokens, times and utilization."""
    requests = status.get("requests") or {}
    waiting = f" ({amount(requests['waiting'])} waiting)" if requests.get("waiting") else ""
    count = amount(requests.get("in_flight", 0))
    parts = [f"{count} request{'' if count == '1' else 's'}{waiting}"]
    parts.append(f"{amount(_number(status, 'tokens_per_second'))} tok/s")
    if found := status.get("first_token"):
        parts.append(f"first token {span(found['p50'])} (p95 {span(found['p95'])})")
    if found := status.get("output_token"):
        parts.append(f"token {span(found['p50'])}")
    return ", ".join([*parts, f"load {_number(status, 'utilization'):.0%}"])


def origin(status: Mapping[str, Any]) -> str:
    """Engine, model, pod and node, as far as they are known."""
    engine = " ".join(filter(None, (status.get("engine"), status.get("engine_version")))) or "engine not known yet"
    models = status.get("models") or []
    more = f" and {len(models) - 1} more" if len(models) > 1 else ""
    model = f", {models[0]}{more}" if models else ""
    pod = "/".join(filter(None, (status.get("namespace"), status.get("pod"))))
    where = f" on {pod}" if pod else ""
    return safe(f"{engine}{model}{where}" + (f" ({status['node']})" if status.get("node") else ""))


def _probes(status: Mapping[str, Any]) -> Mapping[str, bool]:
    found = status.get("probes")
    return found if isinstance(found, Mapping) else {}


def _number(status: Mapping[str, Any], key: str) -> float:
    """A number of the status; 0 where there is none."""
    value = status.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
