"""Alerts: each fires on pages recorded from the sidecar in the failure that it is for, and none in healthy hours.

The pages come from the real control state and metrics on a simulated clock; promtool evaluates the rules over them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.events import STATES, FirstToken
from sidecar.load.cost_model import Coefficients
from sidecar.readings import EngineSample, Failed, Value
from sidecar.report.usage_rows import Eviction

from .scraped_pod import GPU, NOTHING, ScrapedPod, promtool_series, samples
from .waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
USED = set(re.findall(r"\bsidecar_\w+", " ".join(rule["expr"] for group in GROUPS for rule in group["rules"])))
PAGE = Value(EngineSample(running=0.0, waiting=0.0, kv_usage=0.1, generation_tokens=1e6), 0.0)
Story = Callable[[ScrapedPod], None]
Firing = tuple[str, dict[str, str], str]  # an alert, its labels, its summary; "" where that has a measured number


def hang(pod: ScrapedPod) -> None:
    """A request gets nothing, and neither do canaries."""
    pod.admit()
    pod.canary = "starved"


# --- healthy hours ---


def idles(pod: ScrapedPod) -> None:
    pod.run(40)


def serves(pod: ScrapedPod) -> None:
    pod.run(40, streams_per_minute=6)


def starts_slowly(pod: ScrapedPod) -> None:
    """Twenty minutes of loading."""
    pod.refused = True
    pod.run(20)
    pod.refused = False
    pod.run(20, streams_per_minute=4)


def sleeps_a_while(pod: ScrapedPod) -> None:
    pod.run(5, streams_per_minute=4)
    pod.resting = "engine_sleeping"
    pod.run(20)
    pod.resting = ""
    pod.run(10, streams_per_minute=4)


def hangs_once(pod: ScrapedPod) -> None:
    """A stall that its restart ends: nothing for an operator to do."""
    pod.run(20, streams_per_minute=4)
    hang(pod)
    pod.until("stalled")
    pod.settle(str(pod.requests), "stalled")
    pod.refused = True
    pod.run(3)
    pod.refused, pod.canary = False, "ok"
    pod.run(20, streams_per_minute=4)


def sidecar_restarts(pod: ScrapedPod) -> None:
    """One scrape gets no answer, and counters begin again at 0."""
    pod.run(10, streams_per_minute=4)
    pod.up = False
    pod.run(1)
    pod.up = True
    pod.start()
    pod.run(20, streams_per_minute=4)


def clients_err(pod: ScrapedPod) -> None:
    """Clients leave, send what the relay rejects, and a request in fifty fails in the engine."""
    for minute in range(30):
        pod.serve(6)
        pod.serve(3, outcome="client_cancelled")
        pod.serve(2, outcome="rejected")
        if minute % 10 == 9:
            pod.serve(1, outcome="engine_error")
        pod.run(1)


def few_prompts_are_long(pod: ScrapedPod) -> None:
    """One stream in two hundred gets its first token late."""
    for minute in range(40):
        pod.serve(1, first_token_s=5.0 if minute % 20 == 0 else 0.2)
        pod.run(1, streams_per_minute=9)


def database_misses_a_write(pod: ScrapedPod) -> None:
    for minute in range(25):
        pod.metrics.database_written("failed" if minute == 12 else "ok")
        pod.run(1)


HEALTHY: tuple[Story, ...] = (
    *(idles, serves, starts_slowly, sleeps_a_while, hangs_once, sidecar_restarts, clients_err),
    few_prompts_are_long,
    database_misses_a_write,
)

# --- failures ---


def stall_lasts(pod: ScrapedPod) -> None:
    pod.run(5, streams_per_minute=4)
    hang(pod)
    pod.until("stalled")
    pod.run(4)


def gpu_falls_off(pod: ScrapedPod) -> None:
    """XID 79, the first error ever, and a hang."""
    pod.run(5, streams_per_minute=4)
    pod.gpus = Value((replace(GPU, xid_errors=((79, 1),)),), 0.0)
    hang(pod)
    pod.until("stalled")
    pod.run(4)


def xid_unknown_to_us(pod: ScrapedPod) -> None:
    """An error whose series begins with it."""
    pod.run(5)
    pod.gpus = Value((replace(GPU, xid_errors=((777, 1),)),), 0.0)
    pod.run(5)


def xid_before_the_first_scrape(pod: ScrapedPod) -> None:
    pod.gpus = Value((replace(GPU, xid_errors=((31, 1),)),), 0.0)
    pod.run(5)


def restarts_again_and_again(pod: ScrapedPod) -> None:
    for _ in range(4):
        pod.run(8, streams_per_minute=6)
        hang(pod)
        pod.until("stalled")
        pod.run(1)
        pod.settle(str(pod.requests), "stalled")
        pod.refused = True
        pod.run(1)
        pod.refused, pod.canary = False, "ok"
        pod.run(1)


def work_stands_still(pod: ScrapedPod) -> None:
    """Canaries pass, a user's request does not move."""
    pod.run(5, streams_per_minute=4)
    pod.admit()
    pod.until("suspect")
    pod.run(6)


def never_starts(pod: ScrapedPod) -> None:
    pod.refused = True
    pod.run(40)


def killed_sidecar(pod: ScrapedPod) -> None:
    pod.run(10)
    pod.up = False
    pod.run(6)


def sleeps_for_long(pod: ScrapedPod) -> None:
    pod.run(5)
    pod.resting = "engine_sleeping"
    pod.run(40)


def first_burst_fails(pod: ScrapedPod) -> None:
    """Nothing ever failed; then twenty requests do, at once, and the users are gone."""
    pod.run(10)
    pod.serve(20, outcome="engine_error")
    pod.run(3)


def fails_before_the_first_scrape(pod: ScrapedPod) -> None:
    pod.serve(20, outcome="engine_error")
    pod.run(3)


def full(pod: ScrapedPod) -> None:
    """More model units in flight than meet the objective."""
    pod.run(2)
    ids = [pod.admit(3500, 100_000) for _ in range(40)]
    for id in ids:
        pod.event(FirstToken(id, pod.now))
    pod.run(13, decoding=ids)


def answers_garbage(pod: ScrapedPod) -> None:
    pod.run(5)
    pod.digest = "b"
    pod.run(10)


def takes_no_canary(pod: ScrapedPod) -> None:
    pod.canary = "rejected"
    pod.run(20, streams_per_minute=2)


def other_model(pod: ScrapedPod) -> None:
    pod.models = ("another",)
    pod.run(65)


def disk_too_small(pod: ScrapedPod) -> None:
    pod.run(5)
    pod.fan_out.on_evictions([Eviction("size", 3, 5, 2.5, 8.0, 0, 60)])
    pod.run(2)


def database_down(pod: ScrapedPod) -> None:
    """It took a write each minute, then none."""
    for minute in range(40):
        pod.metrics.database_written("ok" if minute < 5 else "failed")
        pod.run(1)


def metrics_page_gone(pod: ScrapedPod) -> None:
    pod.page = PAGE
    pod.run(5)
    pod.page = Failed("no answer from /metrics within 2 s")
    pod.run(7)


def starved_of_cpu(pod: ScrapedPod) -> None:
    pod.run(5)
    pod.lag = 0.9
    pod.run(7)


def files_run_out(pod: ScrapedPod) -> None:
    pod.run(5)
    pod.open_files = 1000
    pod.run(3)


def first_tokens_are_late(pod: ScrapedPod) -> None:
    """From one minute on, half of the streams."""
    pod.run(10, streams_per_minute=4)
    for _ in range(15):
        pod.serve(2, first_token_s=6.0)
        pod.run(1, streams_per_minute=2)


def one_first_token_in_ten_is_late(pod: ScrapedPod) -> None:
    for _ in range(25):
        pod.serve(1, first_token_s=6.0)
        pod.run(1, streams_per_minute=9)


MEASURED = Coefficients(model="m", fingerprint="f", source="file")
POD = {"instance": "a"}
STALLED = ("EngineStalled", POD, "The engine of a hangs, and no restart has helped")
FAILING = ("EngineFailsRequests", {}, "100% of the requests of llm fail in the engine")
RELAY = {**POD, "process": "relay-0"}


def xid(number: int) -> Firing:
    return "GpuXidErrors", {**POD, "gpu": "0", "xid": str(number)}, f"XID {number} on GPU 0 of a"


FAILURES: tuple[tuple[Story, tuple[Firing, ...]], ...] = (
    (stall_lasts, (STALLED,)),
    (
        gpu_falls_off,
        (
            STALLED,
            xid(79),
            (
                "EngineHandedOver",
                {**POD, "reason": "node_needs_reboot"},
                "a needs an operator (node_needs_reboot): restarts do not help",
            ),
        ),
    ),
    (xid_unknown_to_us, (xid(777),)),
    (xid_before_the_first_scrape, (xid(31),)),
    (restarts_again_and_again, (("EngineRestartsOften", POD, ""),)),
    (work_stands_still, (("EngineUnready", {**POD, "reason": "work_stuck"}, "a is not ready (work_stuck)"),)),
    (never_starts, (("EngineStartupStuck", POD, "The engine of a has been starting for more than half an hour"),)),
    (killed_sidecar, (("SidecarDown", POD, "The sidecar of a does not answer: nothing watches its engine"),)),
    (
        sleeps_for_long,
        (
            (
                "EngineNotJudged",
                {**POD, "verdict": "exempt"},
                "The engine of a has not been judged for half an hour (exempt)",
            ),
        ),
    ),
    (first_burst_fails, (FAILING,)),
    (fails_before_the_first_scrape, (FAILING,)),
    (full, (("EnginesSaturated", {}, ""),)),
    (answers_garbage, (("GarbageOutput", POD, "a answers canaries differently than usual"),)),
    (
        takes_no_canary,
        (("NoCanaryPasses", POD, "No canary passes at a: a hang of its engine is found by users' silence alone"),),
    ),
    (
        other_model,
        (
            (
                "CoefficientsStale",
                {},
                "The model units of llm no longer match the measured load; run `sidecar calibrate`",
            ),
        ),
    ),
    (
        disk_too_small,
        (("UsageRecordsDropped", POD, "The sidecar of a dropped usage records of requests that cost something"),),
    ),
    (database_down, (("UsageDatabaseDown", POD, "The sidecar of a cannot write usage records to its database"),)),
    (metrics_page_gone, (("SidecarBlind", {**POD, "signal": "scrape"}, "The sidecar of a cannot read `scrape`"),)),
    (starved_of_cpu, (("SidecarStarved", RELAY, "relay-0 of a gets too little CPU: 900ms late"),)),
    (files_run_out, (("SidecarFilesLow", RELAY, "relay-0 of a has 97.66% of its files open"),)),
    (first_tokens_are_late, (("TimeToFirstTokenBurn", {}, ""),)),
    (one_first_token_in_ten_is_late, (("TimeToFirstTokenBurn", {}, ""),)),
)


def recorded(story: Story) -> list[str | None]:
    pod = ScrapedPod(co=MEASURED if story is other_model else Coefficients())
    story(pod)
    return pod.pages


def check(pages: list[str | None], tests: dict[str, Any], folder: Path, promtool: Path) -> None:
    """promtool finds that the rules say of these pages what `tests` expects."""
    group = {"interval": "1m", "input_series": promtool_series(pages, USED), **tests}
    whole = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [group]}
    (folder / "test.yaml").write_text(yaml.safe_dump(whole))
    done = subprocess.run(
        [promtool, "test", "rules", folder / "test.yaml"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr


def silent(pages: list[str | None], *besides: str) -> list[dict[str, Any]]:
    """At none of the pages does any alert fire but those of `besides`."""
    query = f'count by (alertname) (ALERTS{{alertstate="firing", alertname!~"{"|".join(besides)}"}})'
    return [{"expr": query, "eval_time": f"{minute}m", "exp_samples": []} for minute in range(len(pages))]


def expected(firing: Firing) -> tuple[dict[str, str], dict[str, str]]:
    """Labels and annotations of an alert as promtool shows them: the rule's texts with the labels filled in."""
    name, labels, summary = firing
    rule = next(rule for rule in ALERTS if rule["alert"] == name)
    labels = {"job": "llm", **labels}
    texts = {
        key: re.sub(r"{{ \$labels\.(\w+) }}", lambda match: labels[match[1]], text)
        for key, text in rule["annotations"].items()
    }
    return {**labels, **rule["labels"]}, {**texts, "summary": summary}


@pytest.mark.parametrize("story", HEALTHY, ids=lambda story: story.__name__)
def test_no_alert_fires_in_healthy_hours(story: Story, requires: Callable[[str], Path], tmp_path: Path) -> None:
    """Work, rest, a start, a planned sleep, a restart that helps, and users' own errors wake up no operator."""
    pages = recorded(story)
    check(pages, {"promql_expr_test": silent(pages)}, tmp_path, requires("promtool"))


@pytest.mark.parametrize(("story", "firing"), FAILURES, ids=lambda value: getattr(value, "__name__", ""))
def test_each_failure_fires_its_alert_and_no_other(
    story: Story, firing: tuple[Firing, ...], requires: Callable[[str], Path], tmp_path: Path
) -> None:
    """At the last page exactly these alerts fire, with the texts that an operator reads; no other one ever does."""
    promtool, pages = requires("promtool"), recorded(story)
    last, names = f"{len(pages) - 1}m", sorted({name for name, _, _ in firing})
    found = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    queries = [{"expr": query, "eval_time": last, "exp_samples": found}, *silent(pages, *names)]
    alerts = []
    for one in firing:
        if one[2]:
            labels, texts = expected(one)
            exp = [{"exp_labels": labels, "exp_annotations": texts}]
            alerts.append({"eval_time": last, "alertname": one[0], "exp_alerts": exp})
    check(pages, {"promql_expr_test": queries, "alert_rule_test": alerts}, tmp_path, promtool)


def test_every_alert_has_its_failure() -> None:
    """No alert is without a recorded failure that fires it; both burn rates have one."""
    fired = [name for _, firing in FAILURES for name, _, _ in firing]
    assert set(fired) == {rule["alert"] for rule in ALERTS}
    assert fired.count("TimeToFirstTokenBurn") == len([r for r in ALERTS if r["alert"] == "TimeToFirstTokenBurn"]) == 2


def test_every_verdict_that_is_not_well_has_an_alert() -> None:
    """Nothing ends at a verdict that only a page shows."""
    text = " ".join(rule["expr"] for rule in ALERTS)
    assert "sidecar_doubt" in text  # those of `suspect`
    alerted = {state for match in re.findall(r'verdict=~?"([\w|]+)"', text) for state in match.split("|")}
    assert {*alerted, "suspect"} == set(STATES) - {"idle", "progressing", "quiet"}


def test_an_alert_of_increase_also_takes_a_series_that_appears() -> None:
    """`increase` in an alert or its recordings is of a counter that exists at 0 on the first page, or is guarded."""
    first = samples(ScrapedPod(gpus=NOTHING).fresh_page())
    known = {name for (name, _), value in first.items() if value == 0}
    for rule in (rule for group in GROUPS for rule in group["rules"]):
        for name in re.findall(r"increase\((sidecar_\w+)", rule["expr"]):
            assert name in known or f"{name} unless {name} offset" in rule["expr"], rule
