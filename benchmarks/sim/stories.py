"""Stories of healthy engines that are busy, slow, starting, or blocked.

Each begins on a served engine, and leaves it able to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from sim.sites import spread
from sim.traces import Arrival
from sim.world import World


def faulted(kind: str, low: float, high: float, **parameters: float) -> Callable[[World], None]:
    """A fault of the product's table for a drawn time, then health."""

    def story(w: World) -> None:
        w.engine.fault(kind, **parameters)
        w.run(spread(w.rng, low, high))
        w.engine.heal()

    return story


def again(kind: str, low: float, high: float, pause: float, times: int) -> Callable[[World], None]:
    """A fault that comes and goes."""

    def story(w: World) -> None:
        for _ in range(times):
            w.engine.fault(kind)
            w.run(spread(w.rng, low, high))
            w.engine.heal()
            w.run(spread(w.rng, pause / 2, pause * 2))

    return story


def burst(w: World) -> None:
    """1,280 requests at once, four in five of them cut off by their clients after half a minute."""
    seqs = [w.request(int(spread(w.rng, 50, 2000)), int(spread(w.rng, 10, 200)), w.streams()) for _ in range(1280)]
    w.run(30)
    for seq in seqs[256:]:
        if seq is not None:
            w.abort(seq)
    w.run(30)


def long_burst(w: World) -> None:
    """1,280 prompts of thousands of tokens at once; clients give up after a minute."""
    seqs = [w.request(int(spread(w.rng, 2000, 16_000)), int(spread(w.rng, 10, 100)), w.streams()) for _ in range(1280)]
    w.run(60)
    for seq in seqs[64:]:
        if seq is not None:
            w.abort(seq)
    w.run(30)


def full(w: World) -> None:
    """The batch is full for minutes, health answers after 5 s, and canaries would queue behind users."""
    w.engine.lag = 5.0
    for _ in range(2 * w.site.max_batch):
        w.request(int(spread(w.rng, 200, 2000)), int(spread(w.rng, 200, 1500)), w.streams())
    w.run(45)
    w.engine.lag = 0.0


def full_of_answers(w: World) -> None:
    """An idle engine is filled at once with long answers, none of which streams."""
    w.traffic(None)
    w.drained(60)
    w.run(spread(w.rng, 5, 15))
    for _ in range(2 * w.site.max_batch):
        w.request(int(spread(w.rng, 100, 500)), int(spread(w.rng, 300, 2000)), streams=False)
    w.run(90)


def long_prefill(w: World) -> None:
    """A prompt of 600,000 tokens; where prefills go first, all decodes starve until it ends."""
    w.engine.site = w.site = replace(w.site, kv_tokens=2_000_000)
    w.request(int(spread(w.rng, 200_000, 600_000)), 50, w.streams())
    w.run(spread(w.rng, 90, 300))


def several_prefills(w: World) -> None:
    """Long prompts one behind the other, so that the last waits for all."""
    for _ in range(w.rng.randrange(2, 5)):
        w.request(int(spread(w.rng, 60_000, 250_000)), 50, w.streams())
    w.run(spread(w.rng, 90, 240))


def unlearned_prefill(w: World) -> None:
    """A long prompt is the first request of a sidecar that has just started."""
    w.traffic(None)
    w.drained(60)
    w.new_control()
    w.run(10)
    w.request(int(spread(w.rng, 50_000, 300_000)), 50, w.streams())
    w.run(120)


def slow_checks(w: World) -> None:
    """Prefills of 25 s each queue up, so that a one-token check takes longer than 20 s."""
    tokens = int(25 / w.site.slowness / 0.00005)
    for _ in range(4):
        w.request(min(tokens, 250_000), 20, w.streams())
    w.run(120)


def queue_of_prompts(w: World) -> None:
    """Hundreds of medium prompts wait: a check behind them takes minutes, tokens move all the time."""
    for _ in range(300):
        w.request(int(spread(w.rng, 2000, 12_000)), int(spread(w.rng, 20, 100)), w.streams())
    w.run(90)


def cold_start(w: World) -> None:
    """The engine is restarted: the model loads, then kernels compile for 10 to 20 minutes at the first request."""
    w.traffic(None)
    w.restart_engine(spread(w.rng, 1, 60))
    w.engine.fault("start_hang")
    w.run(spread(w.rng, 30, 300))
    w.engine.heal()
    w.engine.fault("jit", duration=spread(w.rng, 60, 1200))
    w.run(1800)


def late_kernel(w: World) -> None:
    """A new shape compiles a kernel in the midst of service."""
    w.engine.fault("jit", duration=spread(w.rng, 1, 20))
    w.run(60)


def many_kernels(w: World) -> None:
    """Kernels of several new shapes compile one after the other."""
    for _ in range(w.rng.randrange(2, 6)):
        w.engine.fault("jit", duration=spread(w.rng, 1, 15))
        w.run(spread(w.rng, 3, 30))
    w.run(30)


def early_canary(w: World) -> None:
    """Requests and canaries come before the engine is ready."""
    w.restart_engine(spread(w.rng, 1, 60))
    w.engine.fault("start_hang")
    w.run(spread(w.rng, 30, 600))
    w.engine.heal()
    w.run(60)


def flood_at_start(w: World) -> None:
    """Requests pour in while the engine starts, and it compiles when it gets the first."""
    w.restart_engine(spread(w.rng, 1, 30))
    w.engine.fault("start_hang")
    w.traffic(faster(w, 4.0))
    w.run(spread(w.rng, 30, 200))
    w.engine.heal()
    w.engine.fault("jit", duration=spread(w.rng, 5, 120))
    w.run(180)


def storm(w: World) -> None:
    """Far more work than the engine can do, for minutes: queues grow, nothing is broken."""
    w.traffic(faster(w, 6.0))
    w.run(spread(w.rng, 30, 90))


def retry_storm(w: World) -> None:
    """The engine was restarted; clients repeat lost requests, and so do the users of the other replicas."""
    for _ in range(w.site.max_batch):
        w.request(int(spread(w.rng, 500, 8000)), int(spread(w.rng, 50, 400)), w.streams())
    w.run(10)
    lost = len(w.users)
    w.restart_engine(spread(w.rng, 1, 60))
    w.engine.fault("jit", duration=spread(w.rng, 5, 60))
    for _ in range(4 * lost):
        w.request(int(spread(w.rng, 500, 8000)), int(spread(w.rng, 50, 400)), w.streams())
    w.traffic(faster(w, 6.0))
    w.run(spread(w.rng, 60, 180))


def faster(w: World, factor: float) -> Iterator[Arrival]:
    """Short requests, Poisson, at a multiple of what the site takes (at most 8 a second)."""
    at = w.now
    while True:
        at += w.rng.expovariate(min(8.0, factor))
        yield Arrival(at, int(spread(w.rng, 500, 8000)), int(spread(w.rng, 20, 400)))


def serial_prefill(w: World) -> None:
    """HTTP waits behind a prefill of half a minute."""
    w.engine.fault("serial_http")
    w.request(min(250_000, int(27 / w.site.slowness / 0.00005)), 50, w.streams())
    w.run(90)
    w.engine.heal()


def slow_engine(w: World) -> None:
    """Mode 21 below the cap: alive, and 20 to 100 times as slow as ever."""
    w.engine.fault("slow", factor=spread(w.rng, 5, 100))
    w.run(300)
    w.engine.heal()
