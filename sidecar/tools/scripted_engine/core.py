"""The engine core: one asyncio task per data-parallel rank that runs the scheduler's steps in simulated time.

The core and the API share a process and nothing else: the API has one `TokenStream` per request, the metrics page shows
what the core last published. A stopped core publishes nothing, so its gauges go stale, as in a real engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.condition import EngineCondition
from sidecar.tools.scripted_engine.faults import Faults
from sidecar.tools.scripted_engine.metrics import EngineMetrics
from sidecar.tools.scripted_engine.scheduler import (
    ScheduledSequence,
    ScheduledStep,
    Scheduler,
    SchedulerLimits,
    StepOutput,
)


class TokenStream:
    """One request as its API handler sees it: the number of ready tokens, and whether it is complete."""

    def __init__(self, sequence: ScheduledSequence, arrived: float) -> None:
        self.sequence = sequence
        self.arrived = arrived
        self.first_at: float | None = None
        self.last_at = arrived
        self.ready = 0
        self.done = False
        self._changed = asyncio.Event()

    async def more(self, seen: int) -> int:
        """Wait for tokens beyond `seen`, or the end. Returns the tokens ready: those that queue up form one piece."""
        while self.ready <= seen and not self.done:
            self._changed.clear()
            await self._changed.wait()
        return self.ready

    def push(self, output: StepOutput, now: float) -> None:
        self.ready += output.tokens
        self.done = output.done
        self.first_at = self.first_at if self.first_at is not None else now
        self.last_at = now
        self._changed.set()


class EngineCore:
    """One rank: its scheduler, its open streams, and the loop that steps it. Every change notifies `activity`."""

    def __init__(
        self, rank: int, limits: SchedulerLimits, faults: Faults, metrics: EngineMetrics, activity: EngineCondition
    ) -> None:
        self.scheduler = Scheduler(limits)
        self.steps = 0
        self._rank = rank
        self._faults = faults
        self._metrics = metrics
        self._streams: dict[ScheduledSequence, TokenStream] = {}
        self._activity = activity
        self._idle_since = asyncio.get_running_loop().time()
        self._compiled = False

    @property
    def open(self) -> int:
        """Requests that are neither done nor aborted."""
        return len(self._streams)

    @contextmanager
    def admit(self, sequence: ScheduledSequence, grammar: bool = False) -> Iterator[TokenStream]:
        """Queue a request; leaving the block early aborts it, as a disconnecting client does."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._start_idle_fault(now)
        if grammar and (seconds := self._faults.behaviour.grammar_seconds):
            sequence.held = True
            loop.call_later(seconds, setattr, sequence, "held", False)
        stream = self._streams[sequence] = TokenStream(sequence, now)
        self.scheduler.add(sequence)
        self._activity.notify()
        try:
            yield stream
        finally:
            if self._streams.pop(sequence, None):
                self._abort(sequence)

    def restart(self) -> None:
        """Become the core of a new process."""
        self.scheduler = Scheduler(self.scheduler.limits)
        self._streams.clear()
        self._compiled = False
        self._idle_since = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Step until cancelled."""
        while True:
            await self._faults.until(self._is_stepping)
            if not self.scheduler.is_busy():
                await self._activity.until(lambda: self.scheduler.is_busy())  # a restart replaces the scheduler
                continue
            step = self.scheduler.plan(self._faults.behaviour)
            self._activity.notify()  # sequences may have been admitted
            if await self._step_time_passed(step.seconds + self._compile_seconds(self._faults.behaviour)):
                self._finish(step, self.scheduler.apply(step))

    def _is_stepping(self, behaviour: Behaviour) -> bool:
        return behaviour.stepping and not behaviour.sleeping and behaviour.dead_rank != self._rank

    async def _step_time_passed(self, seconds: float) -> bool:
        """Wait for the step's duration. False if the behaviour changed and the step must be planned again."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return self._is_stepping(self._faults.behaviour)
        try:
            async with asyncio.timeout(seconds):
                await self._faults.change()
        except TimeoutError:
            return True
        return False

    def _compile_seconds(self, behaviour: Behaviour) -> float:
        """Extra seconds of the first step under the `jit` fault."""
        first = not self._compiled
        self._compiled = behaviour.first_step_seconds > 0
        return behaviour.first_step_seconds if first else 0.0

    def _finish(self, step: ScheduledStep, outputs: list[StepOutput]) -> None:
        now = asyncio.get_running_loop().time()
        self.steps += 1
        if outputs or self._faults.behaviour.empty_steps:
            self._metrics.step(self._rank, outputs)
        for output in outputs:
            stream = self._streams.get(output.sequence)
            if stream:
                self._metrics.output(self._rank, output, now - stream.arrived, now - stream.last_at, stream.ready)
                stream.push(output, now)
            elif output.sequence.zombie:
                self._metrics.generated(self._rank, output.tokens)
            if output.done:
                self._streams.pop(output.sequence, None)
        self._publish(now)
        self._activity.notify()

    def _publish(self, now: float) -> None:
        self._metrics.gauges(self._rank, self.scheduler)
        if not self.scheduler.is_busy():
            self._idle_since = now

    def _abort(self, sequence: ScheduledSequence) -> None:
        self.scheduler.remove(sequence)
        behaviour = self._faults.behaviour
        if self._is_stepping(behaviour):
            self._publish(asyncio.get_running_loop().time())
        if behaviour.on_abort:
            self._faults.start(behaviour.on_abort)
        self._activity.notify()

    def _start_idle_fault(self, now: float) -> None:
        wedge = self._faults.behaviour.after_idle
        if wedge and not self.scheduler.is_busy() and now - self._idle_since >= wedge[0]:
            self._faults.start(wedge[1])
