"""Usage records of a whole sidecar: they add up, whichever process is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from sidecar.report.usage_query import read
from sidecar.report.usage_rows import PendingUsage, Rate, UsageKey, UsageSums
from sidecar.report.usage_store import USAGE_FILE, UsageStore
from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..postgres_server import PostgresServer
from ..waiting import PATIENCE


def recorded(state: Path) -> int:
    """Requests on disk; the file is there, and its table a moment later, from the first second's records on."""
    try:
        rows = read(state / USAGE_FILE, 0, time.time() + 3600, ())
    except (FileNotFoundError, sqlite3.OperationalError):
        return 0
    return rows[0][1].requests if rows else 0


async def test_a_clean_end_leaves_every_request_on_disk(engine: ScriptedEngine, start: Any) -> None:
    """Tenants, tokens and outcomes match the requests; canaries belong to no tenant."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    for tenant in ("a", "a", "b"):
        async with sidecar.chat(tokens=3, **{"x-tenant-id": tenant}) as answer:
            await answer.read()
    assert await sidecar.stop() == 0
    rows = dict(read(sidecar.state / USAGE_FILE, 0, time.time() + 3600, ("tenant", "outcome")))
    assert rows.pop(("", "idle")).gpu_seconds > 0
    assert {key: (sums.requests, sums.output_tokens) for key, sums in rows.items()} == {
        ("a", "ok"): (2, 6),
        ("b", "ok"): (1, 3),
    }


async def test_kill_9_during_a_thousand_requests(engine: ScriptedEngine, start: Any) -> None:
    """Control is killed twice under load: no request is counted twice, and none on disk or settled later is lost."""
    sidecar = await start(engine.url, workers="2")
    await sidecar.until_verdict("idle")
    ended, open_ = 0, 24
    places = asyncio.Semaphore(open_)

    async def one() -> None:
        nonlocal ended
        async with places, sidecar.chat(tokens=2, stream=ended % 2 == 0) as answer:
            assert answer.status == 200
            await answer.read()
        ended += 1

    written = 0
    async with asyncio.TaskGroup() as group:
        for _ in range(1000):
            group.create_task(one())
        for share in (300, 650):
            before, pid = written, await sidecar.control()
            while ended < share or (written := recorded(sidecar.state)) == before:  # noqa: ASYNC110  a file has no event
                await asyncio.sleep(0.05)
            at_risk = ended + open_ - written
            os.kill(pid, signal.SIGKILL)
    assert ended == 1000
    assert await sidecar.stop() == 0
    assert 1000 - at_risk <= recorded(sidecar.state) <= 1000


async def test_no_bill_is_dropped_silently(engine: ScriptedEngine, start: Any, tmp_path: Path) -> None:
    """A file that may hold next to nothing loses bills with a line in the log and a series."""
    state, rate = tmp_path / "full", Rate("f", 1, 0.0)
    state.mkdir()
    minute = int(time.time()) // 60 * 60
    rows = {UsageKey(minute - 60 * n, 60, "a", "m", "ok", "told", rate): UsageSums(1, 2.0) for n in range(20)}
    UsageStore(state, 35, 1 << 20).write(PendingUsage(rows), time.time())
    sidecar = await start(engine.url, state="full", usage_bytes="1k")
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=3) as answer:
        await answer.read()
    async with asyncio.timeout(PATIENCE):
        while not any("usage records dropped, over --usage-bytes" in line for line in sidecar.log):  # noqa: ASYNC110  a log has no event
            await asyncio.sleep(0.1)
    page = await sidecar.until_metrics('sidecar_usage_evicted_rows_total{billable="yes",why="size"}')
    [lost] = re.findall(r'sidecar_usage_evicted_mu_total\{why="size"\} (\S+)', page)
    assert float(lost) > 0


async def test_the_end_leaves_every_request_in_the_database_and_the_log(
    engine: ScriptedEngine, start: Any, postgres: PostgresServer
) -> None:
    """The database is down at the start and back before the end: its rows, the file and the log of requests agree."""
    import psycopg

    postgres.stop()
    sidecar = await start(engine.url, usage_url=postgres.url, request_log_bytes="1M")
    await sidecar.until_verdict("idle")
    ids = list[str]()
    for tenant in ("a", "a", "b"):
        async with sidecar.chat(tokens=3, **{"x-tenant-id": tenant}) as answer:
            await answer.read()
            ids.append(answer.headers["x-request-id"])
    await sidecar.until_metrics('sidecar_usage_database_writes_total{result="failed"} 1')
    postgres.start()
    assert await sidecar.stop() == 0
    lines = [json.loads(line) for line in (sidecar.state / "requests.jsonl").read_text().splitlines()]
    query = "SELECT tenant, sum(requests), sum(mu), sum(output_tokens) FROM sidecar_usage WHERE requests > 0 GROUP BY 1"
    with psycopg.connect(postgres.url) as db:
        found = {tenant: tuple(map(float, sums)) for tenant, *sums in db.execute(query)}
        assert db.execute("SELECT sum(gpu_seconds) > 0 FROM sidecar_usage WHERE outcome = 'idle'").fetchone() == (True,)
    for tenant, count in (("a", 2), ("b", 1)):
        of = [line for line in lines if line["tenant"] == tenant]
        assert found[tenant] == pytest.approx(
            (count, sum(line["mu"] for line in of), sum(line["tokens"]["out"] for line in of)), abs=1e-4
        )
    assert [line["id"] for line in lines] == ids, "those that clients know"
    text = "".join(sidecar.log)
    assert "cannot write usage records to --usage-url" in text and "secret-word" not in text


async def test_a_database_that_hangs_holds_up_no_end(engine: ScriptedEngine, start: Any, requires: Any) -> None:
    """It takes connections and never answers: the sidecar serves, ends in time, and keeps its rows."""
    requires("python:psycopg")
    taken = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.set()
        await reader.read()  # until the other end closes
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        sidecar = await start(engine.url, usage_url=f"postgresql://u:secret-word@127.0.0.1:{port}/db?sslmode=disable")
        await sidecar.until_verdict("idle")
        async with sidecar.chat(tokens=3) as answer:
            await answer.read()
        async with asyncio.timeout(PATIENCE):
            await taken.wait()
        assert await sidecar.stop() == 0
    assert recorded(sidecar.state) == 1
    assert "secret-word" not in "".join(sidecar.log)
