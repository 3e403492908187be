"""How the rows of the catalogue that come from reports of the field are played, as in stories.py.

The first story of each group is played with one and with two relays, the others with two.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import aiohttp

from sidecar.tools.scripted_engine.server import ScriptedEngine

from .scene import Scene, Setting
from .stories import Story, amid_a_stream, amid_short_requests

# A stream of so many tokens takes longer than anything is allowed to be silent, and than a kill waits.
LONG: Final = 500
# As many answers as it takes to know an engine.
LEARNT: Final = 12
# Seconds for which a healthy engine is watched.
WATCHED_S: Final = 8.0
TWO: Final = (2,)
TOOLS: Final = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


def transcription() -> aiohttp.FormData:
    form = aiohttp.FormData({"model": "scripted"})
    form.add_field("file", bytes(3200), filename="speech.wav", content_type="audio/wav")
    return form


# A path, and what makes a body for it.
Call = tuple[str, Callable[[], Any]]
CHATTING: Final[Call] = (
    "/v1/chat/completions",
    lambda: {"model": "scripted", "messages": [{"role": "user", "content": "word"}], "max_tokens": 5},
)
RANKING: Final[Call] = ("/v1/rerank", lambda: {"model": "scripted", "query": "q", "documents": ["d"]})
EMBEDDING: Final[Call] = ("/v1/embeddings", lambda: {"model": "scripted", "input": "word"})
GENERATION: Final[Call] = ("/v1/images/generations?seconds=0.5", lambda: {"model": "scripted", "prompt": "a tree"})
TRANSCRIPTION: Final[Call] = ("/v1/audio/transcriptions", transcription)


def begins_with(fault: str) -> Callable[[ScriptedEngine], None]:
    """What a setting does to its engine before the sidecar starts."""
    return lambda engine: engine.faults.start(fault)


def without_canary(fault: str, **flags: str) -> Setting:
    """An engine that may pass no canary."""
    return Setting(flags=flags, before=begins_with(fault), served=False)


async def learnt(s: Scene) -> None:
    """As many answers have been given as it takes to know the engine."""
    await s.until(lambda: s.ended.count("done") >= LEARNT, "answers enough to know the engine")


async def all_served(s: Scene, *requests: Awaitable[str]) -> None:
    """Wait for requests, all of which must be served."""
    ends = await asyncio.gather(*requests)
    assert set(ends) == {"done"}, s.story()


async def stopped_after(s: Scene, tasks: list[asyncio.Task[Any]], *waited: asyncio.Task[str]) -> None:
    """Wait for requests to be served, then end the clients next to them."""
    await all_served(s, *waited)
    for task in tasks:
        task.cancel()


# --- hangs ---


async def amid_calls(s: Scene, row: Call, fault: str = "freeze") -> None:
    """Clients of one route."""
    s.callers(2, *row)
    await learnt(s)
    s.fault(fault)


async def hangs_again(s: Scene, faults: tuple[str, ...]) -> None:
    """Each hang but the last is found and ended by a restart, after which users are served for a while."""
    s.crowd(3)
    await s.served()
    for fault in faults[:-1]:
        s.fault(fault)
        await s.until(lambda: any(x.live != 200 for x in s.since()), "a failed liveness probe")
        before = s.engine.restarts
        s.fault("restart", down=0.5)
        await s.engine.until(lambda expected=before + 1: s.engine.restarts == expected)
        await s.served()
        s.begin()
        await learnt(s)
    s.fault(faults[-1])


async def full_of_long_prompts(s: Scene) -> None:
    """The engine's speed is known for such prompts; then it freezes, and a hundred of them wait."""
    s.crowd(2)
    for size in (16_000, 15_000, 14_000):
        await all_served(s, s.ask(2, prompt=size))
    await learnt(s)
    s.fault("freeze_busy")
    for _ in range(100):
        s.open(2, prompt=16_000)


async def restarted_inside(s: Scene, fault: str) -> None:
    """The port closes for a second, and another process takes the old one's place."""
    s.crowd(1)
    await s.served()
    s.fault(fault, down=1)


async def restarted_frozen(s: Scene) -> None:
    """The new process answers its pages, and computes nothing."""
    s.crowd(1)
    await s.served()
    s.fault("restart", down=1)
    await s.engine.until(lambda: s.engine.restarts == 1)
    s.engine.faults.start("freeze")


async def users_give_up(s: Scene, patience: float, fault: str) -> None:
    """Users are served; then none is, and each leaves after a while."""
    s.crowd(4, patience=patience)
    await s.served()
    s.fault(fault)


async def slots_of_others(s: Scene) -> None:
    """Endless requests from elsewhere fill the batch."""
    s.crowd(4, patience=2.5)
    await s.served()
    s.begin()
    for _ in range(4):
        s.foreign(100_000)


async def two_ranks(s: Scene) -> None:
    """Long streams and short requests on both ranks, one of which stops without a trace in its gauges."""
    for _ in range(4):
        s.open()
    s.crowd(2)
    await s.engine.until(lambda: all(core.steps > 100 for core in s.engine.cores))
    s.fault("rank_zero", rank=0)


async def with_odd_pages(s: Scene, pages: str) -> None:
    """The engine freezes; its pages were odd before."""
    s.fault(pages)
    s.open()
    s.crowd(2)
    await s.served()
    s.fault("freeze_busy")


async def with_a_queue(s: Scene) -> None:
    """One stream runs, others wait."""
    for _ in range(3):
        s.open()
    await s.served()
    s.fault("freeze_busy")


async def while_idle(s: Scene, fault: str, **parameters: float) -> None:
    """Only canaries are sent."""
    s.fault(fault, **parameters)


# --- alarms ---


async def withheld(s: Scene) -> None:
    """Three tool calls, each complete at its end."""
    s.fault("withhold_tools")
    await all_served(s, *(s.ask(LONG, tools=TOOLS) for _ in range(3)))


async def hidden(s: Scene, tokens: int | None = LONG, *, fault: str = "hide", others: int = 0, **body: Any) -> None:
    """A long stream of which nothing is seen before its end, once the engine is known."""
    clients = s.crowd(max(others, 2))
    await learnt(s)
    s.begin()
    s.fault(fault)
    if not others:
        for client in clients:
            client.cancel()
    await stopped_after(s, clients, s.open(tokens, **body))


async def interactive_first(s: Scene) -> None:
    """Batch requests wait for as long as interactive ones come."""
    clients = s.crowd(12, tokens=20)
    await s.served()
    s.begin()
    batch = [s.open(5, priority=10) for _ in range(4)]
    await asyncio.sleep(WATCHED_S + 6)  # the interactive load
    assert not any(request.done() for request in batch)
    for client in clients:
        client.cancel()
    await all_served(s, *batch)


async def adapter_waits(s: Scene) -> None:
    """The batch has a place for one adapter, and a long stream of another one has it."""
    holder = s.open(700, model="adapter-1")
    await s.served()
    s.begin()
    waits = s.open(5, model="adapter-2")
    clients = s.crowd(3)
    await stopped_after(s, clients, holder, waits)


async def grammar_waits(s: Scene) -> None:
    """A request whose grammar takes long, between many short ones."""
    clients = s.crowd(3)
    await s.served()
    s.fault("slow_grammar", duration=14)
    await stopped_after(s, clients, s.open(5, response_format={"type": "json_object"}))


async def whole_answers(s: Scene) -> None:
    """Forty short answers in one piece, then a long one."""
    s.begin()
    for _ in range(40):
        await s.ask(2, stream=False)
    await all_served(s, s.ask(LONG, stream=False))


async def bursts(s: Scene) -> None:
    """Short streams whose tokens come all at once, then a long one."""
    s.fault("hide")
    for _ in range(3):
        await asyncio.gather(*(s.ask(5) for _ in range(10)))
    await all_served(s, s.ask(LONG))


async def long_embedding(s: Scene) -> None:
    """Forty embeddings of a word, then one that takes as long as it is."""
    s.begin()
    path, body = EMBEDDING
    for _ in range(40):
        await s.call(path, body())
    await all_served(s, s.call("/v1/embeddings", {"model": "scripted", "input": "word" * 120_000}))


async def without_a_limit(s: Scene, requests: int = 4) -> None:
    """Short answers, then whole ones without a limit of their length."""
    clients = s.crowd(2)
    await learnt(s)
    s.begin()
    for client in clients:
        client.cancel()
    await all_served(s, *(s.ask(None, stream=False) for _ in range(requests)))


async def unknown_work(s: Scene, path: str, **body: Any) -> None:
    """A request without a price, on an engine that does nothing else meanwhile."""
    s.fault("serial_http")
    await all_served(s, s.call(path, body))


async def compiling_in_service(s: Scene, seconds: float, times: int = 1) -> None:
    """Users' streams stand still, and are served to their end."""
    s.crowd(2)
    s.open(tokens=200)
    await s.served()
    s.begin()
    for _ in range(times):
        s.engine.faults.clear("jit")
        await s.ask(1)
        s.engine.faults.start("jit", duration=seconds)
        await all_served(s, s.ask(5))
    assert set(s.ended) == {"done"}, s.story()


async def compiling_after_idle(s: Scene) -> None:
    """A request after an idle time."""
    s.fault("jit", duration=6)
    await all_served(s, s.ask(5))


async def first_long_prompt(s: Scene, *, embedding: bool = False) -> None:
    """A prompt that takes several times the floor."""
    s.begin()
    if embedding:
        await all_served(s, s.call("/v1/embeddings", {"model": "scripted", "input": "word" * 2000}))
    else:
        await all_served(s, s.ask(2, prompt=2000))


async def first_long_prompt_again(s: Scene) -> None:
    """The engine was restarted, and forgot nothing that matters; the sidecar must not either."""
    await first_long_prompt(s)
    s.fault("restart", down=0.5)
    await s.engine.until(lambda: s.engine.restarts == 1)
    await s.served("idle")
    await first_long_prompt(s)


async def served_then_idle(s: Scene, row: Call) -> None:
    """Users are served, then there are no requests, then users are served again."""
    path, body = row
    for _ in range(LEARNT):
        await all_served(s, s.call(path, body()))
    await s.until(lambda: s.seen and s.seen[-1].ready == 200, "ready")
    s.begin()
    await asyncio.sleep(WATCHED_S + 4)  # the idle time
    await all_served(s, s.call(path, body()))


async def memory_released(s: Scene) -> None:
    """Any request meanwhile, such as a canary, would end the engine's process."""
    await s.served("idle")
    assert await s.post("/release_memory_occupation") == 200
    s.begin()
    await asyncio.sleep(WATCHED_S + 4)  # far longer than the cap
    assert s.engine.exit_code is None, "a request was sent"
    assert await s.post("/resume_memory_occupation") == 200
    await all_served(s, s.ask(5))


async def users_model(s: Scene) -> None:
    """Users use the second model of the list, which no canary may evict."""
    for _ in range(3):
        await all_served(s, s.ask(5, model="scripted-2"))
    await s.until(lambda: s.seen and s.seen[-1].ready == 200, "ready")
    s.begin()
    await asyncio.sleep(WATCHED_S)  # the idle time
    await all_served(s, s.ask(5, model="scripted-2"))
    assert (s.engine.models.loads, s.engine.models.loaded) == (1, "scripted-2")


async def nothing_loaded(s: Scene) -> None:
    """No client uses any model."""
    s.begin()
    await asyncio.sleep(WATCHED_S)  # the idle time
    assert s.engine.models.loads == 0


async def foreign_prompt(s: Scene, *, kills: bool = False) -> None:
    """A long prompt keeps the engine silent; nothing of it came through the relay."""
    await s.served("idle")
    s.begin()
    foreign = s.foreign(2, prompt=120_000)
    if kills:
        await asyncio.sleep(2)  # it has been seen
        os.kill(await s.sidecar.control(), signal.SIGKILL)
    await all_served(s, foreign)
    await all_served(s, s.ask(5))


async def foreign_streams(s: Scene) -> None:
    """All slots are taken for longer than a silence may last, then users are served."""
    await s.served("idle")
    s.begin()
    for _ in range(2):
        s.foreign(LONG)
    await s.engine.until(lambda: s.engine.open >= 2)
    await all_served(s, s.ask(5))


async def odd_pages(s: Scene, fault: str, **parameters: float) -> None:
    """Users are served, then there are no requests."""
    clients = s.crowd(2)
    await s.served()
    s.fault(fault, **parameters)
    await asyncio.sleep(WATCHED_S)  # of service
    for client in clients:
        client.cancel()
    await asyncio.sleep(WATCHED_S / 2)  # the idle time


# Patience that would add up over a queue, or start before anything was learned, is longer than a test waits.
PATIENT: Final = {"silence_cap": "400"}
FOUND_S: Final = 80.0
# Without counters a canary decides whether readiness stays; it needs a moment on a busy machine.
UNCOUNTED: Final = PATIENT | {"silence_floor": "6"}
# Counters are read once a second, and later on a busy machine.
COUNTED: Final = {"silence_floor": "4"}
# The engine must be seen to wait for compilers and for others' prompts for longer than readiness does.
SLOW_KILL: Final = {"silence_kill": "16", "silence_cap": "40"}
START_CAP: Final = {"silence_cap": "3"}
RESTARTED: Final = {"kill_interval": "1", "useless_restarts": "0"}
SLOW_FOREIGN: Final = {"prefill_tokens_per_second": 10_000.0}
SLOW_PREFILL: Final = {"prefill_tokens_per_second": 250.0}
TINY_QUEUE: Final = {"max_batch": 1, "max_waiting": 2}

# Models that are loaded on demand, one at a time.
ON_DEMAND: Final = {"models": 2, "model_load_seconds": 2.0}

MODES: Final[dict[int, tuple[Story, ...]]] = {
    24: (Story(partial(amid_a_stream, fault="freeze_busy"), without_canary("refuse_canary")),),
    25: (Story(partial(amid_calls, row=RANKING), without_canary("rerank_only"), relays=TWO),),
    26: (Story(partial(amid_calls, row=GENERATION), without_canary("images_only"), relays=TWO),),
    27: (Story(partial(amid_short_requests, fault="freeze_busy", clients=8), Setting(engine=TINY_QUEUE)),),
    28: (
        Story(
            partial(amid_short_requests, fault="freeze_busy", clients=8),
            Setting(engine=TINY_QUEUE | {"full_status": 429}),
            relays=TWO,
        ),
    ),
    29: (Story(partial(amid_short_requests, fault="refuse_all")),),
    30: (Story(partial(amid_short_requests, fault="worker_lost")),),
    31: (Story(partial(while_idle, fault="worker_lost", status=500), relays=TWO),),
    32: (Story(partial(hangs_again, faults=("freeze",) * 2), Setting(flags=RESTARTED)),),
    33: (Story(partial(hangs_again, faults=("freeze_busy",) * 3), Setting(flags=RESTARTED), relays=TWO),),
    34: (Story(partial(hangs_again, faults=("livelock", "freeze")), Setting(flags=RESTARTED), relays=TWO),),
    35: (Story(full_of_long_prompts, Setting(flags=PATIENT), alone=True, within=FOUND_S),),
    36: (Story(partial(amid_calls, row=TRANSCRIPTION), Setting(flags=PATIENT), relays=TWO, within=FOUND_S),),
    37: (
        Story(
            partial(amid_calls, row=EMBEDDING, fault="freeze_busy"),
            without_canary("embeddings_only", **PATIENT),
            relays=TWO,
            within=FOUND_S,
        ),
    ),
    38: (Story(partial(restarted_inside, fault="restart_silent"), Setting(flags=START_CAP)),),
    39: (Story(partial(restarted_inside, fault="restart_loading"), Setting(flags=START_CAP), relays=TWO),),
    40: (Story(restarted_frozen, Setting(flags=START_CAP), relays=TWO),),
    41: (Story(partial(users_give_up, patience=2.5, fault="zombies"), Setting(engine={"max_batch": 4})),),
    42: (Story(slots_of_others, Setting(engine={"max_batch": 4}), relays=TWO),),
    43: (Story(partial(users_give_up, patience=1.0, fault="freeze_busy"), relays=TWO),),
    44: (Story(partial(while_idle, fault="half_deaf"), Setting(flags={"silence_kill": "12"})),),
    45: (Story(two_ranks, Setting(engine={"data_parallel": 2})),),
    46: (Story(partial(with_odd_pages, pages="slow_metrics"), within=FOUND_S),),
    47: (Story(partial(with_odd_pages, pages="several_backends"), relays=TWO, within=FOUND_S),),
    48: (Story(with_a_queue, Setting(engine={"max_batch": 1}), relays=TWO),),
    49: (Story(partial(while_idle, fault="freeze"), relays=TWO),),
}
ALARMS: Final[dict[int, tuple[Story, ...]]] = {
    18: (Story(withheld, Setting(flags=COUNTED)),),
    19: (Story(partial(hidden, others=3), Setting(flags=COUNTED), relays=TWO),),
    20: (
        Story(
            partial(hidden, tokens=400, fault="withhold_tools", tools=TOOLS),
            Setting(flags=UNCOUNTED, before=begins_with("no_metrics")),
            relays=TWO,
        ),
    ),
    21: (Story(interactive_first, Setting(engine={"max_batch": 4, "scheduling": "priority"})),),
    22: (Story(adapter_waits, Setting(engine={"adapters": 2}), relays=TWO),),
    23: (Story(grammar_waits, relays=TWO),),
    24: (Story(whole_answers, Setting(engine={"max_batch": 1}, flags=COUNTED)),),
    25: (Story(bursts, Setting(flags=COUNTED), relays=TWO),),
    26: (Story(long_embedding, relays=TWO),),
    27: (Story(without_a_limit, Setting(engine={"answer_tokens": LONG}, flags=COUNTED)),),
    28: (Story(partial(hidden, tokens=None), Setting(engine={"answer_tokens": LONG}, flags=COUNTED), relays=TWO),),
    29: (
        Story(
            partial(without_a_limit, requests=1),
            Setting(engine={"answer_tokens": 400}, flags=UNCOUNTED, before=begins_with("no_metrics")),
            relays=TWO,
        ),
    ),
    30: (Story(partial(unknown_work, path="/v1/images/generations?seconds=8", prompt="a tree")),),
    31: (
        Story(partial(unknown_work, path="/api/generate", prompt="a tree", options={"num_predict": 400}), relays=TWO),
    ),
    32: (Story(partial(unknown_work, path="/v1/audio/speech?seconds=8", input="a tree"), relays=TWO),),
    33: (Story(partial(compiling_in_service, seconds=6), Setting(flags=SLOW_KILL)),),
    34: (Story(partial(compiling_in_service, seconds=4, times=3), Setting(flags=SLOW_KILL), relays=TWO),),
    35: (Story(compiling_after_idle, Setting(flags=SLOW_KILL), relays=TWO),),
    36: (Story(first_long_prompt, Setting(engine=SLOW_PREFILL)),),
    37: (Story(partial(first_long_prompt, embedding=True), Setting(engine=SLOW_PREFILL), relays=TWO),),
    38: (Story(first_long_prompt_again, Setting(engine=SLOW_PREFILL), relays=TWO),),
    39: (Story(partial(served_then_idle, row=TRANSCRIPTION), without_canary("audio_only")),),
    40: (Story(partial(served_then_idle, row=RANKING), without_canary("rerank_only"), relays=TWO),),
    41: (Story(partial(served_then_idle, row=CHATTING), without_canary("refuse_canary"), relays=TWO),),
    42: (Story(memory_released, Setting(flags={"silence_cap": "4"})),),
    43: (Story(users_model, Setting(engine=ON_DEMAND, served=False), relays=TWO),),
    44: (Story(nothing_loaded, Setting(engine=ON_DEMAND | {"model_status": "listed"}, served=False), relays=TWO),),
    45: (Story(foreign_prompt, Setting(engine=SLOW_FOREIGN, flags=SLOW_KILL)),),
    46: (Story(partial(foreign_prompt, kills=True), Setting(engine=SLOW_FOREIGN, flags=SLOW_KILL), relays=TWO),),
    47: (Story(foreign_streams, Setting(engine={"max_batch": 2}), relays=TWO),),
    48: (Story(partial(odd_pages, fault="slow_metrics")),),
    49: (Story(partial(odd_pages, fault="several_backends"), relays=TWO),),
    50: (Story(partial(odd_pages, fault="slow_metrics", delay=3600), relays=TWO),),
}
