"""Frozen records that cross process and module borders.

Rules:
- Times are seconds on the machine's monotonic clock, which all its processes share, unless the name says `wall`.
- No field holds a prompt, an image, or a header value of a user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import msgspec

# "not_begun": its client left while the engine cannot have begun it.
Outcome = Literal["ok", "engine_error", "client_cancelled", "not_begun", "rejected", "stalled", "lost"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

State = Literal["starting", "idle", "progressing", "quiet", "suspect", "stalled", "dead", "exempt", "unknown"]
STATES: Final[tuple[State, ...]] = get_args(State)


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A record created for every request and sent as an array of its fields, in order."""


class RequestSize(Record, frozen=True):
    """One request's size in tokens. Those of images, audio and video are encoder outputs and part of `uncached`.

    Tokens are sums over all sequences. `prompts` are computed each for itself, and each gives as many answers:
    `sequences` in all. `skew` is 1 where all prompts are equally long: the mean of their squares over the square of
    their mean. `audio_seconds`: length of an upload that an audio encoder processes (transcription).
    """

    uncached: int
    cached: int = 0
    output: int = 0
    image_tokens: int = 0
    images: int = 0
    audio_tokens: int = 0
    audios: int = 0
    video_tokens: int = 0
    videos: int = 0
    image_squares: int = 0  # the sum of the squares of each image's tokens
    prompts: int = 1
    sequences: int = 1
    skew: float = 1.0
    audio_seconds: float = 0.0
    video_frames: int = 0

    @property
    def has_media(self) -> bool:
        """Whether pictures, sounds or videos are part of the prompt."""
        return bool(self.images or self.audios or self.videos)


class Trace(Record, frozen=True):
    """W3C trace context of a request: 32 and 16 lower-case hex digits; `parent_id` is empty for a root."""

    trace_id: str
    span_id: str
    parent_id: str
    sampled: bool
    state: str = ""


class HttpRequest(Record, frozen=True):
    """The HTTP request of a sampled trace. `path` is without its query, which may hold a key."""

    method: str
    path: str
    scheme: str
    version: str  # "1.1"


class AnswerDetails(Record, frozen=True):
    """What an answer says of itself, for a sampled trace: bounded names, no content."""

    id: str = ""
    model: str = ""
    finish_reasons: tuple[str, ...] = ()


# --- events: relay -> control ---

LONGEST_ANSWER_TOKENS: Final = 1 << 17  # of an answer without max_tokens: models of today give no longer ones
# Routes that request no tokens; their answer counts as a stream of one event.
SHORT_ROUTES: Final = ("embeddings", "rerank", "score", "pooling", "classify", "decisions")
TAIL_MULTIPLES: Final = (1, 2, 4, 8)  # of the expected output, for which an estimate gives what still remains


class Admitted(Record, tag=True, frozen=True):
    """A request was admitted and holds `mu`, the price of what is `expected`, until it is settled.

    `priority` is the one that its client asked for. `reorders`: engines may serve later ones first, as a grammar is
    compiled or a KV transfer awaited. `withholds`: its stream may be silent while it is generated (tools).
    """

    id: str
    at: float
    tenant: str
    model: str
    route: str  # "chat", "completions", "embeddings", ...: a route of load.api_routes
    stream: bool
    expected: RequestSize
    max_output: int | None
    mu: float
    trace: Trace | None = None
    tail: tuple[int, ...] = ()  # the output still expected after TAIL_MULTIPLES times `expected`; empty if unknown
    priority: int = 0
    reorders: bool = False
    withholds: bool = False
    http: HttpRequest | None = None  # only if `trace` is sampled


class FirstToken(Record, tag=True, frozen=True):
    """The first bytes of a stream reached the relay: its prefill is done. An answer in one piece has none."""

    id: str
    at: float


class Delivered(Record, tag=True, frozen=True):
    """The engine sent `tokens` more stream events and `bytes` more body bytes since the request's last Delivered."""

    id: str
    at: float
    tokens: int
    bytes: int


class Usage(Record, frozen=True):
    """Usage reported by the engine. `audio_seconds`: length of the processed audio; 0 if not reported."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    audio_seconds: float = 0.0


class Settled(Record, tag=True, frozen=True):
    """A request ended, in exactly one way.

    `overhead` is the relay's own time in seconds: from the client's last request byte to the relay's last byte to the
    engine, less image work.
    """

    id: str
    at: float
    outcome: Outcome
    status: int  # the engine's HTTP status, 0 where there was none
    usage: Usage | None
    delivered_tokens: int
    delivered_bytes: int
    first_at: float | None  # when its FirstToken came; None if none did, as for an answer in one piece
    sent_at: float | None  # when it had been written to the engine, None if it never was
    overhead: float
    error: str = ""  # reason code, never free text of a client
    estimated: bool = False  # parts of `usage` were not reported by the engine, or do not cover the whole answer
    details: AnswerDetails | None = None  # only if its trace is sampled


class ImagePrepared(Record, tag=True, frozen=True):
    """One image of request `id` (empty for /v1/preprocess) was prepared, passed through, or rejected."""

    id: str
    at: float  # when it ended
    format: str  # "jpeg", "png", "webp", ..., "unknown"
    outcome: str  # "ok", "cached", "passed", "rejected", "failed"
    seconds: float  # wall time in the relay, queueing included
    stages: tuple[tuple[str, float], ...]  # ("decode", s), ("resize", s), ("encode", s), ... inside the worker
    bytes_in: int
    bytes_out: int
    reason: str = ""  # why it passed: a code of images.pass_reasons


class RequestBlocked(Record, tag=True, frozen=True):
    """An open request is blocked (`on`) by a client that does not read, or by the relay's own queue; or it resumed."""

    id: str
    at: float
    on: bool  # the engine is not to blame for the silence in between


class EnginePauseChanged(Record, tag=True, frozen=True):
    """The engine accepted a call that pauses its work on purpose (`on`), or that resumes it. A pause is not a hang.

    `shown`: the engine's own state (`/is_sleeping`, `/is_paused`) shows such a pause, and its end.
    """

    at: float
    what: str  # the reason code: "engine_sleeping", "engine_paused", "engine_profiling" or "weight_update"
    on: bool
    shown: bool = True


# The code of a call that the engine takes only while it is idle: no pause, and no exemption.
CACHE_RESET: Final = "cache_reset"


class Directing(Record, tag=True, frozen=True):
    """A call that pauses or resumes the engine is in progress (`on`), or done; `taken`: the engine answered 2xx.

    One that stops its work is announced before the engine gets it; control answers with CanariesOver.
    """

    at: float
    id: int  # the relay's own
    what: str  # as in EnginePauseChanged, or CACHE_RESET
    on: bool
    taken: bool = False


class UnreadRequest(Record, tag=True, frozen=True):
    """A request of unknown cost is with the engine (`on`), or over. It is passed on unread, and may be work.

    `id` is the relay's own. Its bytes are reported by Delivered with 0 tokens. `status` is the engine's, 0 where there
    was none. `path_class` is one of load.api_routes; its end has one only if its beginning was not reported, as too
    many were open.
    """

    id: str
    at: float
    on: bool
    status: int = 0
    path_class: str = ""


class Heartbeat(Record, tag=True, frozen=True):
    """A relay process is alive: its event loop lag (seconds), open requests, and open files. Sent once a second."""

    at: float
    lag: float
    open: int
    open_files: int = 0
    max_files: int = 0


class RelayConnected(Record, tag=True, frozen=True):
    """The first record of a connection: which relay this is. The relay then replays the events of its open requests."""

    at: float
    index: int
    pid: int
    restarts: int


class LoadSubscribed(Record, tag=True, frozen=True):
    """The only record of a process that is not a relay and subscribes to the load reports that relays receive."""

    at: float
    pid: int


class MetricsPageRequested(Record, tag=True, frozen=True):
    at: float


# --- commands: control -> relay ---


class LoadReport(Record, tag=True, frozen=True):
    """The load as response headers, ready to send; updated about once a second."""

    orca_json: str
    orca_text: str
    verdict: State
    engine_kind: str = ""  # "" until the engine is identified
    orca_bin: str = ""
    utilization: float = 1.0  # the headline one; spill-over is decided by it and by mu_max_in_flight
    mu_max_in_flight: float = 0.0
    images_pass: str = ""  # why images pass unprepared to this engine (engines.image_loading), or ""
    process: int = 0  # grows with each process of the engine that was met
    cached_share: float | None = None  # recent share of prompt tokens, from the engine's counters; None without them


class MetricsPage(Record, tag=True, frozen=True):
    at: float
    text: str  # the merged page, ready to send


class AbortRequests(Record, tag=True, frozen=True):
    """Abort open requests: close their connections to the engine, and send their clients an error of this code."""

    ids: tuple[str, ...]
    code: str


class CanariesOver(Record, tag=True, frozen=True):
    """No canary is with the engine, and none is sent while these calls (Directing.id) that stop its work are."""

    calls: tuple[int, ...]


class SettlementsAcked(Record, tag=True, frozen=True):
    """The control process has recorded the first `count` settlements of this connection."""

    count: int


_RequestEvent = Admitted | FirstToken | Delivered | Settled | ImagePrepared | RequestBlocked
_EngineEvent = EnginePauseChanged | Directing | UnreadRequest
_ProcessEvent = Heartbeat | RelayConnected | LoadSubscribed | MetricsPageRequested
Event = _RequestEvent | _EngineEvent | _ProcessEvent
Command = LoadReport | MetricsPage | AbortRequests | CanariesOver | SettlementsAcked


CanaryOutcome = Literal["ok", "failed", "starved", "moot", "refused", "busy", "rejected"]
CANARY_OUTCOMES: Final[tuple[CanaryOutcome, ...]] = get_args(CanaryOutcome)


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """The result of one canary.

    "ok": a token came. "failed": the engine answered 500, or broke off. "starved": no token within `allowed`.
    "moot": no evidence, because real work progressed meanwhile or the engine sleeps. "refused": no connection.
    "busy": 429 or 503. "rejected": any other 4xx, or no model is known to be loaded; a canary
    cannot test this engine. `known`: this request has passed before in this process of the engine.
    """

    outcome: CanaryOutcome
    started: float
    ended: float
    allowed: float
    detail: str = ""
    prompt_tokens: int = 0  # 0 unless it passed
    digest: str = ""  # a short hash of the answer; "" if there is none
    model: str = ""  # the model that was asked
    known: bool = False


# --- verdicts ---


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of the engine since `since`, and why. `evidence` holds plain numbers and codes only."""

    state: State
    reason: str
    detail: str
    since: float
    since_wall: float
    evidence: dict[str, float | int | str | bool | None] = field(default_factory=dict)

    @property
    def cause(self) -> str:
        """The reason of the state itself; `reason` may instead be why a kill is held back."""
        return str(self.evidence.get("cause") or self.reason)


@dataclass(frozen=True, slots=True)
class DiagnosisSummary:
    """A diagnosis bundle: its id (also its file name), when and why it was taken, what the engine's processes did."""

    id: str
    at_wall: float
    reason: str
    bytes: int
    summary: str = ""
