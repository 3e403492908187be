"""Stories around a healthy engine: the sidecar's processes, operators, clients, and others that use the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sim.sites import spread
from sim.world import World


def watchdog_restarts(w: World) -> None:
    """The control process is starved, killed and restarted amid a long prefill; half the time it has its state."""
    w.request(int(spread(w.rng, 50_000, 200_000)), 50, w.streams())
    w.run(spread(w.rng, 1, 20))
    w.pause(spread(w.rng, 3, 60))
    w.new_control(remembers=w.rng.random() < 0.5)
    w.run(90)


def reported(kind: str, **tells: bool) -> Callable[[World], None]:
    """The engine rests, and its page or its own answer says so."""

    def story(w: World) -> None:
        w.engine.site = w.site = replace(w.site, **tells)
        w.engine.fault(kind)
        w.run(spread(w.rng, 10, 600))
        w.engine.heal()
        w.run(30)

    return story


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
    """The relay process is stopped: its events come late, all at once."""
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


def directed(kind: str, what: str, low: float, high: float) -> Callable[[World], None]:
    """The engine is stopped on purpose by an order through the relay, and goes on by another."""

    def story(w: World) -> None:
        w.direct(what, on=True)
        w.engine.fault(kind)
        w.run(spread(w.rng, low, high))
        w.engine.heal()
        w.direct(what, on=False)
        w.run(30)

    return story


def starved_sidecar(w: World) -> None:
    """The node's CPUs are taken: ticks come late by up to 10 s, again and again, amid a long prefill."""
    w.request(int(spread(w.rng, 50_000, 200_000)), 50, w.streams())
    for _ in range(20):
        w.pause(spread(w.rng, 0.5, 10))
        w.run(spread(w.rng, 0.5, 5))


def restarts_and_jump(w: World) -> None:
    """The sidecar restarts twice within a minute, and the clock is set in between."""
    w.request(int(spread(w.rng, 20_000, 200_000)), 50, w.streams())
    w.new_control(remembers=True)
    w.run(spread(w.rng, 1, 30))
    w.wall += w.rng.choice((-1, 1)) * spread(w.rng, 10, 3600)
    w.run(spread(w.rng, 1, 30))
    w.new_control(remembers=w.rng.random() < 0.5)
    w.run(90)


def slow_clients(share: float) -> Callable[[World], None]:
    """Some of the clients, or all, do not read for a while; what they wait for is long done."""

    def story(w: World) -> None:
        for _ in range(w.site.max_batch):
            w.request(int(spread(w.rng, 200, 4000)), int(spread(w.rng, 50, 800)), streams=True)
        w.run(3)
        seqs = [seq for seq in w.users.values() if w.rng.random() < share]
        for seq in seqs:
            w.unread(seq)
        if share == 1.0:
            w.traffic(None)
        w.run(spread(w.rng, 20, 300))
        for seq in seqs:
            w.read(seq)
        w.run(30)

    return story


def foreign_work(w: World) -> None:
    """A client reaches the engine past the relay, with prompts that no one here can price."""
    w.traffic(None)
    w.drained(60)
    for _ in range(w.rng.randrange(2, 8)):
        w.past_relay(int(spread(w.rng, 500, 60_000)), int(spread(w.rng, 20, 800)))
        w.run(spread(w.rng, 5, 40))
