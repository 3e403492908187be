"""How each row of the catalogue is played: load, fault, trigger. One function per story, starting with a served engine.

A story of a hang ends while the engine hangs; a story of an alarm ends with its cause. Times are shortened to the quick
settings of these tests (a floor of 1.5 s instead of 12); the simulator plays the same rows in full length.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from sidecar.health.garbage import MIN_CANARIES
from sidecar.tools.scripted_engine.server import ScriptedEngine

from .scene import Scene, Setting

Play = Callable[[Scene], Awaitable[None]]
PATIENT: Final = {"silence_cap": "45"}  # so 15 s for an unresponsive API


@dataclass(frozen=True, slots=True)
class Story:
    """One way to play a row. `alone`: it needs the whole machine, to disturb no other.

    `relays`: with how many it is played; `within`: seconds in which the hang must be found, where that is the point.
    """

    play: Play
    setting: Setting = field(default_factory=Setting)
    name: str = ""  # if a row has several stories
    alone: bool = False
    relays: tuple[int, ...] = (1, 2)
    within: float = math.inf


# --- hang modes ---


async def amid_a_stream(s: Scene, fault: str) -> None:
    """A long stream is open when the fault starts."""
    s.open()
    await s.served()
    s.fault(fault)


async def amid_short_requests(
    s: Scene, fault: str, *, stream: bool = True, clients: int = 4, **parameters: float
) -> None:
    """Clients with one short request after the other."""
    s.crowd(clients, stream=stream)
    await s.served()
    s.fault(fault, **parameters)


async def amid_arrivals(s: Scene, fault: str) -> None:
    """New users keep arriving and are prefilled; the rest of their responses never arrives."""
    s.arrivals(every=0.4)
    await s.served()
    s.fault(fault)


async def gpu_fault(s: Scene) -> None:
    """The driver reports an XID, and the core stops."""
    s.open()
    await s.served()
    s.fault("gpu_fault")
    s.xid(31)  # a memory page fault, which a restart repairs


async def oversized(s: Scene) -> None:
    """A prompt larger than the KV cache, in front of many small ones."""
    s.crowd(2)
    await s.served()
    s.fault("oversized_head")
    s.open(tokens=1, prompt=20_000)


async def one_of_two_ranks(s: Scene) -> None:
    """Long streams and short requests on both ranks."""
    for _ in range(4):
        s.open()
    s.crowd(2)
    await s.engine.until(lambda: all(core.steps > 100 for core in s.engine.cores))  # each has published metrics
    s.fault("one_rank", rank=0)


async def start_up(s: Scene) -> None:
    """The engine's start-up hangs from the beginning."""
    s.began = time.monotonic()


async def started_anew(s: Scene) -> None:
    """A served engine is replaced by a process whose start-up hangs."""
    s.fault("refuse", seconds=1.0)
    s.engine.faults.start("start_hang")


async def one_stream(s: Scene) -> None:
    """One stream stops, all others continue."""
    s.open(tokens=300)
    await s.served()
    s.fault("one_stream")
    s.crowd(3)


async def near_the_limit(s: Scene) -> None:
    """A long sequence cannot end, short ones can."""
    s.crowd(3)
    await s.served()
    s.fault("stuck_near_limit", short=60)
    s.open(tokens=100)


async def abort(s: Scene) -> None:
    """A client disconnects, and the others' streams stop."""
    s.open()
    leaver = s.open()
    await s.engine.until(lambda: s.engine.open == 2)
    await s.served()
    s.fault("wedge_on_abort")
    leaver.cancel()


async def after_idle(s: Scene) -> None:
    """The first request after an idle time."""
    s.fault("hang_after_idle", idle=0.5)
    await asyncio.sleep(1.0)  # the idle time itself
    s.open()


async def slowly(s: Scene) -> None:
    """Each token takes 50 times as long as before."""
    s.open()
    s.crowd(2)
    await s.served()
    s.fault("slow", seconds=6, factor=50)
    await s.engine.faults.until(lambda how: how.step_factor == 1)


async def gibberish(s: Scene) -> None:
    """Idle, so that canaries are sent; then every token is garbage."""
    await s.sidecar.until(lambda seen: seen["canaries"]["passed"] > MIN_CANARIES)  # of a sound engine, for comparison
    s.fault("gibberish")


# --- alarms ---


async def throughout(s: Scene, fault: str, seconds: float, **parameters: float) -> None:
    """A stream and short requests, and a fault that ends."""
    s.open()
    s.crowd(2)
    await s.served()
    s.fault(fault, seconds, **parameters)
    await s.engine.faults.until(lambda _: fault not in s.engine.faults.active)
    await s.served()


async def burst(s: Scene) -> None:
    """1,280 requests at once."""
    await s.served("idle")
    ends = await asyncio.gather(*(s.ask(2, prompt=50) for _ in range(1280)))
    assert set(ends) == {"done"}, set(ends)


async def full(s: Scene) -> None:
    """The batch is full for long, and many requests wait; /health is slow, too."""
    s.fault("slow_health", delay=5)
    ends = await asyncio.gather(*(s.ask(150, prompt=50) for _ in range(10)))
    assert set(ends) == {"done"}


async def behind_users(s: Scene) -> None:
    """Prefills queue up, each a second long, so that a canary would wait behind all of them."""
    s.fault("long_prefill", duration=1.0)
    ends = await asyncio.gather(*(s.ask(2, prompt=20_000) for _ in range(6)))
    assert set(ends) == {"done"}


async def slow_batch(s: Scene) -> None:
    """The largest batch, whose steps take longer than a health check may."""
    s.fault("slow", factor=50)
    ends = await asyncio.gather(*(s.ask(6, prompt=5) for _ in range(64)))
    assert set(ends) == {"done"}


async def starving_prefill(s: Scene) -> None:
    """One prefill of several times the floor starves all decodes."""
    s.open()
    await s.served()
    s.fault("long_prefill", duration=5.0)
    assert await s.ask(2, prompt=120_000) == "done"


async def compiling(s: Scene) -> None:
    """The first token of a new engine takes several times the floor."""
    await s.sidecar.until_verdict("idle")


async def before_ready(s: Scene) -> None:
    """Requests arrive while the engine still loads."""
    s.crowd(2)
    await s.served()


async def profiled(s: Scene) -> None:
    """A profiler is started and stopped through the relay; the engine stands still in between."""
    await ordered(s, "/start_profile", "/stop_profile")


async def ordered(s: Scene, stop: str, go: str) -> None:
    """A pause through the relay, for several times the floor, with an open stream."""
    s.open()
    await s.served()
    assert await s.post(stop) == 200
    await asyncio.sleep(6)  # the stop itself
    assert await s.post(go) == 200
    await s.served()


async def weights(s: Scene) -> None:
    """The core waits for new weights while a stream is open."""
    s.open()
    await s.served()
    assert await s.post("/update_weights?seconds=6") == 200
    await s.served()


async def stopped(s: Scene) -> None:
    """The control process is stopped for several times the floor while users are served."""
    s.open()
    await s.served()
    control = await s.sidecar.control()
    os.kill(control, signal.SIGSTOP)
    await asyncio.sleep(5)  # the stop itself
    os.kill(control, signal.SIGCONT)
    s.began = time.monotonic()
    await s.until(lambda: len(s.since()) > 10, "two seconds of probes")
    await s.served()


async def starved(s: Scene) -> None:
    """All processes of the sidecar run a quarter of the time."""
    s.open()
    await s.served()
    processes = [s.sidecar.process.pid, await s.sidecar.control(), *await relays_of(s)]
    for _ in range(8):
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(0.6)  # the time without CPU
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.2)
    await s.served()


async def forgetful(s: Scene) -> None:
    """The control process is killed twice while a long prefill starves all streams; its successors know nothing."""
    s.open()
    await s.served()
    s.fault("long_prefill", duration=6.0)
    prefill = s.open(2, prompt=120_000)
    for _ in range(2):
        await asyncio.sleep(1.5)  # as long as silence is allowed
        os.kill(await s.sidecar.control(), signal.SIGKILL)
    assert await prefill == "done"
    await s.served()


async def relays_of(s: Scene) -> list[int]:
    snapshot = await s.sidecar.until(lambda snapshot: all(relay["pid"] for relay in snapshot["relays"]))
    return [relay["pid"] for relay in snapshot["relays"]]


async def blind(s: Scene) -> None:
    """The relays are stopped for several times the floor: their events arrive late and all at once."""
    s.open()
    await s.served()
    relays = await relays_of(s)
    for pid in relays:
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(5)  # the stop itself
    for pid in relays:
        os.kill(pid, signal.SIGCONT)
    await s.served()


async def overload(s: Scene) -> None:
    """Far more work than capacity, for a while."""
    s.crowd(60, tokens=20, prompt=200)
    await s.served()
    s.began = time.monotonic()
    await s.until(lambda: s.ended.count("done") > 100, "a hundred answers")


def loading(engine: ScriptedEngine) -> None:
    engine.faults.start("start_hang")


def compile_first(engine: ScriptedEngine) -> None:
    engine.faults.start("jit", duration=6)


def load_for_a_while(engine: ScriptedEngine) -> None:
    engine.faults.start("start_hang", seconds=5)


FULL: Final = Setting(engine={"max_batch": 4})
UNHURRIED: Final = Setting(flags={"silence_floor": "6"})  # until a page is slow and the second contact unanswered
SLOW_START: Final = {"silence_cap": "3"}

MODES: Final[dict[int, tuple[Story, ...]]] = {
    1: (Story(partial(amid_a_stream, fault="freeze")),),
    2: (Story(partial(amid_short_requests, fault="freeze_admission")),),
    3: (Story(oversized, Setting(engine={"kv_tokens": 4096})),),
    4: (Story(partial(amid_a_stream, fault="kv_deadlock")),),
    5: (Story(partial(amid_a_stream, fault="livelock")),),
    6: (Story(partial(amid_a_stream, fault="freeze_busy")),),
    7: (Story(one_of_two_ranks, Setting(engine={"data_parallel": 2})),),
    8: (Story(partial(amid_short_requests, fault="freeze_busy", clients=16)),),
    9: (Story(partial(amid_arrivals, fault="freeze_decode")),),
    10: (Story(start_up, Setting(flags=SLOW_START, before=loading, served=False)),),
    11: (Story(partial(amid_a_stream, fault="core_dead")),),
    12: (Story(partial(amid_a_stream, fault="api_block"), UNHURRIED),),
    13: (Story(partial(amid_arrivals, fault="first_chunk_then_silence")),),
    14: (Story(one_stream),),
    15: (Story(partial(amid_short_requests, fault="transfer_stuck")),),
    16: (Story(abort),),
    17: (Story(after_idle, Setting(flags={"canary_interval": "30"})),),
    18: (Story(gpu_fault, Setting(gpu=True)),),
    19: (Story(started_anew, Setting(flags=SLOW_START)),),
    20: (Story(partial(amid_short_requests, fault="livelock", stream=False)),),
    21: (Story(slowly),),
    22: (Story(near_the_limit),),
    23: (Story(gibberish),),
}
ALARMS: Final[dict[int, tuple[Story, ...]]] = {
    1: (Story(partial(throughout, fault="slow_health", seconds=5, delay=4)),),
    2: (Story(partial(throughout, fault="api_block", seconds=3), Setting(flags=PATIENT)),),
    3: (Story(burst, alone=True),),
    4: (Story(full, FULL),),
    5: (Story(behind_users),),
    6: (Story(slow_batch),),
    7: (Story(starving_prefill),),
    8: (Story(compiling, Setting(before=compile_first, served=False)),),
    9: (Story(behind_users, Setting(engine={"max_batch": 2})),),
    10: (Story(profiled),),
    11: (Story(before_ready, Setting(before=load_for_a_while, served=False)),),
    12: (Story(starved, name="starved"), Story(forgetful, name="forgetful")),
    13: (Story(overload, Setting(engine={"max_batch": 8})),),
    14: (Story(partial(throughout, fault="serial_http", seconds=5)),),
    15: (Story(partial(throughout, fault="api_block", seconds=6), Setting(flags=PATIENT)),),
    16: (
        Story(partial(ordered, stop="/sleep", go="/wake_up"), name="sleep"),
        Story(partial(ordered, stop="/pause", go="/resume"), name="pause"),
        Story(weights, name="weights"),
    ),
    17: (Story(stopped, name="stopped"), Story(blind, name="blind")),
}
