"""The bundle before a kill: taken in steps, bounded, readable, and without a word of a user."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.control import process as app
from sidecar.control.diagnosis import MAX_BUNDLE_BYTES, MAX_BUNDLES, Diagnoses, bundle, diagnose, fitting
from sidecar.control.loop import ControlLoop
from sidecar.control.state_dir import StateDir
from sidecar.events import Admitted, RequestSize
from sidecar.load import cost_model
from sidecar.readings import Failed
from sidecar.report import diagnosis_page
from sidecar.settings import Settings, load
from sidecar.signals import stack_dump
from sidecar.signals.hang_watch import NOT_SUSPECT
from sidecar.signals.process_examiner import HangProofThread, ProcessExaminer, dump_all
from sidecar.signals.process_state import EngineProcess

from ..waiting import PATIENCE
from .victims import victim

ID = "20261121T101500-no_progress"


@pytest.fixture
async def ticker(tmp_path: Path) -> AsyncIterator[ControlLoop]:
    """A control process without relays."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        chosen = load(Settings, {"engine": "http://127.0.0.1:9"}, {})
        yield app.build(chosen, cost_model.Coefficients(), StateDir(str(tmp_path)), session, stack)


def content(ticker: ControlLoop) -> dict[str, Any]:
    page = (2.5, "vllm:num_requests_running 1\n")
    return bundle(ticker.snapshot, list(ticker.control.ledger.holds()), page, NOT_SUSPECT)


def kept(folder: Path, id: str = ID) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "diagnoses" / f"{id}.json").read_text())
    return read


async def steps(examiner: ProcessExaminer) -> list[dict[str, Any]]:
    """What an examination hands over, in order."""
    given: list[dict[str, Any]] = []

    async def keep(part: dict[str, Any]) -> None:
        given.append(part)

    await examiner.examine(keep)
    return given


async def test_a_stopped_engine_is_seen_stopped_with_its_stacks(py_spy: str) -> None:
    """SIGSTOP: the summary has it after the first round; after the second there are two dumps that name the place."""
    with victim("spin_here") as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        first, second = await steps(ProcessExaminer(engine.url, interval_s=0.5))
    assert not first["complete"] and second["complete"]
    assert "stopped (T)" in first["summary"] and "stopped (T)" in second["summary"]
    (process,) = second["processes"]
    assert process["pid"] == engine.pid and len(process["looks"]) == len(process["stacks"]) == 2
    assert all("spin_here" in stack["text"] for stack in process["stacks"])


async def test_a_spinning_and_a_sleeping_engine_are_told_apart(py_spy: str) -> None:
    """CPU over the two looks, and the frame of the thread that used it."""
    with victim("spin_here") as engine:
        summary = (await steps(ProcessExaminer(engine.url, interval_s=2)))[-1]["summary"]
    assert (
        "spinning at" in summary or "working at" in summary
    ) and "in spin_here (" in summary  # a starved machine gives less
    with victim("sleep_here") as engine:
        summary = (await steps(ProcessExaminer(engine.url, interval_s=1)))[-1]["summary"]
    assert "asleep" in summary and "in sleep_here (" in summary


async def test_without_py_spy_the_rest_is_known_and_the_remedy_is_named() -> None:
    """State and CPU need no permission and no tool; instead of stacks there is the way to get them."""
    with victim() as engine:
        last = (await steps(ProcessExaminer(engine.url, 0.5, lambda: None)))[-1]
    assert "asleep" in last["summary"]
    assert last["processes"][0]["stacks"] == [{"failed": stack_dump.INSTALL}] * 2


async def test_a_py_spy_that_hangs_costs_a_bounded_time(tmp_path: Path) -> None:
    """A round ends in time for any number of processes, and each has a reason for its missing stacks."""
    stuck = tmp_path / "py-spy"
    stuck.write_text("#!/bin/sh\nexec sleep 1000\n")
    stuck.chmod(0o755)
    processes = tuple(EngineProcess(pid, "engine", "other", 0) for pid in range(1, 8))
    async with asyncio.timeout(PATIENCE):
        given = await dump_all(processes, str(stuck), 0.5)
    reasons = [text.error for text in given.values() if isinstance(text, Failed)]
    assert len(reasons) == 7 and "was killed" in reasons[0] and "dumps before it" in reasons[-1]


async def test_a_look_that_hangs_is_left_behind() -> None:
    """A hanging kernel costs bounded time; no second thread starts meanwhile, and afterwards calls work again."""
    thread, release = HangProofThread(0.1), threading.Event()
    for words in ("/proc hangs for", "still hangs since an earlier look"):
        failed = await thread.run(lambda: release.wait(60))
        assert isinstance(failed, Failed) and words in failed.error
    release.set()
    async with asyncio.timeout(PATIENCE):
        while await thread.run(lambda: "answer") != "answer":  # noqa: ASYNC110  an abandoned thread has no event
            await asyncio.sleep(0.01)


async def test_a_remote_engine_is_said_to_be_remote(ticker: ControlLoop, tmp_path: Path) -> None:
    """The bundle is still written, with the reason why no process was examined."""
    await diagnose(ticker.diagnoses, ProcessExaminer("http://192.0.2.1:8000"), content(ticker), ID)
    read = kept(tmp_path)
    assert read["complete"] and "not on this machine" in read["summary"] and "absent" in read["processes"]
    assert read["engine_metrics"] and ticker.diagnoses.summaries()[0].summary == read["summary"]


async def test_a_kill_after_the_first_step_loses_little(ticker: ControlLoop, tmp_path: Path, py_spy: str) -> None:
    """If the examination is cancelled, the earlier evidence is on disk, and a later run reads it."""
    with victim() as engine:
        task = asyncio.create_task(diagnose(ticker.diagnoses, ProcessExaminer(engine.url, 600), content(ticker), ID))
        async with asyncio.timeout(60):
            while not any(taken.summary for taken in ticker.diagnoses.summaries()):  # noqa: ASYNC110  a file has no event
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    read = kept(tmp_path)
    assert not read["complete"] and read["engine_metrics"] and len(read["processes"][0]["stacks"]) == 1
    (summary,) = Diagnoses(StateDir(str(tmp_path))).summaries()
    assert summary.summary == read["summary"] != ""


async def test_a_disk_that_cannot_be_written_is_logged(
    ticker: ControlLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No bundle, a line in the log, and nothing else."""
    (tmp_path / "diagnoses").write_text("in the way")
    await diagnose(ticker.diagnoses, ProcessExaminer("http://192.0.2.1:8000"), content(ticker), ID)
    assert "cannot write the diagnosis" in caplog.text and not ticker.diagnoses.summaries()


def test_a_bundle_is_bounded() -> None:
    """The page is dropped before the stacks, and both are marked as missing."""
    small: dict[str, Any] = {"reason": "no_progress", "engine_metrics": "x", "processes": []}
    assert fitting(small) == small
    cut = fitting(small | {"engine_metrics": "x" * MAX_BUNDLE_BYTES})
    assert "left out" in cut["engine_metrics"]["failed"] and cut["processes"] == []
    both = fitting(small | {"engine_metrics": "x" * MAX_BUNDLE_BYTES, "processes": ["x" * MAX_BUNDLE_BYTES]})
    assert len(json.dumps(both)) < 1000


async def test_bundles_are_bounded_in_number_and_rewritten_in_place(ticker: ControlLoop, tmp_path: Path) -> None:
    """The newest KEPT stay; a second step replaces the first instead of being another bundle."""
    store = ticker.diagnoses
    for i in range(MAX_BUNDLES + 2):
        for _ in range(2):
            store.take(content(ticker), f"20261121T1015{i:02d}-no_progress")
    assert len(store.summaries()) == MAX_BUNDLES == len(list((tmp_path / "diagnoses").iterdir()))
    assert store.summaries()[0].id.startswith("20261121T101511")


def test_the_page_escapes_everything() -> None:
    """Names of processes and threads are chosen by others."""
    evil = "<script>alert(1)</script>\"'&"
    process = {
        "pid": 1,
        "name": evil,
        "role": evil,
        "symptom": evil,
        "looks": [],
        "stacks": [{"text": evil}, {"failed": evil}],
    }
    text = diagnosis_page.render(
        ID, {"at": 0, "reason": evil, "summary": evil, "detail": evil, "processes": [process], evil: evil}
    )
    assert "<script" not in text and text.count("&lt;script") == 10
    assert "<pre>" in text
    assert evil not in diagnosis_page.render(ID, {"processes": {"failed": evil}}) and diagnosis_page.render(ID, {})


async def test_no_word_of_a_request_is_in_a_bundle(ticker: ControlLoop, py_spy: str, tmp_path: Path) -> None:
    """Outstanding requests appear by shape; a prompt in the memory of the engine's process does not leave it."""
    ticker.control.on_event(
        0, Admitted("id-of-a-user", 1.0, "acme-tenant", "m", "chat", True, RequestSize(10, 0, 5), 0.1, None)
    )
    with victim("spin_here") as engine:
        await diagnose(ticker.diagnoses, ProcessExaminer(engine.url, 0.2), content(ticker), ID)
    text = json.dumps(kept(tmp_path))
    assert '"route": "chat"' in text and "spin_here" in text
    for word in ("a prompt of a user", "sk-secret", "id-of-a-user", "acme-tenant"):
        assert word not in text


async def test_failed_looks_are_shown_as_failed(ticker: ControlLoop) -> None:
    """A process that ends between the rounds is reported as ended."""
    with victim() as engine:
        examiner, given = ProcessExaminer(engine.url, 0.2), list[dict[str, Any]]()

        async def keep(part: dict[str, Any]) -> None:
            given.append(part)
            if len(given) == 1:
                engine.process.kill()
                await asyncio.to_thread(engine.process.wait)

        await examiner.examine(keep)
    assert given[-1]["processes"][0]["looks"][-1] == {"failed": "it has ended"}
    assert "it has ended" in given[-1]["summary"]
