"""Each fault of the scripted engine does what its row says, and health returns when it is cleared."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.errors import UsageError
from sidecar.settings import load
from sidecar.tools.scripted_engine.faults import FAULTS, FaultError, Faults
from sidecar.tools.scripted_engine.hang_catalogue import ALARMS, MODES
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from .engine_checks import CHECKS, OPTIONS
from .engine_client import quick, running_engine


def test_every_fault_has_a_check() -> None:
    """Every row of the table has a check, and every check a row."""
    assert set(CHECKS) == set(FAULTS)


def test_every_fault_of_the_catalogue_exists() -> None:
    """The catalogue of hang modes and alarms names only rows of the table."""
    assert {fault for case in (*MODES, *ALARMS) for fault in case.faults} <= set(FAULTS)


@pytest.mark.parametrize("kind", CHECKS)
async def test_a_fault_does_what_its_row_says(kind: str) -> None:
    """The fault shows its signs; when it is cleared the engine serves a new request (a crashed one stays gone)."""
    async with running_engine(**OPTIONS.get(kind, {})) as client:
        await CHECKS[kind](client)
        if client.engine.exit_code is None:
            client.engine.faults.clear()
            assert len(await client.chat(3, "after")) == 4


async def test_faults_over_http() -> None:
    """/faults lists all rows, starts and clears them, and clears a timed one by itself."""
    async with running_engine() as client:
        _, listing = await client.json("/faults")
        assert {row["kind"] for row in listing["faults"]} == set(FAULTS) and all(
            row["text"] for row in listing["faults"]
        )
        await client.json("/faults", {"kind": "freeze"})
        await client.json("/faults", {"kind": "slow", "factor": 2, "seconds": 0.1})
        assert client.engine.faults.active == ("freeze", "slow")
        await client.engine.faults.until(lambda how: how.step_factor == 1)
        assert client.engine.faults.active == ("freeze",)
        async with client.session.delete("/faults") as response:
            assert await response.json() == {"active": []}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"kind": "frieze"}, "expected one of freeze"),
        ({}, "expected one of freeze"),
        ({"kind": "freeze", "factor": 2}, "it takes seconds"),
        ({"kind": "slow", "speed": 2}, "it takes seconds and factor"),
        ({"kind": "slow", "factor": "fast"}, "a number from 1"),
        ({"kind": "slow", "factor": 1e9}, "a number from 1"),
        ({"kind": "freeze", "seconds": -1}, "seconds must be"),
        ({"kind": "freeze", "seconds": "long"}, "expected a JSON object"),
        ([1], "expected a JSON object"),
    ],
)
async def test_a_wrong_fault_is_refused_with_what_is_valid(body: object, says: str) -> None:
    """An unknown fault, parameter or value is 400 with the valid ones, and changes nothing."""
    async with running_engine() as client:
        async with client.session.post("/faults", json=body) as response:
            assert response.status == 400
            assert says in (await response.json())["error"]["message"]
        assert client.engine.faults.active == ()


async def test_faults_add_up_and_end_alone() -> None:
    """Several faults act at once; ending one leaves the others as they were."""
    faults = Faults()
    faults.start("slow", factor=3)
    faults.start("gibberish")
    assert (faults.behaviour.step_factor, faults.behaviour.text) == (3, "!")
    faults.clear("slow")
    assert (faults.behaviour.step_factor, faults.behaviour.text) == (1, "!")
    with pytest.raises(FaultError):
        faults.start("nothing")
    assert faults.active == ("gibberish",)


async def test_a_fault_from_the_start() -> None:
    """--fault is active before the first request (a hang that survives a restart); an unknown one is a usage error."""
    async with ScriptedEngine(quick(fault="freeze_decode")) as engine:
        assert engine.faults.active == ("freeze_decode",)
    with pytest.raises(UsageError, match="--fault"):
        load(EngineSettings, {"fault": "frieze"}, {})


async def test_a_fault_in_the_middle_of_a_long_step_acts_at_once() -> None:
    """A change of behaviour does not wait for the step that runs: clearing a slow fault ends its long step."""
    async with running_engine() as client:
        client.engine.faults.start("slow", factor=1_000_000)
        stream = client.start(3)
        await client.running()
        client.engine.faults.clear()
        assert len(await asyncio.wait_for(stream, 30)) == 4
