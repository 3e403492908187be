"""The queue in front of the image workers: no tenant keeps another waiting for longer than one job."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ImagesBusy
from sidecar.images.fair_slots import MAX_REMEMBERED, REMEMBERED_S, FairSlots, SlotsFull
from sidecar.images.service import ImageService
from sidecar.images.worker_queue import WorkerQueue
from sidecar.kernels.grid import ProcessorSpec
from sidecar.tools import synthetic_photos

from .conftest import Server
from .test_workers import both, stopped

PHOTO = base64.b64encode(synthetic_photos.photo(640, 480))


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    """Let all tasks run until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


class Jobs:
    """Jobs that hold a slot until they are ended, in the order in which they got it."""

    def __init__(self, slots: FairSlots) -> None:
        self.slots = slots
        self.running: list[str] = []
        self.refused: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, *tenants: str) -> None:
        for tenant in tenants:
            self.tasks.append(asyncio.create_task(self._run(tenant)))
            await settle()

    async def _run(self, tenant: str) -> None:
        try:
            await self.slots.acquire(tenant)
        except SlotsFull:
            self.refused.append(tenant)
        else:
            self.running.append(tenant)

    async def end(self, tenant: str, seconds: float = 0.01) -> None:
        self.running.remove(tenant)
        self.slots.release(tenant, seconds)
        await settle()


async def test_a_free_slot_goes_to_the_next_tenant_in_turn() -> None:
    """One tenant with many waiting jobs and one with few get slots by turns; within a tenant by arrival."""
    jobs = Jobs(FairSlots(1, 1, 64))
    await jobs.start(*"aaaaa", *"bb", "c")
    order = []
    while jobs.running:
        order += jobs.running
        await jobs.end(jobs.running[0])
    assert "".join(order) == "aabcabaa"


async def test_alone_a_tenant_takes_all_slots_whatever_its_jobs_take() -> None:
    """Nothing is kept free for tenants that are not there."""
    jobs = Jobs(FairSlots(4, 2, 64))
    await jobs.start("a")
    await jobs.end("a", 5.0)
    await jobs.start(*"aaaaa")
    assert jobs.running == list("aaaa")


async def test_long_jobs_leave_a_worker_to_others() -> None:
    """A tenant whose jobs take long holds fewer slots than there are workers while another uses images."""
    jobs = Jobs(FairSlots(6, 3, 64))
    await jobs.start("a", "b")
    await jobs.end("a", 5.0)
    await jobs.end("b")
    await jobs.start(*"aaaa", "b", "b")
    assert jobs.running == ["a", "a", "b", "b"] and jobs.slots.waiting == 2
    await jobs.end("a", 5.0)
    assert jobs.running == ["a", "b", "b", "a"]
    for _ in range(20):  # its jobs become short again, one by one
        await jobs.end("a")
        await jobs.start("a")
    assert jobs.running.count("a") == 3 and jobs.slots.waiting == 0


async def test_a_tenant_that_left_is_forgotten() -> None:
    """A minute later the other is alone again; its waiting job runs with its next one."""
    clock = Clock()
    jobs = Jobs(FairSlots(4, 2, 64, now=clock))
    await jobs.start("a", "b")
    await jobs.end("a", 5.0)
    await jobs.end("b")
    await jobs.start(*"aaa")
    assert jobs.running == ["a"]
    clock.now = REMEMBERED_S + 1
    await jobs.end("a", 5.0)
    assert jobs.running == ["a", "a"]


async def test_names_do_not_pile_up() -> None:
    """A client that chooses a new name for each job leaves a bounded number of them."""
    jobs = Jobs(FairSlots(2, 1, 64, now=Clock()))
    await jobs.start("stays")
    for index in range(2 * MAX_REMEMBERED):
        await jobs.slots.acquire(str(index))
        jobs.slots.release(str(index), 0.01)
    assert len(jobs.slots._shares) <= MAX_REMEMBERED + 1 and jobs.slots._shares["stays"].held == 1


async def test_over_the_limit_the_longest_queue_loses_its_newest() -> None:
    """A tenant that fills the queue keeps no other out of it."""
    jobs = Jobs(FairSlots(1, 1, 3))
    await jobs.start(*"aaaa")
    assert jobs.refused == []
    await jobs.start("a")
    assert jobs.refused == ["a"] and jobs.slots.waiting == 3
    await jobs.start("b", "b")
    assert jobs.refused == ["a", "a", "b"]
    assert {name: len(waiting) for name, waiting in jobs.slots._waiting.items()} == {"a": 2, "b": 1}


STEP = st.tuples(st.sampled_from(["start", "end", "cancel"]), st.sampled_from("abc"), st.integers(0, 9))


@given(st.lists(STEP, max_size=60))
def test_slots_are_neither_lost_nor_made(steps: list[tuple[str, str, int]]) -> None:
    """After any sequence of jobs, ends and cancellations all slots are free again, and nobody waits."""

    async def play() -> None:
        slots = FairSlots(3, 2, 5)
        held: list[str] = []
        tasks: list[asyncio.Task[Any]] = []

        async def run(tenant: str) -> None:
            try:
                await slots.acquire(tenant)
            except SlotsFull:
                return
            held.append(tenant)

        for what, tenant, number in steps:
            if what == "start":
                tasks.append(asyncio.create_task(run(tenant)))
            elif what == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif what == "end" and held:
                slots.release(held.pop(number % len(held)), number / 10)
            if number % 2:
                await settle()
            assert len(held) <= 3 and slots.waiting <= 5
        await settle()
        while held:
            slots.release(held.pop(), 0.0)
            await settle()
        assert slots.waiting == 0 and slots._free == 3
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())


async def test_an_image_is_not_kept_waiting_by_another_tenants_slow_ones(server: Server, spec: ProcessorSpec) -> None:
    """Real workers: one of two is held by a tenant whose images take long, and no more; others are served meanwhile."""
    workers = await asyncio.to_thread(both, server)
    queue = WorkerQueue(server.path, server.settings, deadline=30.0, long_job=0.0)  # each of its jobs counts as long
    images = ImageService(server.path, server.settings, spec, queue=queue)
    for tenant in ("slow", "quick"):
        await images.inline(PHOTO, "x", tenant)
    with stopped(workers[0]):
        slow = [asyncio.create_task(images.inline(PHOTO, "x", "slow")) for _ in range(8)]
        await settle()
        assert queue._slots._shares["slow"].held == 1 and queue._slots.waiting == 7
        # whichever worker took the slow one, another is free; one that is stopped may take a connection of the backlog
        quick = [asyncio.create_task(images.inline(PHOTO, "x", "quick")) for _ in range(3)]
        done, _ = await asyncio.wait(quick, return_when=asyncio.FIRST_COMPLETED)
        assert done
    assert [p.outcome for p in await asyncio.gather(*slow, *quick)] == ["ok"] * 11


async def test_a_full_queue_refuses_who_filled_it(start_server: Callable[..., Server], spec: ProcessorSpec) -> None:
    """Real workers: with the queue full of one tenant's images, its newest is refused and another's waits."""
    server = start_server(image_workers=1)
    queue = WorkerQueue(server.path, server.settings, deadline=30.0, max_waiting=2)
    images = ImageService(server.path, server.settings, spec, queue=queue)
    await images.inline(PHOTO, "x")
    (worker,) = server.workers()
    with stopped(worker):
        greedy = [asyncio.create_task(images.inline(PHOTO, "x", "greedy")) for _ in range(4)]
        await settle()
        other = asyncio.create_task(images.inline(PHOTO, "x", "other"))
        await settle()
        assert [job.done() for job in greedy] == [False, False, False, True]
        with pytest.raises(ImagesBusy):
            await greedy[3]
    assert (await other).outcome == "ok"
    assert [p.outcome for p in await asyncio.gather(*greedy[:3])] == ["ok"] * 3
