"""ORCA reports: the header's three forms, the message, and the stream over gRPC."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from sidecar.control.relay_pool import RelayPool
from sidecar.errors import StartError
from sidecar.events import LoadReport, LoadSubscribed
from sidecar.launch.preflight import reserve
from sidecar.readings import EngineSample, Failed, Value
from sidecar.report import orca, orca_proto, orca_server
from sidecar.report.orca_proto import Report as OrcaLoadReport
from sidecar.report.orca_proto import Request as OrcaLoadReportRequest
from sidecar.runtime.channel import Channel

from ..waiting import PATIENCE
from .snapshots import ENGINE, LOAD

FORMS = pytest.mark.parametrize(
    "form", [orca.OrcaReport.json, orca.OrcaReport.text, orca.OrcaReport.binary], ids=lambda f: f.__name__
)
Form = Callable[[orca.OrcaReport], str]


def read(header: str) -> dict[str, Any]:
    """The numbers of any form, by dotted name."""
    form, _, rest = header.partition(" ")
    if form == "TEXT":
        return {k: float(v) for k, v in (pair.split("=") for pair in rest.split(", "))}
    if form == "BIN":
        message = OrcaLoadReport.FromString(orca.message(header))
        fields = {f.name: value for f, value in message.ListFields()}
    else:
        assert form == "JSON"
        fields = json.loads(rest)
    named = fields.pop("named_metrics")
    return fields | {f"named_metrics.{k}": v for k, v in named.items()}


def weight(report: dict[str, Any]) -> int:
    """The integer weight that Envoy computes from a report."""
    utilization = report["application_utilization"] + report.get("eps", 0.0) / report["rps_fractional"]
    return int(report["rps_fractional"] / utilization)


@FORMS
def test_a_report_carries_utilisation_thrice_and_vllms_own_two(form: Form) -> None:
    """All utilizations are equal, the rate is in milli-MU per second, and vLLM's own values are kept."""
    assert read(form(orca.report(LOAD, ENGINE, 0.41))) == {
        "rps_fractional": pytest.approx(500),
        "application_utilization": 0.41,
        "cpu_utilization": 0.41,
        "mem_utilization": 0.3,
        "named_metrics.mu_utilization": 0.41,
        "named_metrics.mu_in_flight": 3.2,
        "named_metrics.requests_per_second": 0.7,
        "named_metrics.kv_cache_usage_perc": 0.3,
        "named_metrics.num_requests_waiting": 3.0,
        "named_metrics.predicted_ttft_seconds": 0.6,
        "named_metrics.predicted_tpot_seconds": 0.03,
    }


@FORMS
@pytest.mark.parametrize("capacity", [0.0, 100.0])
def test_an_idle_engine_still_sends_a_report_that_envoy_takes(form: Form, capacity: float) -> None:
    """With nothing in flight, rate and utilization are above 0; their ratio, Envoy's weight, is the capacity."""
    idle = replace(LOAD, requests_per_second=0.0, recent_mu_per_second=0.0, mu_max_per_minute=capacity)
    got = read(form(orca.report(idle, Failed("refused"), 0.0)))
    assert got["rps_fractional"] > 0 and got["application_utilization"] > 0
    assert got["rps_fractional"] / got["application_utilization"] == pytest.approx(capacity / 60 * 1000 or 1, rel=1e-3)


@given(
    st.floats(0, 1e4),
    st.floats(0, 50),
    st.floats(1e-3, 1e6),
    st.floats(0, 1e3),
    st.floats(0, 1),
    st.sampled_from([0, 0.3, math.nan]),
)
def test_no_load_makes_a_report_that_is_rejected(
    flow: float, utilization: float, capacity: float, rps: float, failed: float, kv: float
) -> None:
    """Whatever the load, rate and utilization are above 0, every number is finite, and memory is a share."""
    load = replace(
        LOAD,
        recent_mu_per_second=flow,
        mu_max_per_minute=capacity,
        requests_per_second=rps,
        errors_per_second=rps * failed,
    )
    got = read(orca.report(load, Value(EngineSample(kv_usage=kv), 1.0), utilization).binary())
    assert all(math.isfinite(value) for value in got.values())
    assert got["rps_fractional"] > 0 and got["application_utilization"] > 0
    assert 0 <= got.get("mem_utilization", 0) <= 1
    assert 0 <= got.get("eps", 0) <= got["rps_fractional"] * 1.000001


def test_the_weight_is_the_capacity_and_does_not_vanish_in_rounding() -> None:
    """Engines of 1.9 and 0.6 MU per second, both half loaded, are weighed by capacity, although Envoy truncates."""
    reports = [
        read(orca.report(replace(LOAD, mu_max_per_minute=60 * most, recent_mu_per_second=most / 2), ENGINE, 0.0).json())
        for most in (1.9, 0.6)
    ]
    assert [weight(report) for report in reports] == [1900, 600]


def test_pressure_is_the_mean_of_the_rates_seconds() -> None:
    """A short queue hardly changes the mean, a lasting one does within ten seconds; time before the start is idle."""
    recently = orca.MovingMean()
    means = [recently.mean(0.5, at) for at in range(100, 140)]
    assert means[0] == 0.0 and means[5] == pytest.approx(0.25) and means[-1] == pytest.approx(0.5)
    assert recently.mean(1.0, 140) == pytest.approx(0.55)
    assert recently.mean(0.5, 1000) == pytest.approx(0.5)  # no reading for a while


def test_requests_that_the_engine_fails_lower_its_weight() -> None:
    """eps over the rate is the share of failed requests."""
    got = read(orca.report(replace(LOAD, errors_per_second=0.35), ENGINE, 0.41).json())
    assert got["eps"] / got["rps_fractional"] == pytest.approx(0.5)


@FORMS
def test_a_report_is_one_header_value_and_leaves_out_what_was_not_read(form: Form) -> None:
    """The header is one line of printable ASCII, short enough for any proxy; without an engine page it lacks KV use."""
    header = form(orca.report(LOAD, ENGINE, 0.41))
    assert header.isascii() and header.isprintable() and len(header) < 1024
    got = read(form(orca.report(LOAD, Failed("refused"), 0.41)))
    assert not {"mem_utilization", "named_metrics.kv_cache_usage_perc"} & set(got)
    assert got["named_metrics.num_requests_waiting"] == 2.0


def test_the_messages_are_those_of_others() -> None:
    """The bytes of a report and a request are those that Envoy 1.40 and grpc-java write, field by field."""
    theirs = "CQAAAAAAAOA/MQAAAAAAAFlAOQAAAAAAAABAQg4KA3JpZhEAAAAAAAAQQA=="  # of Envoy's own test of its parser
    numbers = {"cpu_utilization": 0.5, "rps_fractional": 100.0, "eps": 2.0}
    assert base64.b64encode(orca_proto.encode(numbers, {"rif": 4.0})).decode() == theirs
    ours = orca_proto.encode({"application_utilization": 0.5, "mem_utilization": 0.25}, {})
    assert ours == b"\x11" + struct.pack("<d", 0.25) + b"\x49" + struct.pack("<d", 0.5)  # fields 2 and 9
    assert orca_proto.interval(b"\x0a\x08\x08\x02\x10\x80\xca\xb5\xee\x01") == 2.5  # field 1: 2 s, 500,000,000 ns


@pytest.mark.parametrize(
    ("asked", "seconds"), [(0.0, 1.0), (-3.0, 1.0), (0.001, 0.1), (0.1, 0.1), (10.0, 10.0), (3600.0, 3600.0)]
)
def test_the_interval_is_the_clients_but_not_below_a_tenth(asked: float, seconds: float) -> None:
    """A stream without an interval gets a report per second, at most ten."""
    request = OrcaLoadReportRequest()
    request.report_interval.FromNanoseconds(int(asked * 1e9))
    assert orca_server.interval(request.SerializeToString()) == pytest.approx(seconds)
    with pytest.raises(ValueError, match="not an OrcaLoadReportRequest"):
        orca_server.interval(b"\xff\xff\xff")


# --- the stream ---


class Control:
    """The control side: a real relay socket and pool; `publish` sends a load."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.pool = RelayPool(1, lambda *_: None, lambda _: None)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.bind(self.path)
        self.sock.listen(8)

    def publish(self, utilization: float) -> None:
        r = orca.report(replace(LOAD, recent_mu_per_second=0.0), ENGINE, utilization)
        self.pool.publish(LoadReport(r.json(), r.text(), "idle", "", r.binary()))


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    control = Control(tmp_path / "control")
    task = asyncio.create_task(control.pool.run(control.sock))
    yield control
    async with asyncio.timeout(PATIENCE):
        while control.pool._subscribers:  # noqa: ASYNC110  the end of a connection is read when it is read
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait((task,))


class Client:
    """A client of the service, with the generated classes."""

    def __init__(self, channel: aio.Channel) -> None:
        self.StreamCoreMetrics = channel.unary_stream(
            f"/{orca_proto.SERVICE}/{orca_proto.METHOD}",
            request_serializer=OrcaLoadReportRequest.SerializeToString,
            response_deserializer=OrcaLoadReport.FromString,
        )


@pytest.fixture
async def stub(control: Control) -> AsyncIterator[tuple[Client, asyncio.Event]]:
    """A client of the stream, and the event that ends it."""
    latest, ended = orca_server.LatestReport(control.path), asyncio.Event()
    keeping = asyncio.create_task(latest.run())
    with reserve("orca-grpc", ("127.0.0.1", 0), "grpc", "orca") as reserved:
        address = reserved.getsockname()
        server = await orca_server.start(address, latest, ended)
        async with aio.insecure_channel(f"127.0.0.1:{address[1]}") as channel:
            yield Client(channel), ended
        await server.stop(0)
    keeping.cancel()
    await asyncio.wait((keeping,))


def asked(seconds: float) -> Any:
    request = OrcaLoadReportRequest()
    request.report_interval.FromNanoseconds(int(seconds * 1e9))
    return request


async def test_a_stream_carries_the_load_as_it_changes(control: Control, stub: Any) -> None:
    """Reports come at the interval without further requests, and a later one has the new load."""
    control.publish(0.25)
    stream = stub[0].StreamCoreMetrics(asked(0.1))
    async with asyncio.timeout(PATIENCE):
        assert (await stream.read()).application_utilization == 0.25
        control.publish(0.75)
        while (await stream.read()).named_metrics["mu_utilization"] != 0.75:
            pass
    stream.cancel()


async def test_a_stream_ends_when_the_sidecar_drains(control: Control, stub: Any) -> None:
    """At the end all streams get UNAVAILABLE, also slow ones and those without a first report."""
    client, ended = stub
    waiting = client.StreamCoreMetrics(asked(1))
    first = asyncio.create_task(waiting.read())
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait((first,), timeout=0.2)
        assert not first.done()  # no load is known yet
        control.publish(0.5)
        assert (await first).application_utilization == 0.5
        slow = client.StreamCoreMetrics(asked(3600))
        assert (await slow.read()).application_utilization == 0.5
        ended.set()
        for stream in (waiting, slow):
            assert await stream.code() == grpc.StatusCode.UNAVAILABLE


def big_request() -> Any:
    """A request with many names of request costs, an unknown field."""
    name = b"\x12\xe8\x07" + b"x" * 1000
    return OrcaLoadReportRequest.FromString(name * 5)


async def test_streams_are_bounded_and_bad_requests_refused(control: Control, stub: Any) -> None:
    """An invalid or too long request ends only its stream; beyond the bound a stream is rejected."""
    control.publish(0.5)
    kept = stub[0].StreamCoreMetrics(asked(0.1))
    async with asyncio.timeout(PATIENCE):
        assert (await kept.read()).rps_fractional > 0
        big = stub[0].StreamCoreMetrics(big_request())
        assert await big.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        streams = [stub[0].StreamCoreMetrics(asked(3600)) for _ in range(orca_server.MAX_STREAMS + 4)]
        codes = [asyncio.ensure_future(stream.code()) for stream in streams]
        refused = 0
        while refused < 5:  # the one above has a place, too
            done, _ = await asyncio.wait([c for c in codes if not c.done()], return_when=asyncio.FIRST_COMPLETED)
            assert {code.result() for code in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            refused += len(done)
        assert (await kept.read()).rps_fractional > 0
        for stream in [kept, *streams]:
            stream.cancel()


async def test_a_load_that_grew_old_is_not_sent(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale load is not sent; the stream resumes with the next load."""
    latest = orca_server.LatestReport(control.path)
    keeping = asyncio.create_task(latest.run())
    control.publish(0.5)
    async with asyncio.timeout(PATIENCE):
        await latest.get()
        monkeypatch.setattr(orca_server, "MAX_REPORT_AGE_S", -1.0)
        getting = asyncio.create_task(latest.get())
        await asyncio.wait((getting,), timeout=0.1)
        assert not getting.done()
        monkeypatch.undo()
        control.publish(0.75)
        assert OrcaLoadReport.FromString(await getting).application_utilization == 0.75
    keeping.cancel()
    await asyncio.wait((keeping,))


async def test_a_listener_is_no_relay(control: Control) -> None:
    """The pool sends a subscriber only the load, does not count it as a relay, and its end loses nothing."""
    lost: list[int] = []
    control.pool._on_lost = lost.append
    got: list[Any] = []
    gone = asyncio.Event()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(control.path)
    channel = await Channel.open(sock, got.append, gone.set)
    channel.send(LoadSubscribed(1.0, 42))
    async with asyncio.timeout(PATIENCE):
        while not got:
            control.publish(0.5)
            await asyncio.sleep(0.01)
        assert {type(record) for record in got} == {LoadReport}
        assert control.pool.use(2.0)[0].pid == 0
        channel.close()
        await gone.wait()
        while control.pool._subscribers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert lost == []


async def test_a_port_that_is_taken_is_found_before_anything_runs() -> None:
    """One line names a port in use, and so does one for the missing extra."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(StartError, match="--orca-grpc: port"):
            reserve("orca-grpc", taken.getsockname(), "grpc", "orca")
        with pytest.raises(StartError, match=r"inference-sidecar\[orca\]"):
            reserve("orca-grpc", taken.getsockname(), "no_such_module", "orca")
