"""Stories of healthy engines from the field's failure reports: what made sidecars and watchdogs kill them.

Rules: as in stories.py. A story may make the site another one, with a sidecar that knew it so; it is as it was when the
story ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt

from sim.seqs import PLAIN, UNREAD, Seq, Site, Special
from sim.sites import spread
from sim.stories import faster
from sim.traces import Arrival
from sim.world import CALM, World

UNCOUNTED = frozenset({"counters", "iterations"})
MAX_ANSWER_TOKENS = 120_000
CONTEXT_TOKENS = 131_072


# --- tools of the stories ---


@contextmanager
def site(w: World, *, learned: bool = True, **changes: object) -> Iterator[None]:
    """The site is another one for a while, with a sidecar that knew it so for an hour, or for seconds."""
    before = w.site
    renew(w, replace(before, **changes), learned=learned)  # type: ignore[arg-type]
    w.story_at = w.now
    yield
    renew(w, before, learned=True)


def renew(w: World, changed: Site, *, learned: bool) -> None:
    """Another site and another sidecar, whose own start is no part of the story."""
    calm(w)
    w.site = w.engine.site = changed
    began = w.now
    w.new_control()
    w.run(10)
    if learned and w.verdict in CALM and not w.users:
        w.skip(3600, busy=True, taught=[spread(w.rng, 0.003, 0.3) for _ in range(64)])
        w.run(2)
    w.trail = [change for change in w.trail if change.at < began]


def calm(w: World) -> None:
    """The users' work ends, and no new comes."""
    w.traffic(None)
    w.drained(60)


def either(w: World) -> bool:
    """Heads or tails."""
    return w.rng.random() < 0.5


def served(w: World, seqs: Iterable[Seq | None], most: float) -> None:
    """Wait until all these have ended, for at most so many seconds."""
    open_ = [seq for seq in seqs if seq is not None]
    until = w.now + most
    while w.now < until and any(seq.ended_at is None for seq in open_):
        w.tick()


def tokens_in(w: World, seconds: float) -> int:
    """Tokens that one stream gets in so many seconds."""
    return max(2, min(MAX_ANSWER_TOKENS, int(seconds / w.engine.fastest)))


def prompt_of(w: World, seconds: float) -> int:
    """Tokens of a prompt whose prefill takes so many seconds of this engine."""
    a, b, ms = w.co.a, w.co.b, 1000 * seconds / (w.site.slowness * w.site.prefill_slowness)
    return max(1, int((sqrt(a * a + 2 * b * ms) - a) / b))  # each token attends to those before it: half of the square


def counted_or_not(w: World) -> dict[str, object]:
    """A site that counts what it generates, or one that does not; and how long its sequences may be."""
    counts = {"page": True, "lacks": frozenset()} if either(w) else {"page": either(w), "lacks": UNCOUNTED}
    return {**counts, "context": w.rng.choice((0, CONTEXT_TOKENS))}


# --- silence on the wire is not silence of the engine ---


def hidden(share: float) -> Callable[[World], None]:
    """Streams whose tokens the engine keeps: arguments of tool calls to their end, thoughts for a `share` of them."""

    def story(w: World) -> None:
        with site(w, **counted_or_not(w)):
            if either(w):
                w.traffic(few(w))
            seqs = []
            for _ in range(w.rng.choice((2, 4, min(16, w.site.max_batch)))):
                tokens = tokens_in(w, spread(w.rng, 60, 400))
                special = Special(hides=int(share * tokens), unlimited=either(w))
                seqs.append(w.request(int(spread(w.rng, 200, 4000)), tokens, True, special))
            served(w, seqs, 420)
            w.run(10)

    return story


def whole_answers(batch: int) -> Callable[[World], None]:
    """Answers in one piece as long as their model allows, without max_tokens; `batch` 1: a canary waits for them."""

    def story(w: World) -> None:
        with site(w, **counted_or_not(w), **({"max_batch": 1, "kind": "llamacpp"} if batch else {})):
            tokens = [tokens_in(w, spread(w.rng, 60, 600)) for _ in range(1 if batch else w.rng.randrange(1, 9))]
            seqs = [w.request(int(spread(w.rng, 200, 4000)), n, False, Special(unlimited=True)) for n in tokens]
            served(w, seqs, 620)
            w.run(10)

    return story


def after_short_answers(w: World) -> None:
    """One slot: forty short answers in one piece, then one of minutes."""
    with site(w, **counted_or_not(w), max_batch=1, kind="llamacpp"):
        for _ in range(40):
            served(w, [w.request(50, tokens_in(w, spread(w.rng, 0.1, 1)), False)], 20)
        served(w, [w.request(50, tokens_in(w, spread(w.rng, 80, 300)), False, Special(unlimited=either(w)))], 320)
        w.run(10)


# --- later requests are served first ---


def steady(w: World, until: float, specials: list[Special], seconds: float = 4.0) -> None:
    """One request a second, each of `seconds` of decoding, with these in turn."""
    n = 0
    while w.now < until:
        w.request(int(spread(w.rng, 100, 1000)), tokens_in(w, seconds), w.streams(), specials[n % len(specials)])
        n += 1
        w.run(1)


def priorities(w: World) -> None:
    """Four slots: forty batch requests wait behind interactive ones that come later."""
    with site(w, order="priority", max_batch=4):
        for _ in range(40):
            w.request(int(spread(w.rng, 100, 2000)), tokens_in(w, spread(w.rng, 2, 8)), w.streams(), Special(10))
        steady(w, w.now + spread(w.rng, 120, 300), [PLAIN])


def adapters(w: World) -> None:
    """Two LoRA slots: users of rare adapters wait for as long as popular ones are asked for."""
    with site(w, adapters=2):
        popular = [Special(adapter="a"), Special(adapter="b")]
        for adapter in "acbde":
            w.request(200, tokens_in(w, 4), w.streams(), Special(adapter=adapter))
        steady(w, w.now + spread(w.rng, 90, 240), popular)


def grammars(w: World) -> None:
    """Grammars compile, or KV caches are fetched, for up to three minutes, while others are served or nothing is."""
    if either(w):
        calm(w)
    special = [Special(prepares=spread(w.rng, 20, 180)) for _ in range(w.rng.randrange(1, 7))]
    seqs = [w.request(int(spread(w.rng, 200, 4000)), tokens_in(w, 3), w.streams(), each) for each in special]
    served(w, seqs, 200)
    w.run(10)


def prefixes(w: World) -> None:
    """Longest cached prefix first: the order of arrival says nothing, and queues are long."""
    with site(w, order="prefix", kind="sglang", max_batch=8):
        w.traffic(faster(w, 4.0))
        w.run(spread(w.rng, 60, 150))


# --- the engine stops, or is far slower than its coefficients predict ---


def compiles(times: int, low: float, high: float) -> Callable[[World], None]:
    """The whole engine stops during service while kernels of a new shape compile."""

    def story(w: World) -> None:
        for _ in range(times):
            seconds = spread(w.rng, low, high)
            w.engine.fault("jit", duration=seconds)
            if either(w):
                w.request(1000, 100, w.streams())
            w.run(seconds + spread(w.rng, 20, 60))

    return story


def stands(*shown: str) -> Callable[[World], None]:
    """The whole engine stands for 10 to 60 s and goes on; meanwhile its processes show one of these."""

    def story(w: World) -> None:
        seconds = spread(w.rng, 10, 60)
        w.request(1000, 5000, w.streams())
        w.run(2)
        w.shows = w.rng.choice(shown)
        w.engine.fault("jit", duration=seconds)
        w.run(seconds)
        w.shows = ""
        w.run(spread(w.rng, 20, 60))

    return story


def slow_site(w: World) -> None:
    """A sidecar that has seen short prompts only meets a long one, 100 to 700 times slower than its coefficients."""
    slow = spread(w.rng, 100, 700) / w.site.slowness
    counts = {"counts_prefill": True, "kind": "llamacpp", "lacks": frozenset(), "page": True} if either(w) else {}
    batch = w.rng.choice((1, 4))
    with site(w, learned=False, prefill_slowness=slow, kv_tokens=2_000_000, max_batch=batch, **counts):
        for _ in range(w.rng.randrange(0, 12)):
            served(w, [w.request(w.rng.randrange(5, 60), 10, w.streams())], 30)
        seconds = spread(w.rng, 40, 600)
        served(w, [w.request(prompt_of(w, seconds), 20, w.streams())], 1.2 * seconds + 30)
        w.run(10)


# --- work that the relay does not know ---


def foreign_prompt(*, restarts: bool) -> Callable[[World], None]:
    """A long prompt past the relay, and users behind it; `restarts`: the sidecar does so meanwhile."""

    def story(w: World) -> None:
        with site(w, page=True, kv_tokens=2_000_000):
            seconds = spread(w.rng, 30, 400)
            w.past_relay(prompt_of(w, seconds), 50)
            w.run(spread(w.rng, 2, 20))
            if restarts:
                w.pause(spread(w.rng, 2, 20))
                w.new_control(remembers=either(w))
                w.run(spread(w.rng, 0.5, 20))
            if either(w):
                w.request(500, 20, w.streams())
            w.run(seconds + 20)

    return story


def unread(w: World) -> None:
    """Images of up to two minutes each, by a route that the relay does not read."""
    with site(w, page=either(w)):
        seconds = [spread(w.rng, 20, 120) for _ in range(w.rng.randrange(1, 4))]
        served(w, [w.request(1, 1, False, Special(route=UNREAD, seconds=s)) for s in seconds], sum(seconds) + 30)
        w.run(15)


def pieces(route: str) -> Callable[[World], None]:
    """Answers that come in pieces without a token that the relay could count: lines of JSON, raw audio."""

    def story(w: World) -> None:
        with site(w, page=either(w), lacks=UNCOUNTED, max_batch=w.rng.choice((1, 8))):
            tokens = [tokens_in(w, spread(w.rng, 30, 150)) for _ in range(w.rng.randrange(1, 5))]
            seqs = [w.request(int(spread(w.rng, 50, 4000)), n, True, Special(route=route)) for n in tokens]
            served(w, seqs, 300)
            w.run(10)

    return story


def route(name: str, *, learned: bool) -> Callable[[World], None]:
    """Only requests of one route, whose answers come at once. `learned`: the long ones after many short ones."""

    def story(w: World) -> None:
        with site(w, learned=learned, page=either(w), lacks=UNCOUNTED, kv_tokens=2_000_000):
            short = [spread(w.rng, 0.05, 4) for _ in range(30 if learned else 0)]
            for seconds in (*short, *(spread(w.rng, 10, 60 if learned else 300) for _ in range(2))):
                special = Special(route=name, seconds=seconds)
                served(w, [w.request(int(1000 * seconds) + 1, 1, False, special)], seconds + 30)
            w.run(10)

    return story


# --- pages as they are ---


def odd_pages(**changes: object) -> Callable[[World], None]:
    """A page that takes seconds, or that another process answers each time, during traffic and a long prefill."""

    def story(w: World) -> None:
        lacks = frozenset({"started"}) if either(w) else frozenset()
        with site(w, page=True, lacks=lacks, kv_tokens=2_000_000, **changes):
            w.traffic(few(w))
            w.run(spread(w.rng, 20, 60))
            w.request(prompt_of(w, spread(w.rng, 10, 60)), 50, w.streams())
            w.run(90)
            calm(w)
            w.run(20)

    return story


# --- starts, rests, refusals ---


def long_start(w: World) -> None:
    """The engine is restarted next to a running sidecar, and takes up to 20 minutes to load."""
    w.traffic(None)
    seconds = spread(w.rng, 300, 1170)
    closed = w.rng.choice((1.0, 10.0, seconds))
    w.restart_engine(closed)
    w.engine.fault("start_hang")
    w.run(seconds - closed)
    w.engine.heal()
    w.run(30)


def released(*, seen: bool) -> Callable[[World], None]:
    """The memory is released for training. `seen`: by a call through the relay; then a canary would kill the core."""

    def story(w: World) -> None:
        calm(w)
        w.engine.fault("weight_update")
        if seen:
            w.direct("engine_sleeping", on=True)
            w.engine.fault("memory_released")
        w.run(spread(w.rng, 200, 1500) if seen else spread(w.rng, 60, 600))
        w.engine.heal()
        if seen:
            w.direct("engine_sleeping", on=False)
        w.run(30)

    return story


def bounded_queue(w: World) -> None:
    """Far more requests than the engine takes: it refuses the rest, and serves what it has."""
    with site(w, queue=w.rng.choice((2, 8, 32)), max_batch=8, kind=w.rng.choice(("vllm", "tgi"))):
        w.traffic(faster(w, 6.0))
        w.run(spread(w.rng, 60, 120))
        w.traffic(None)
        w.run(20)


def wrong_names(w: World) -> None:
    """Users ask only for a model that is not there, for minutes; canaries pass."""
    calm(w)
    until = w.now + spread(w.rng, 60, 300)
    while w.now < until:
        w.wrong()
        w.run(spread(w.rng, 0.5, 8))


def impatient(w: World) -> None:
    """Clients leave after seconds, behind prefills that take longer than they wait."""
    with site(w, kv_tokens=2_000_000):
        w.patience = spread(w.rng, 5, 30)
        w.request(prompt_of(w, spread(w.rng, 40, 120)), 50, w.streams(), Special(patient=True))
        for _ in range(5):
            w.request(500, 50, w.streams())
            w.run(3)
        w.run(105)
        w.patience = 0.0


def without_canary(w: World) -> None:
    """The engine refuses every canary: a prefill, a compilation, a long answer in one piece, each alone."""
    with site(w, takes_canary=False, kv_tokens=2_000_000, **counted_or_not(w)):
        w.traffic(few(w))
        w.run(60)
        w.traffic(None)
        for _ in range(2):
            which = w.rng.randrange(3)
            if which == 0:
                served(w, [w.request(prompt_of(w, spread(w.rng, 20, 60)), 20, w.streams())], 120)
            elif which == 1:
                w.engine.fault("jit", duration=spread(w.rng, 10, 60))
                served(w, [w.request(500, 20, w.streams())], 120)
            else:
                served(w, [w.request(500, tokens_in(w, spread(w.rng, 30, 200)), False, Special(unlimited=True))], 220)
            w.run(20)


def few(w: World) -> Iterator[Arrival]:
    """Short requests, one in two seconds."""
    at = w.now
    while True:
        at += w.rng.expovariate(0.5)
        yield Arrival(at, int(spread(w.rng, 100, 2000)), int(spread(w.rng, 10, 200)))
