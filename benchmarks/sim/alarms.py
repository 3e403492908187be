"""What must stay silent: the 17 alarms of docs/health.md as stories, each with how often it happens in an engine-week.

Rules: a story begins on a served engine under its site's traffic, and leaves it able to go on. The rates are set higher than
operators report, so that a run of weeks holds many of each. Every number is drawn anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sim.sites import spread
from sim.traces import Arrival
from sim.world import World


@dataclass(frozen=True, slots=True)
class Alarm:
    """One row: its number in docs/health.md, what happens, how often a week, and the story."""

    number: int
    text: str
    per_week: float
    story: Callable[[World], None]


def faulted(kind: str, low: float, high: float, **parameters: float) -> Callable[[World], None]:
    """A fault of the product's table for a drawn time, then health."""

    def story(w: World) -> None:
        w.engine.fault(kind, **parameters)
        w.run(spread(w.rng, low, high))
        w.engine.heal()

    return story


def burst(w: World) -> None:
    """1,280 requests at once, four in five of them cut off by their clients after half a minute."""
    seqs = [w.request(int(spread(w.rng, 50, 2000)), int(spread(w.rng, 10, 200)), w.streams()) for _ in range(1280)]
    w.run(30)
    for seq in seqs[256:]:
        if seq is not None:
            w.abort(seq)
    w.run(30)


def full(w: World) -> None:
    """Every place of the batch is taken for minutes, health answers after 5 s, and canaries would queue behind users."""
    w.engine.lag = 5.0
    for _ in range(2 * w.site.max_batch):
        w.request(int(spread(w.rng, 200, 2000)), int(spread(w.rng, 200, 1500)), w.streams())
    w.run(45)
    w.engine.lag = 0.0


def long_prefill(w: World) -> None:
    """A prompt of 600,000 tokens; where prefills go first, all decodes starve until it ends."""
    w.engine.site = w.site = replace(w.site, kv_tokens=2_000_000)
    w.request(int(spread(w.rng, 200_000, 600_000)), 50, w.streams())
    w.run(spread(w.rng, 90, 300))


def slow_checks(w: World) -> None:
    """Prefills of 25 s each queue up, so that a one-token check takes longer than 20 s."""
    tokens = int(25 / w.site.slowness / 0.00005)
    for _ in range(4):
        w.request(min(tokens, 250_000), 20, w.streams())
    w.run(120)


def cold_start(w: World) -> None:
    """The engine is started anew: the model loads, then kernels compile for 10 to 20 minutes at the first request."""
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


def early_canary(w: World) -> None:
    """Requests and canaries come before the engine is ready."""
    w.restart_engine(spread(w.rng, 1, 60))
    w.engine.fault("start_hang")
    w.run(spread(w.rng, 30, 600))
    w.engine.heal()
    w.run(60)


def watchdog_restarts(w: World) -> None:
    """The control process is starved, killed, and starts anew in the midst of a long prefill."""
    w.request(int(spread(w.rng, 50_000, 200_000)), 50, w.streams())
    w.run(spread(w.rng, 1, 20))
    w.pause(spread(w.rng, 3, 60))
    w.new_control()
    w.run(90)


def storm(w: World) -> None:
    """Far more work than the engine can do, for minutes: queues grow, nothing is broken."""
    w.traffic(faster(w, 6.0))
    w.run(spread(w.rng, 30, 90))


def faster(w: World, factor: float) -> Iterator[Arrival]:
    """Short requests, Poisson, at a multiple of what the site takes (at most 8 a second)."""
    at = w.now
    while True:
        at += w.rng.expovariate(min(8.0, factor))
        yield Arrival(at, int(spread(w.rng, 500, 8000)), int(spread(w.rng, 20, 400)))


def own_pause(w: World) -> None:
    """The control process is stopped for a while; engine and relay go on."""
    w.pause(spread(w.rng, 1, 600))
    w.run(60)


def all_pause(w: World) -> None:
    """The whole machine is stopped (a suspended VM): nothing moves, then all go on."""
    w.engine.fault("freeze_busy")
    w.pause(spread(w.rng, 2, 600))
    w.engine.heal()
    w.run(60)


def clock_jump(w: World) -> None:
    """The wall clock jumps by up to a day, either way."""
    w.wall += w.rng.choice((-1, 1)) * spread(w.rng, 1, 86_400)
    w.run(60)


def relay_restart(w: World) -> None:
    """The relay process dies with all its requests and comes back."""
    w.restart_relay()
    w.run(60)


def relay_stops(w: World) -> None:
    """The relay process is stopped: its facts come late, all at once."""
    w.blind = True
    w.run(spread(w.rng, 1, 120))
    w.blind = False
    w.run(60)


def hang_ups(w: World) -> None:
    """Clients hang up in the midst of prefill and decode, some of them on every request."""
    for _ in range(20):
        w.request(int(spread(w.rng, 500, 20_000)), 200, w.streams())
        w.run(1.5)
        for seq in list(w.users.values())[:2]:
            w.abort(seq)
    w.run(30)


def slow_engine(w: World) -> None:
    """Mode 21 below the cap: alive, and 20 to 100 times as slow as ever."""
    w.engine.fault("slow", factor=spread(w.rng, 5, 100))
    w.run(300)
    w.engine.heal()


ALARMS: tuple[Alarm, ...] = (
    Alarm(1, "/health takes 40 s under load", 0.3, faulted("slow_health", 60, 180)),
    Alarm(2, "image work blocks the API loop 1-15 s", 0.5, faulted("api_block", 1, 15)),
    Alarm(3, "1,280 requests at once", 0.05, burst),
    Alarm(4, "full engine, slow /health", 0.2, full),
    Alarm(5, "canary queued behind users", 0.2, full),
    Alarm(6, "2 s limit at max_num_seqs", 0.2, full),
    Alarm(7, "200k-600k-token prefill", 0.5, long_prefill),
    Alarm(8, "cold JIT 1-20 min at start", 0.05, cold_start),
    Alarm(8, "a kernel compiles 1-20 s in service", 0.3, late_kernel),
    Alarm(9, "one-token check over 20 s", 0.2, slow_checks),
    Alarm(10, "profiler stops the world 10-120 s", 0.1, faulted("freeze_busy", 10, 120)),
    Alarm(11, "canary before ready", 0.1, early_canary),
    Alarm(12, "watchdog starved and restarted", 0.3, watchdog_restarts),
    Alarm(13, "overload for minutes", 0.2, storm),
    Alarm(14, "HTTP behind inference", 0.2, faulted("serial_http", 30, 120)),
    Alarm(15, "tokenizer holds the GIL 60 s", 0.2, faulted("api_block", 40, 60)),
    Alarm(16, "sleep, pause, weight update", 0.3, faulted("sleep", 10, 600)),
    Alarm(17, "sidecar stopped 1-600 s", 0.2, own_pause),
    Alarm(17, "machine stopped 2-600 s", 0.2, all_pause),
    Alarm(17, "clock jump", 0.3, clock_jump),
    Alarm(17, "relay restart", 0.3, relay_restart),
    Alarm(17, "relay stopped 1-120 s", 0.2, relay_stops),
    Alarm(0, "garbage metrics", 0.2, faulted("garbage_metrics", 30, 120)),
    Alarm(0, "client hang-ups", 0.3, hang_ups),
    Alarm(0, "20-100 times slower (mode 21)", 0.1, slow_engine),
)
