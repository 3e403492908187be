"""What must stay silent: the 17 alarms of docs/health.md and the field's failure reports as stories, several of most,
each with how often it happens in a week.

Rules: a story begins on a served engine under its site's traffic, and leaves it able to go on. The rates are set higher
than operators report, so that a run of weeks holds many of each. Every number is drawn each time. A story marked
`hidden` stops the engine on purpose without a sign that any client could read: what it does is shown, and is not
counted as an alarm of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim.field_reports import (
    adapters,
    after_short_answers,
    bounded_queue,
    compiles,
    foreign_prompt,
    grammars,
    hidden,
    impatient,
    long_start,
    odd_pages,
    pieces,
    prefixes,
    priorities,
    released,
    route,
    slow_site,
    stands,
    unread,
    whole_answers,
    without_canary,
    wrong_names,
)
from sim.proofs import PAUSES
from sim.seqs import UNREAD
from sim.stories import (
    again,
    burst,
    cold_start,
    early_canary,
    faulted,
    flood_at_start,
    full,
    full_of_answers,
    late_kernel,
    long_burst,
    long_prefill,
    many_kernels,
    queue_of_prompts,
    retry_storm,
    serial_prefill,
    several_prefills,
    slow_checks,
    slow_engine,
    storm,
    unlearned_prefill,
)
from sim.troubles import (
    all_pause,
    clock_jump,
    directed,
    foreign_work,
    hang_ups,
    own_pause,
    relay_restart,
    relay_stops,
    reported,
    restarts_and_jump,
    slow_clients,
    starved_sidecar,
    watchdog_restarts,
)
from sim.world import World


@dataclass(frozen=True, slots=True)
class Alarm:
    """One row: its number in docs/health.md, what happens, how often a week, and the story.

    `kind`: of failure report, where it is one of the field's.
    """

    number: int
    text: str
    per_week: float
    story: Callable[[World], None]
    hidden: bool = False
    kind: int = 0


ALARMS: tuple[Alarm, ...] = (
    Alarm(1, "/health takes 40 s under load", 0.3, faulted("slow_health", 60, 180)),
    Alarm(2, "image work blocks the API loop 1-15 s", 0.3, faulted("api_block", 1, 15)),
    Alarm(2, "the same, ten times in a row", 0.1, again("api_block", 1, 8, 5, 10)),
    Alarm(3, "1,280 requests at once", 0.03, burst),
    Alarm(3, "1,280 long prompts at once", 0.02, long_burst),
    Alarm(4, "full engine, slow /health", 0.1, full),
    Alarm(5, "canary queued behind users", 0.1, full),
    Alarm(5, "idle engine filled with whole answers", 0.1, full_of_answers),
    Alarm(6, "2 s limit at max_num_seqs", 0.1, full),
    Alarm(7, "200k-600k-token prefill", 0.3, long_prefill),
    Alarm(7, "long prefills in a row", 0.2, several_prefills),
    Alarm(7, "long prefill, nothing learned yet", 0.1, unlearned_prefill),
    Alarm(8, "cold JIT 1-20 min at start", 0.05, cold_start),
    Alarm(8, "a kernel compiles 1-20 s in service", 0.2, late_kernel),
    Alarm(8, "several kernels of 1-15 s", 0.1, many_kernels),
    Alarm(9, "one-token check over 20 s", 0.2, slow_checks),
    Alarm(9, "the same behind 300 prompts", 0.05, queue_of_prompts),
    Alarm(10, "profiler 10-120 s, ordered through the relay", 0.1, directed("profile", "engine_profiling", 10, 120)),
    Alarm(10, "profiler 10-120 s, unseen by the sidecar", 0.1, faulted("profile", 10, 120), hidden=True),
    Alarm(11, "canary before ready", 0.1, early_canary),
    Alarm(11, "flood before ready", 0.05, flood_at_start),
    Alarm(12, "watchdog starved and restarted", 0.2, watchdog_restarts),
    Alarm(12, "watchdog starved again and again", 0.1, starved_sidecar),
    Alarm(13, "overload for minutes", 0.2, storm),
    Alarm(13, "retry storm after a restart", 0.1, retry_storm),
    Alarm(14, "HTTP behind inference", 0.2, faulted("serial_http", 30, 120)),
    Alarm(14, "HTTP behind a prefill of 27 s", 0.1, serial_prefill),
    Alarm(15, "tokenizer holds the GIL 40-60 s", 0.2, faulted("api_block", 40, 60)),
    Alarm(15, "the same for 10-30 s, three times", 0.1, again("api_block", 10, 30, 10, 3)),
    Alarm(16, "sleep, as its page reports", 0.1, reported("sleep", page=True)),
    Alarm(16, "pause, as the engine answers", 0.1, reported("pause", tells_rest=True)),
    Alarm(16, "sleep, ordered through the relay", 0.1, directed("sleep", "engine_sleeping", 10, 600)),
    Alarm(16, "pause, ordered through the relay", 0.1, directed("pause", "engine_paused", 10, 600)),
    Alarm(16, "weight update, through the relay", 0.1, directed("weight_update", "weight_update", 5, 300)),
    Alarm(16, "sleep 10-600 s, unseen by the sidecar", 0.05, faulted("pause", 10, 600), hidden=True),
    Alarm(16, "weight update 5-300 s, unseen by the sidecar", 0.05, faulted("weight_update", 5, 300), hidden=True),
    Alarm(17, "sidecar stopped 1-600 s", 0.2, own_pause),
    Alarm(17, "machine stopped 2-600 s", 0.2, all_pause),
    Alarm(17, "clock jump", 0.2, clock_jump),
    Alarm(17, "relay restart", 0.2, relay_restart),
    Alarm(17, "relay stopped 1-120 s", 0.2, relay_stops),
    Alarm(17, "two restarts of the sidecar and a clock jump", 0.1, restarts_and_jump),
    Alarm(0, "garbage metrics", 0.2, faulted("garbage_metrics", 30, 120)),
    Alarm(0, "client hang-ups", 0.2, hang_ups),
    Alarm(0, "20-100 times slower (mode 21)", 0.1, slow_engine),
    Alarm(0, "some clients do not read", 0.1, slow_clients(0.3)),
    Alarm(0, "no client reads", 0.1, slow_clients(1.0)),
    Alarm(0, "work past the relay", 0.1, foreign_work),
    Alarm(0, "tool calls withheld to their end", 0.2, hidden(1.0), kind=1),
    Alarm(0, "thoughts hidden", 0.2, hidden(0.7), kind=1),
    Alarm(0, "priority scheduling", 0.2, priorities, kind=2),
    Alarm(0, "LoRA slots", 0.2, adapters, kind=2),
    Alarm(0, "grammars or transfers of 20-180 s", 0.2, grammars, kind=2),
    Alarm(0, "longest prefix first", 0.2, prefixes, kind=2),
    Alarm(0, "one slot: a long answer after 40 short ones", 0.2, after_short_answers, kind=3),
    Alarm(0, "whole answers of up to the model's length", 0.2, whole_answers(0), kind=4),
    Alarm(0, "the same at one slot", 0.2, whole_answers(1), kind=4),
    Alarm(0, "images of 20-120 s, unread", 0.2, unread, kind=5),
    Alarm(0, "lines of JSON, unread", 0.2, pieces(UNREAD), kind=5),
    Alarm(0, "raw audio", 0.2, pieces("transcription"), kind=5),
    Alarm(0, "the whole engine compiles for 10-60 s in service", 0.4, compiles(1, 10, 60), kind=6),
    Alarm(0, "the same for 46-50 s, three times", 0.2, compiles(3, 46, 50), kind=6),
    Alarm(0, "first long prompt, 100-700 times slower", 0.2, slow_site, kind=7),
    Alarm(0, "no canary passes", 0.2, without_canary, kind=8),
    Alarm(0, "memory released through the relay", 0.2, released(seen=True), kind=9),
    Alarm(0, "memory released past the relay", 0.1, released(seen=False), hidden=True, kind=9),
    Alarm(0, "long prompt past the relay", 0.2, foreign_prompt(restarts=False), kind=10),
    Alarm(0, "the same, and the sidecar restarts", 0.2, foreign_prompt(restarts=True), kind=10),
    Alarm(0, "users ask for a model that is not there", 0.1, wrong_names, kind=11),
    Alarm(0, "bounded queue refuses", 0.2, bounded_queue, kind=12),
    Alarm(0, "embeddings, nothing learned yet", 0.1, route("embeddings", learned=False), kind=14),
    Alarm(0, "embeddings, learned", 0.1, route("embeddings", learned=True), kind=14),
    Alarm(0, "rerank, learned", 0.1, route("rerank", learned=True), kind=14),
    Alarm(0, "transcription, nothing learned yet", 0.1, route("transcription", learned=False), kind=14),
    Alarm(0, "transcription, learned", 0.1, route("transcription", learned=True), kind=14),
    Alarm(0, "start of up to 20 min after a restart", 0.2, long_start, kind=15),
    Alarm(0, "impatient clients behind prefills", 0.2, impatient, kind=16),
    Alarm(0, "metrics page takes 3 s", 0.2, odd_pages(page_seconds=3.0), kind=17),
    Alarm(0, "pages of two backends behind one port", 0.1, odd_pages(backends=2), kind=17),
    Alarm(0, "pages of four backends behind one port", 0.1, odd_pages(backends=4), kind=17),
    Alarm(0, "disk, swap, peer, GPU, debugger, freezer or compiler hold it up 10-60 s", 0.4, stands(*PAUSES), kind=6),
    Alarm(0, "a lock is held for 10-60 s and released", 0.05, stands("lock"), hidden=True, kind=6),
)
