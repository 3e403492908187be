"""`sidecar forecast`: the coming day from the days before, from usage records and from Prometheus."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from sidecar.__main__ import run
from sidecar.load.scaling_rule import ScalingRule
from sidecar.load.seasonal_forecast import forecast_of
from sidecar.report.usage_rows import DAY_S, HOUR_S, QUARTER_S, PendingUsage, Rate, UsageKey, UsageSums, idle_key
from sidecar.report.usage_store import UsageStore
from sidecar.tools.forecast import SLOTS, ForecastSettings, NoHistory, choose, forecast, history
from sidecar.tools.scaled_object import scaled_object
from tests.test_deploy import KEDA_METADATA, KEDA_SPEC

MIDNIGHT = 1_800_057_600  # a Saturday, 2027-01-16
RATE = Rate("f", 8, 2.5)


def office(at: int) -> float:
    """Replicas kept busy: 5.6 on working days from 9 to 17, 0.3 otherwise."""
    weekday, hour = time.gmtime(at).tm_wday, time.gmtime(at).tm_hour
    return 5.6 if weekday < 5 and 9 <= hour < 17 else 0.3


def office_days(days: int, until: int = MIDNIGHT) -> tuple[int, list[float]]:
    first = until - days * DAY_S
    return first, [office(at) for at in range(first, until, QUARTER_S)]


@pytest.mark.parametrize(("busy_days", "expected"), [(7, 5.6), (5, 5.6), (4, 5.6), (2, 0.3), (0, 0.3)])
def test_what_most_days_asked_for(busy_days: int, expected: float) -> None:
    """A job of four of seven days is expected on each of them, one of two days is not."""
    days = [[5.6 if day < busy_days and 36 <= slot < 68 else 0.3 for slot in range(SLOTS)] for day in range(7)]
    demand = [value for day in days for value in day]
    assert forecast_of(demand, 7 * SLOTS + 48, SLOTS) == expected
    assert forecast_of(demand, 7 * SLOTS + 80, SLOTS) == 0.3


def test_a_forecast_knows_the_past_only() -> None:
    """The day that is forecast, and what follows, does not change it; without a past there is none."""
    _, demand = office_days(14)
    slot = 10 * SLOTS + 40
    assert forecast_of(demand[: 10 * SLOTS], slot, SLOTS) == forecast_of([*demand[: 10 * SLOTS], *[99.0]], slot, SLOTS)
    assert forecast_of([], 50, SLOTS) == 0.0


def test_spans_cover_the_day_and_begin_early() -> None:
    """Without gaps; the replicas of the morning are there a quarter of an hour before it."""
    first, demand = office_days(7, MIDNIGHT - 3 * DAY_S)  # until Wednesday
    now = MIDNIGHT - 3 * DAY_S + 60
    spans = forecast(first, demand, now, ForecastSettings(target=0.7))
    assert [(s.start - now + 60, s.end - now + 60, s.replicas) for s in spans] == [
        (0, 9 * HOUR_S - QUARTER_S, 1),
        (9 * HOUR_S - QUARTER_S, 17 * HOUR_S + QUARTER_S, 8),
        (17 * HOUR_S + QUARTER_S, DAY_S, 1),
    ]
    with pytest.raises(NoHistory, match="at least a day"):
        forecast(first, demand[:40], now, ForecastSettings())
    assert max(s.replicas for s in forecast(first, demand, now, ForecastSettings(most=3))) == 3


def records(folder: Path, now: int, days: int) -> Path:
    """Usage records of a model that was busy as `office`, and of another one that was not."""
    folder.mkdir()
    store = UsageStore(folder, 35, 64 << 20)
    batch = PendingUsage()
    for at in range(now - days * DAY_S, now, QUARTER_S):
        used = office(at) * QUARTER_S * RATE.gpus
        batch.add(PendingUsage({UsageKey(at, QUARTER_S, "a", "llama", "ok", "told", RATE): UsageSums(1, 1.0, used)}))
        batch.add(PendingUsage({UsageKey(at, QUARTER_S, "a", "small", "ok", "told", RATE): UsageSums(1, 1.0, 80.0)}))
        batch.add(PendingUsage({idle_key(at, RATE): UsageSums(gpu_seconds=1000.0)}))
    store.write(batch, float(now - 9 * DAY_S))
    return folder


def test_from_usage_records(tmp_path: Path, capsys: Any) -> None:
    """KEDA's triggers, numbers, and a gauge, for one model; idle time is no demand."""
    now = int(time.time()) // QUARTER_S * QUARTER_S
    folder = records(tmp_path / "state", now, 8)
    flags = ("--state-dir", str(folder), "--model", "llama")
    assert run(["forecast", *flags, "--format", "json"]) == 0
    spans = json.loads(capsys.readouterr().out)
    peak = max(span["replicas"] for span in spans)
    assert peak in (math.ceil(0.8 * 5.6 / 0.7 - 0.05), 8) and min(span["replicas"] for span in spans) == 1
    assert run(["forecast", *flags]) == 0
    triggers = yaml.safe_load(capsys.readouterr().out)
    assert {t["type"] for t in triggers} == {"cron"} and len(triggers) == len(spans)
    assert {"timezone", "start", "end", "desiredReplicas"} == set(triggers[0]["metadata"])
    assert run(["forecast", *flags, "--format", "prometheus"]) == 0
    assert f"sidecar_forecast_replicas {spans[0]['replicas']}\n" in capsys.readouterr().out
    assert run(["forecast", "--state-dir", str(tmp_path)]) == 1
    assert "no usage records" in capsys.readouterr().err


class Prometheus(BaseHTTPRequestHandler):
    """Answers a range query with `office`, or as `answer` says."""

    answer = ""

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        start, end, step = (int(asked[name]) for name in ("start", "end", "step"))
        values = [[at, "NaN" if at % (7 * step) == 0 else str(office(at))] for at in range(start, end + 1, step)]
        found = {"status": "success", "data": {"result": [{"metric": {}, "values": values}]}}
        body = (self.answer or json.dumps(found)).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Prometheus) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_from_prometheus(prometheus: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from a range query; an answer that is none, or of several series, is an error of one line."""
    assert run(["forecast", "--prometheus", prometheus, "--format", "json", "--hours", "168"]) == 0
    assert max(span["replicas"] for span in json.loads(capsys.readouterr().out)) == 8
    for answer in ("<html>", '{"data": {"result": []}}', '{"data": {"result": [{}, {}]}}', "[]"):
        monkeypatch.setattr(Prometheus, "answer", answer)
        assert run(["forecast", "--prometheus", prometheus]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert run(["forecast", "--prometheus", "http://127.0.0.1:9"]) == 1


# --- settings of the whole rule ---


def test_settings_are_those_that_would_have_kept_the_share() -> None:
    """Bursts need more than a steady load; faster starts and a smaller share need less; a day is the least history."""
    steady = [2.0] * (2 * DAY_S // 60)
    bursts = [6.0 * (at % 240 < 20) for at in range(2 * DAY_S // 60)]
    paid = {}
    for start, keep in ((5, 0.8), (180, 0.7), (180, 0.85)):
        chosen = choose(bursts, ForecastSettings(start_seconds=start, keep=keep))
        assert chosen.days == 2 and 6 <= chosen.static <= 7
        paid[start, keep] = chosen.tried.paid
        assert chosen.tried.kept >= keep * chosen.tried.asked
    assert paid[5, 0.8] < paid[180, 0.85] and paid[180, 0.7] <= paid[180, 0.85]
    assert choose(steady, ForecastSettings(start_seconds=180)).tried.kept > 0.998 * sum(steady) * 60
    assert choose(steady, ForecastSettings(start_seconds=60, least=4)).rule.floor == 4
    with pytest.raises(NoHistory, match="at least a day"):
        choose(steady[:1000], ForecastSettings(start_seconds=60))


def test_requests_count_when_they_came(tmp_path: Path) -> None:
    """A record has the minute in which a request ended; what it asked for came by its duration earlier."""
    now = int(time.time()) // 60 * 60
    tmp_path.joinpath("state").mkdir()
    store = UsageStore(tmp_path / "state", 35, 64 << 20)
    batch = PendingUsage()
    batch.add(PendingUsage({UsageKey(now - 7200, 60, "a", "m", "ok", "told", RATE): UsageSums(1, 1.0, 240.0)}))
    batch.add(
        PendingUsage({UsageKey(now - 600, 60, "a", "m", "ok", "told", RATE): UsageSums(2, 1.0, 480.0, seconds=600.0)})
    )
    store.write(batch, float(now - 7200))
    first, demand = history(ForecastSettings(state_dir=str(tmp_path / "state")), now, 60)
    assert first == now - 7200
    assert {at: busy for at, busy in enumerate(demand) if busy} == {0: 0.5, (7200 - 900) // 60: 1.0}


def test_one_command_prints_the_settings(tmp_path: Path, prometheus: str, capsys: Any) -> None:
    """From records as JSON, with what they would have kept; from Prometheus a spec that KEDA takes."""
    now = int(time.time()) // QUARTER_S * QUARTER_S
    folder = records(tmp_path / "state", now, 2)
    flags = ("--start-seconds", "60", "--keep", "0.98")
    assert run(["forecast", "--state-dir", str(folder), "--model", "llama", *flags, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rule, trial = found["rule"], found["trial"]
    assert trial["days"] == 2 and trial["kept"] >= 0.98 and trial["static_replicas"] == 6
    assert trial["replica_hours"] < 2 * 24 * 6 and found["floors"][0]["replicas"] >= rule["floor"] == 1
    assert run(["forecast", "--prometheus", prometheus, *flags]) == 0
    spec = yaml.safe_load(capsys.readouterr().out)
    reactive, *crons = spec["triggers"]
    assert set(spec) <= KEDA_SPEC and set(reactive["metadata"]) <= KEDA_METADATA["prometheus"]
    assert spec["minReplicaCount"] == 1 and reactive["metadata"]["serverAddress"] == prometheus
    assert 0.4 <= float(reactive["metadata"]["threshold"]) <= 0.95 and "max_over_time" in reactive["metadata"]["query"]
    assert {t["type"] for t in crons} <= {"cron"}


@pytest.mark.parametrize("floor", [0, 1])
def test_the_query_is_promql(floor: int, requires: Any, tmp_path: Path) -> None:
    """promtool takes it; without a floor the comment names the trigger that starts the first pod."""
    rule = ScalingRule(0.65, 15.0, 1200, floor)
    text = scaled_object(["why"], rule, 2.0, 8, "", [])
    query = yaml.safe_load(text)["triggers"][0]["metadata"]["query"]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "q", "rules": [{"record": "q", "expr": query}]}]})
    )
    done = subprocess.run(
        [requires("promtool"), "check", "rules", str(tmp_path / "rules.yaml")], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    assert ("scale-to-zero.yaml" in text) is (floor == 0)
