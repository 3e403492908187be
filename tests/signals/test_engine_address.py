"""Engines behind TLS and Unix sockets: what is reached, and what is said where a connection cannot be made."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar.readings import Failed, Value
from sidecar.settings import Settings
from sidecar.signals import engine_monitor
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.engine_monitor import EngineMonitor, open_session
from sidecar.tools.bench.command import BenchSettings, bench
from sidecar.tools.calibrate.command import CalibrateSettings, calibrate
from sidecar.tools.calibrate.traffic import EngineRefused
from sidecar.tools.doctor import engine as engine_checks

from ..certificates import Authority
from ..engines.engine_faces import Shown, shown
from ..waiting import PATIENCE

Watch = Callable[..., Any]
# asyncio's servers, those of these tests, forget to close a connection whose handshake failed.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def forget_connections() -> Iterator[None]:
    """What this module's servers left open is collected while its warnings are off."""
    yield
    gc.collect()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def watch(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    """A function: engine URL and settings -> the monitor of this engine at work."""
    monkeypatch.setattr(engine_monitor, "PROBE_RETRY_INTERVAL_S", 0.01)
    async with AsyncExitStack() as stack:

        async def start(url: str, **chosen: Any) -> EngineMonitor:
            settings = Settings(engine=url, **chosen)
            session = await stack.enter_async_context(open_session(EngineAddress(url, settings.engine_ca)))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            monitor, opened = EngineMonitor(session, settings), asyncio.Event()
            opened.set()
            stack.callback(group.create_task(monitor.run(opened)).cancel)
            return monitor

        yield start


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - a state of another task without an event
            await asyncio.sleep(0.005)


async def doctor(url: str, ca: str = "") -> tuple[str, str]:
    found = (await engine_checks.check(Settings(engine=url, engine_ca=ca)))["engine"]
    return found.level, f"{found.what}: {found.remedy}"


async def test_an_engine_of_a_private_authority_is_served(authority: Authority, watch: Watch) -> None:
    """With --engine-ca kind, page, canary and doctor work as without TLS."""
    async with shown("vllm", tls=authority.context()) as engine:
        monitor = await watch(engine.url, engine_ca=str(authority.pem))
        await until(lambda: isinstance(monitor.read(), Value))
        assert monitor.kind_name == "vllm" and monitor.trouble == ""
        assert (await monitor.canary.send(PATIENCE)).outcome == "ok"
        assert (await doctor(engine.url, str(authority.pem)))[0] == "ok"


async def test_a_certificate_of_the_engine_itself_may_be_given(tmp_path: Path, watch: Watch) -> None:
    """What is in the file is trusted, an authority or not."""
    own = Authority(tmp_path, "127.0.0.1")
    of, _ = own.issue()
    context = own.context()
    context.load_cert_chain(of, of.with_suffix(".key"))
    async with shown("vllm", tls=context) as engine:
        monitor = await watch(engine.url, engine_ca=str(of))
        await until(lambda: monitor.kind_name == "vllm")


@pytest.mark.parametrize(
    ("host", "days", "given", "words"),
    [
        ("127.0.0.1", (-1, 1), "none", "signed by an unknown authority: set --engine-ca FILE"),
        ("127.0.0.1", (-1, 1), "other", "not signed by an authority of"),
        ("engine.example", (-1, 1), "right", "certificate is not for 127.0.0.1: use a name"),
        ("127.0.0.1", (-2, -1), "right", "has expired: renew it"),
        ("127.0.0.1", (0.5, 1), "right", "not valid yet: compare the clocks"),
    ],
)
async def test_a_certificate_that_is_not_accepted_says_why(
    authority: Authority,
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
    host: str,
    days: tuple[float, float],
    given: str,
    words: str,
) -> None:
    """The log says it once, and so do the monitor, for the verdict, and doctor."""
    (authority.pem.parent / "other").mkdir()
    other = Authority(authority.pem.parent / "other", "another authority")
    ca = {"none": "", "other": str(other.pem), "right": str(authority.pem)}[given]
    async with shown("vllm", tls=authority.context(host, days)) as engine:
        monitor = await watch(engine.url, engine_ca=ca)
        await until(lambda: monitor.trouble)
        assert words in monitor.trouble
        level, text = await doctor(engine.url, ca)
        assert level == "fail" and words in text
    assert caplog.text.count(words) == 1 and not engine.asked


async def test_calibrate_and_bench_say_it_too(authority: Authority, tmp_path: Path) -> None:
    """What cannot be reached is said before anything is measured."""
    async with shown("vllm", tls=authority.context()) as engine:
        with pytest.raises(EngineRefused, match="unknown authority"):
            await bench(BenchSettings(engine=engine.url), [])
        with pytest.raises(EngineRefused, match="unknown authority"):
            await calibrate(CalibrateSettings(engine=engine.url), tmp_path / "coefficients.json")


@pytest.mark.parametrize("kind", ["auto", "vllm"])
async def test_the_wrong_scheme_is_said(authority: Authority, watch: Watch, kind: str) -> None:
    """https of plain HTTP, and http of a TLS port, also where the kind is chosen; the right one says nothing."""
    async with shown("vllm") as plain, shown("vllm", tls=authority.context()) as tls:
        for url, words in (
            (plain.url.replace("http:", "https:"), "does not speak TLS: use http://"),
            (tls.url.replace("https:", "http:"), "speaks TLS: use https://"),
        ):
            monitor = await watch(url, engine_kind=kind)
            await until(lambda monitor=monitor: monitor.trouble)
            assert words in monitor.trouble
            assert words in (await doctor(url))[1]
        async with open_session(EngineAddress(plain.url)) as session:
            assert await EngineAddress(plain.url).find_trouble(session) == ""


async def test_a_proxys_answer_to_plain_http_on_its_tls_port_is_recognised(authority: Authority, watch: Watch) -> None:
    """nginx answers 400 there, which other engines may for reasons of their own."""
    async with Shown({"/v1/models": (400, "no")}) as engine:
        monitor = await watch(engine.url)
        await until(lambda: monitor.kind_name == "openai")
        assert monitor.trouble == ""


@pytest.mark.parametrize("kind", ["vllm", "openai"])
async def test_a_certificate_that_expires_in_service_is_noticed_and_its_renewal_too(
    authority: Authority, watch: Watch, kind: str
) -> None:
    """Each scrape is a handshake: the trouble comes and goes with the certificate."""
    context = authority.context()
    async with shown("vllm", tls=context) as engine:
        monitor = await watch(engine.url, engine_kind=kind, engine_ca=str(authority.pem))
        await until(lambda: engine.asked["/metrics" if kind == "vllm" else "/v1/models"] > 1)
        context.load_cert_chain(*authority.issue(days=(-2, -1)))
        await until(lambda: "has expired" in monitor.trouble)
        if kind == "vllm":
            await until(lambda: isinstance(monitor.read(), Failed) and "has expired" in monitor.read().error)
        assert not monitor.unanswered
        context.load_cert_chain(*authority.issue())
        await until(lambda: monitor.trouble == "")


async def test_an_engine_on_a_unix_socket_is_served(tmp_path: Path, watch: Watch) -> None:
    """Kind, page, models, canary and doctor work over a socket."""
    async with shown("vllm", socket=str(tmp_path / "engine.sock")) as engine:
        monitor = await watch(engine.url)
        await until(lambda: isinstance(monitor.read(), Value) and monitor.identity.models)
        assert monitor.kind_name == "vllm"
        assert (await monitor.canary.send(PATIENCE)).outcome == "ok"
        assert (await doctor(engine.url))[0] == "ok"


async def test_a_blocked_api_behind_a_socket_is_seen(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second contact goes the same way as the page."""
    real = engine_monitor.ScrapeSignal
    monkeypatch.setattr(engine_monitor, "ScrapeSignal", lambda *a, **k: real(*a, **k, contact_timeout=0.1))

    async def never(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    async with shown("vllm", socket=str(tmp_path / "engine.sock")) as engine:
        monitor = await watch(engine.url)
        await until(lambda: isinstance(monitor.read(), Value))
        engine.handlers |= {"/metrics": never}
        await until(lambda: engine.asked["/version"] > 2)
        assert not monitor.unanswered
        engine.handlers |= {"/version": never}
        await until(lambda: monitor.unanswered)


def test_a_socket_without_permission_has_its_remedy() -> None:
    """vLLM makes its socket for its own user alone."""
    trouble = EngineAddress("unix:/run/engine.sock").explain(PermissionError(13, "Permission denied"))
    assert "/run/engine.sock" in trouble and "one user" in trouble
    assert EngineAddress("http://127.0.0.1:1").explain(PermissionError(13, "Permission denied")) == ""
