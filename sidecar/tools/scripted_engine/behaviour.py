"""Pure: the scripted engine's current behaviour as data. Scheduler, core and API read it; faults change it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the engine does now. The defaults are a healthy engine. Seconds are wall time."""

    # core
    stepping: bool = True  # the core runs steps at all
    dead_rank: int | None = None  # the data-parallel rank whose core does not
    admitting: bool = True  # waiting sequences become running ones
    prefilling: bool = True
    decoding: bool = True
    first_token: bool = True  # a finished prefill yields a token
    last_token: bool = True  # a sequence of more than `short` tokens can generate its last token
    short: int = 0
    stuck_one: bool = False  # the oldest running sequence never advances
    zombies: bool = False  # sequences without a client fill the batch and generate forever
    grammar_seconds: float = 0.0  # before a request with a grammar can be scheduled; later ones overtake it
    oversized: bool = False  # a prompt over the KV capacity is queued instead of refused
    kv_usage: float | None = None  # reported instead of the actual value
    empty_steps: bool = False  # steps without output are counted as iterations
    gauges_zeroed: bool = False  # running and waiting always read 0
    rank_zeroed: bool = False  # those of the dead rank read 0
    step_factor: float = 1.0
    prefill_seconds: float | None = None  # duration of every prefill, regardless of size
    first_step_seconds: float = 0.0  # added once, to the next step
    on_abort: str = ""  # the fault that a client's abort starts
    after_idle: tuple[float, str] | None = None  # (idle seconds, the fault that the next request starts)
    # API
    loading: bool = False  # start-up has not finished
    answering: bool = True  # any HTTP response at all
    serial: bool = False  # one HTTP request at a time, inference included
    deaf: bool = False  # half of the new connections are accepted and get no answer
    max_pieces: int | None = None  # pieces of a stream that reach its client
    hidden: float = 0.0  # tokens of a stream that are generated before the first reaches its client
    hides_tools: bool = False  # a stream with tools reaches its client when all of it is generated
    error: int = 0  # status of all work; 0: none
    serves: tuple[str, ...] = ()  # beginnings of the paths that are served as work; (): all
    unserved_status: int = 404  # of other work
    one_token: bool = True  # completions of one token, and embeddings, are not refused with 400
    lists_models: bool = True
    memory_released: bool = False  # work ends the process
    pnm: bool = True  # whether it decodes an image in PNM, in which prepared ones come
    health_status: int = 200
    health_delay: float = 0.0
    metrics: str = "page"  # "page", "garbage", "none"
    metrics_delay: float = 0.0
    backends: int = 1  # sets of counters that the pages show in turn
    text: str = ""  # every token's text; "": varied words
    sleeping: bool = False
    paused: bool = False
    # process
    port_open: bool = True
    exit_code: int | None = None
    restart: tuple[float, str] | None = None  # (seconds with a closed port, the fault of the next process)
