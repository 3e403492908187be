"""Evidence: what counts as progress, and how long silence is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sidecar.events import RequestSize
from sidecar.health.latency_model import UNKNOWN_SLOWNESS
from sidecar.health.progress import GAP_MARGIN, LEARNED_ANSWERS, Progress, SilenceLimits, silence_limits
from sidecar.load import cost_model
from sidecar.readings import EngineSample
from sidecar.settings import Settings

CO = cost_model.Coefficients()
LIMITS = SilenceLimits(floor=8.0, unlearned=60.0, margin=3.0, cap=900.0)


@dataclass
class Item:
    since: float
    first_at: float | None
    prefill: float
    whole: int = 0
    blocked: bool = False
    prompt_tokens: int = 0
    route: str = "chat"
    most_tokens: int | None = None
    size: float = 1.0
    has_media: bool = False
    sequences: int = 1
    delivered: int = 0
    shows: bool = False
    last_at: float = 0.0


def prefill(tokens: int) -> float:
    return cost_model.terms(RequestSize(tokens), CO).before_first_token / 1000


def item(at: float, tokens: int = 100, *, first: float | None = None, whole: int = 0, blocked: bool = False) -> Item:
    return Item(at, first, prefill(tokens), whole, blocked, tokens, most_tokens=whole or None, shows=first is not None)


def learned() -> Progress:
    p = Progress(LIMITS)
    p.learned.answers = LEARNED_ANSWERS
    p.learned.slowness = 1.0
    p.is_speed_known = True
    return p


def test_silence_runs_from_the_first_outstanding_request_or_the_last_progress() -> None:
    """Idle time is no silence; a new request starts it; deliveries restart it."""
    p = learned()
    assert p.evidence([], 1000.0).age is None
    assert p.evidence([item(1000.0)], 1003.0).age == 3.0
    p.delivered(1004.0)
    assert p.evidence([item(1000.0)], 1005.0).age == 1.0
    assert p.evidence([], 1006.0).age is None
    assert p.evidence([item(1050.0)], 1051.0).age == 1.0, "silence before the request is no one's"


def test_counters_that_move_are_progress_and_steps_alone_are_not() -> None:
    """Generation and completions count; engine steps and prefill evidence are kept apart."""
    p = learned()
    p.engine(EngineSample(generation_tokens=5, iterations=1), 10.0)
    p.engine(EngineSample(generation_tokens=5, iterations=2), 11.0)
    e = p.evidence([item(10.0)], 12.0)
    assert (e.age, e.steps_age) == (2.0, 1.0)
    p.engine(EngineSample(generation_tokens=6, iterations=3), 13.0)
    assert p.evidence([item(10.0)], 14.0).age == 1.0
    p.engine(EngineSample(generation_tokens=6, kv_usage=0.5), 15.0)
    p.engine(EngineSample(generation_tokens=6, kv_usage=0.6), 16.0)
    e = p.evidence([item(10.0)], 16.5)
    assert (e.age, e.prefill_age, e.progress_kind) == (3.5, 0.5, "generation"), (
        "prefill evidence holds off, it proves nothing"
    )


def test_our_own_canary_moves_counters_and_proves_nothing_of_the_users_work() -> None:
    """Counters that moved while a canary ran are not progress, and gauges that show it are not work."""
    p = learned()
    p.engine(EngineSample(generation_tokens=5, running=0), 10.0)
    p.engine(EngineSample(generation_tokens=6, running=1), 11.0, canary=True)
    assert p.evidence([item(9.0)], 12.0).age == 3.0
    assert p.evidence([], 13.0).age is None


def test_work_that_came_around_the_relay_is_judged_with_unlearned_patience() -> None:
    """Gauges that show work without the relay's: its size is unknown, so patience is long."""
    p = learned()
    p.engine(EngineSample(running=0, generation_tokens=1), 9.0)
    p.engine(EngineSample(running=2, generation_tokens=1), 10.0)
    p.engine(EngineSample(running=2, generation_tokens=1), 11.0)
    e = p.evidence([], 15.0)
    assert e.engine_busy and e.age is not None and e.allowed == LIMITS.unlearned


def test_a_gauge_that_only_stays_up_after_the_relays_work_is_no_foreign_work() -> None:
    """An abort can wedge an engine: unless foreign work was ever seen, that is an idle engine, judged by canaries."""
    p = learned()
    p.engine(EngineSample(running=0, generation_tokens=1), 9.0)
    p.evidence([item(9.5)], 9.5)
    p.engine(EngineSample(running=1, generation_tokens=5), 10.0)
    p.evidence([item(9.5)], 10.0)
    for n in range(20):
        p.engine(EngineSample(running=1, generation_tokens=5), 11.0 + n)
        e = p.evidence([], 11.0 + n)
    assert e.engine_busy and e.age is None and not p.learned.foreign


def test_more_requests_than_the_relay_has_are_somebody_elses() -> None:
    """While the counters move, gauges over the relay's own count show foreign work, and patience is long."""
    p = learned()
    for n in range(20):
        p.evidence([item(0.0)], float(n))
        p.engine(EngineSample(running=3, generation_tokens=float(n)), float(n))
    assert p.learned.foreign


def test_what_is_blocked_by_its_client_is_no_work_of_the_engines() -> None:
    """A client that does not read keeps its own answer waiting: no silence of the engine."""
    p = learned()
    assert p.evidence([item(0.0, blocked=True)], 100.0).age is None
    assert p.evidence([item(0.0, blocked=True), item(90.0)], 100.0).age == 10.0


def test_allowed_silence_follows_the_prefill_that_is_outstanding() -> None:
    """Short work is judged by the floor, a 600k-token prefill gets its time, nothing gets more than the cap."""
    p = learned()
    short = p.evidence([item(0.0, 100)], 1.0)
    assert (short.allowed, short.ruled_by) == (8.0, "floor")
    long = p.evidence([item(0.0, 600_000)], 1.0)
    assert long.ruled_by == "predicted" and long.allowed == pytest.approx(3 * prefill(600_000))
    endless = p.evidence([item(0.0, 50_000_000)], 1.0)
    assert (endless.allowed, endless.ruled_by) == (900.0, "cap")


def test_later_arrivals_do_not_excuse_an_older_silence() -> None:
    """A flood behind a hang would otherwise postpone its detection forever."""
    p = learned()
    first = item(0.0, 100)
    p.evidence([first], 0.0)
    flood = [item(20.0 + n, 50_000) for n in range(50)]
    assert p.evidence([first, *flood], 80.0).ruled_by == "floor"


def test_an_answer_in_one_piece_is_not_killed_before_all_that_its_client_allowed() -> None:
    """Without a counter nothing shows that it is generated; readiness is the canary's to decide."""
    p = learned()
    p.learned.token_seconds, p.learned.token_times = 0.05, 1
    e = p.evidence([item(0.0, whole=2000)], 1.0)
    assert (e.allowed, e.kill_after, e.hidden) == (8.0, 100.0, 100.0)
    assert p.evidence([item(0.0, whole=1)], 1.0).kill_after == pytest.approx(LIMITS.kill, abs=0.1)


def test_without_a_limit_of_the_client_the_models_context_bounds_a_hidden_answer() -> None:
    """Never a mean: some answers are as long as the model can make them."""
    p = learned()
    p.learned.token_seconds, p.learned.token_times = 0.02, 1
    hidden = item(0.0)
    assert p.evidence([hidden], 1.0).kill_after == LIMITS.cap
    p.max_context = 16_384
    assert p.evidence([hidden], 1.0).kill_after == pytest.approx(0.02 * 16_384)


def test_what_shows_is_not_excused_by_what_is_hidden() -> None:
    """A stream whose text came and stopped would go on, if the engine generated anything."""
    p = learned()
    e = p.evidence([item(0.0), item(0.0, first=0.5)], 1.0)
    assert e.kill_after == pytest.approx(LIMITS.kill, abs=0.1)


def test_an_engine_that_computes_as_many_at_once_would_answer_a_canary() -> None:
    """Where a canary passed next to as much work, or as many streams came side by side, it decides."""
    p = learned()
    two = [item(0.0), item(0.0)]
    assert p.evidence(two, 1.0).kill_after == LIMITS.cap
    p.canary_passed(0.5, 0.6)
    assert p.evidence(two, 1.0).kill_after == pytest.approx(LIMITS.kill, abs=0.1)
    assert p.evidence([*two, item(0.5)], 1.0).kill_after == LIMITS.cap, "three may be too many"
    assert p.evidence([*two, item(30.0)], 31.0).kill_after < LIMITS.cap, "the third came into the silence"


def test_an_engine_that_computes_one_by_one_stays_ready_for_a_hidden_answer() -> None:
    """Its canary waits for the users' answer, as theirs do."""
    p = learned()
    p.learned.token_seconds, p.learned.token_times = 0.05, 1
    for at in (10.0, 20.0):
        p.settled((0, "a"), at + 5.0)
        p.canary_passed(at, at + 5.5)
    e = p.evidence([item(30.0, whole=2000)], 31.0)
    assert (e.allowed, e.ruled_by) == (100.0, "unknown")


def test_a_prompt_far_longer_than_any_seen_may_take_until_the_cap() -> None:
    """The speed of a machine that was never measured may be anything: a CPU is a thousand times slower."""
    p = learned()
    p.is_speed_known = False
    for n in range(20):
        serve(p, n, 100, 0.5)
    assert p.evidence([item(5000.0, 300)], 5001.0).allowed < 100
    long = p.evidence([item(5000.0, 12_000)], 5001.0)
    assert (long.allowed, long.ruled_by) == (900.0, "cap"), "minutes of prefill, as on a CPU"


def test_processes_that_take_turns_behind_one_port_move_nothing_by_that() -> None:
    """Two frozen backends: each page is compared with the last one of its own process."""
    p = learned()
    for n in range(20):
        p.engine(EngineSample(generation_tokens=100 if n % 2 else 40, prompt_tokens=9 if n % 2 else 3), 10.0 + n)
    assert p.last() == ("generation", 11.0), "only the first turn looks like growth"
    p.engine(EngineSample(generation_tokens=41, prompt_tokens=3), 30.0)
    assert p.last() == ("generation", 30.0)


def test_foreign_work_is_seen_while_our_canary_waits_behind_it() -> None:
    """An idle engine is asked, and the canary queues behind a prompt that did not pass the relay."""
    p = learned()
    p.engine(EngineSample(running=0, waiting=0, generation_tokens=5), 10.0)
    p.engine(EngineSample(running=1, waiting=1, generation_tokens=5), 11.0, canary=True)
    for n in range(12, 40):
        p.engine(EngineSample(running=1, waiting=1, generation_tokens=5), float(n), canary=True)
    e = p.evidence([], 40.0)
    assert e.foreign and e.age is not None and e.kill_after == LIMITS.cap


def test_a_queue_is_not_allowed_the_sum_of_its_prompts() -> None:
    """Something must be delivered within the longest of them, or within one batch."""
    p = learned()
    one, many = p.evidence([item(0.0, 4000)], 1.0), p.evidence([item(0.0, 4000) for _ in range(200)], 1.0)
    assert one.predicted < many.predicted <= 5 * one.predicted
    long = p.evidence([item(0.0, 300_000), *(item(0.0, 4000) for _ in range(200))], 1.0)
    assert long.predicted == pytest.approx(prefill(300_000))


def test_each_route_without_tokens_learns_its_own_time() -> None:
    """A transcription has no tokens to count; until its route is known it may take until the cap."""
    p = learned()
    work = item(9000.0)
    work.route = "transcription"
    assert p.evidence([work], 9001.0).kill_after == LIMITS.cap
    for n in range(5):
        p.admitted((0, str(n)), None, 100.0 * n, route="transcription")
        p.completed((0, str(n)), 100.0 * n + 40.0)
    assert p.evidence([work], 9001.0).kill_after == pytest.approx(120.0)


def test_sequences_are_computed_at_once() -> None:
    """As far as observed: sixteen answers take sixteen times as long as one, or as long as the slots need."""
    p = learned()
    one, many = item(100.0, whole=20), item(100.0, whole=16 * 20)
    many.sequences = 16
    alone = p.evidence([one], 101.0).hidden
    assert 0 < alone < LIMITS.cap / 16
    assert p.evidence([many], 101.0).hidden == pytest.approx(16 * alone)
    p.learned.concurrent = 8
    assert p.evidence([many], 101.0).hidden == pytest.approx(2 * alone)


def test_a_session_teaches_nothing_by_its_end() -> None:
    """The client ends it after any silence: that is neither progress nor the duration of an answer."""
    p = learned()
    before = p.last()
    work = item(9000.0)
    work.route = "realtime"
    for n in range(9):
        p.admitted((0, str(n)), None, 100.0 * n, route="realtime")
        p.completed((0, str(n)), 100.0 * n + 0.01)
        p.settled((0, str(n)), 100.0 * n + 0.01)
    assert p.last() == before
    assert p.evidence([work], 9001.0).kill_after == LIMITS.cap


def test_answers_without_tokens_make_an_engine_known() -> None:
    """An embedding engine has no first tokens; the end of an answer shows what its prompt took."""
    p = Progress(LIMITS)
    for n in range(LEARNED_ANSWERS):
        p.admitted((0, str(n)), 0.01, float(n), route="embeddings")
        p.completed((0, str(n)), n + 0.01)
    work = item(30.0)
    work.route = "embeddings"
    assert p.evidence([work], 31.0).allowed == 8.0


def test_a_request_that_nobody_reads_is_work_of_unknown_size() -> None:
    """An image may take minutes; any byte of it is progress, and its end ends the work."""
    p = learned()
    p.unread_opened((0, "a"), 100.0)
    e = p.evidence([], 160.0)
    assert (e.outstanding, e.age, e.kill_after) == (1, 60.0, LIMITS.cap)
    p.delivered(161.0)
    assert p.evidence([], 162.0).age == 1.0
    p.unread_closed((0, "a"), 200, 170.0)
    assert p.evidence([], 171.0).age is None


def test_a_counter_of_tokens_says_nothing_of_work_that_goes_by_unread() -> None:
    """Pictures are no tokens: an engine that counts those may be silent for a picture all the same."""
    p = learned()
    p.engine(EngineSample(running=1, generation_tokens=4), 9.0)
    p.engine(EngineSample(running=1, generation_tokens=5), 10.0)
    p.engine(EngineSample(running=0, generation_tokens=5), 11.0)
    p.unread_opened((0, "a"), 11.0)
    assert p.evidence([], 11.5).kill_after == LIMITS.cap
    assert p.evidence([item(11.0, first=11.2)], 11.5).kill_after < LIMITS.cap, "a stream that shows would go on"


def test_counters_that_stand_still_over_running_work_are_evidence() -> None:
    """Any that moves, also by prefill, ends it."""
    p = learned()
    p.engine(EngineSample(running=1, generation_tokens=4, prompt_tokens=1), 9.0)
    p.engine(EngineSample(running=1, generation_tokens=5, prompt_tokens=1), 10.0)
    for n in range(11, 40):
        p.engine(EngineSample(running=1, generation_tokens=5, prompt_tokens=1), float(n))
    assert p.evidence([item(10.0)], 40.0).frozen
    p.engine(EngineSample(running=1, generation_tokens=5, prompt_tokens=2), 40.0)
    assert not p.evidence([item(10.0)], 40.5).frozen
    p.engine(EngineSample(running=0, generation_tokens=5, prompt_tokens=2), 41.0)
    assert not p.evidence([item(10.0)], 70.0).frozen, "an engine that says it has no work is judged by canaries"


def test_counters_that_move_only_at_the_end_of_an_answer_never_look_frozen() -> None:
    """An answer of minutes moves none of them, and is computed all the same."""
    p = learned()
    for n in range(100):
        p.engine(EngineSample(running=1, generation_tokens=5, tokens_at_end=True), 10.0 + n)
    assert not p.evidence([item(10.0, whole=4000)], 110.0).frozen


def test_work_on_the_first_page_after_a_restart_of_the_sidecar_may_be_anybodys() -> None:
    """Its size is unknown, so it is not killed for before the cap."""
    p = learned()
    p.engine(EngineSample(running=1, generation_tokens=5), 10.0)
    e = p.evidence([], 60.0)
    assert e.foreign and e.age is not None and e.kill_after == LIMITS.cap
    p.engine(EngineSample(running=0, generation_tokens=6), 70.0)
    assert not p.evidence([], 71.0).foreign


def test_patience_is_long_until_the_engine_is_known() -> None:
    """Before LEARNED_ANSWERS the unlearned floor rules, and the machine may be much slower than predicted."""
    p = Progress(LIMITS)
    assert p.evidence([item(0.0)], 1.0).allowed == 60.0
    p.is_speed_known = True
    assert p.evidence([item(0.0, 100_000)], 1.0).allowed == pytest.approx(3 * UNKNOWN_SLOWNESS * prefill(100_000))
    for n in range(LEARNED_ANSWERS):
        p.admitted((0, str(n)), 0.01, float(n))
        p.first_token((0, str(n)), n + 0.01)
    assert p.evidence([item(30.0)], 31.0).allowed == 8.0


def test_a_long_gap_that_ended_well_is_learned_and_fades() -> None:
    """A legitimate silence widens the allowance; with time it narrows again."""
    p = learned()
    p.evidence([item(0.0)], 0.0)
    p.evidence([item(0.0)], 20.0)
    p.delivered(20.0)
    e = p.evidence([item(0.0, first=20.0)], 21.0)
    assert e.ruled_by == "learned" and e.allowed == pytest.approx(GAP_MARGIN * 20, rel=0.01)
    assert p.evidence([item(0.0, first=20.0)], 4000.0).ruled_by == "floor"


def test_a_gap_that_was_judged_a_stall_teaches_nothing() -> None:
    """A hang that heals must not make the next one take longer to see."""
    p = learned()
    p.evidence([item(0.0)], 0.0)
    p.evidence([item(0.0)], 50.0)
    p.evidence([item(0.0)], 100.0, learn=False)
    p.evidence([item(0.0)], 101.0)
    p.delivered(102.0)
    assert p.evidence([item(0.0, first=102.0)], 103.0).ruled_by == "floor"
    p.evidence([item(0.0, first=102.0)], 122.0)
    p.delivered(122.0)
    assert p.evidence([item(0.0, first=122.0)], 123.0).ruled_by == "learned", "the next one counts again"


def serve(p: Progress, n: int, tokens: int, seconds: float) -> None:
    """One stream alone, whose first token takes `seconds`."""
    at = 1000.0 + 100.0 * n
    p.evidence([], at)
    p.admitted((0, str(n)), prefill(tokens), at)
    p.first_token((0, str(n)), at + seconds)


def test_a_slow_machine_is_learned_from_its_first_tokens_and_not_forgotten_while_idle() -> None:
    """Prefills that take longer than predicted, time and again, scale the next predictions, even hours later."""
    p = learned()
    for n in range(20):
        serve(p, n, 3500, 30.0)
    later = 1000.0 + 100_000.0
    e = p.evidence([item(later, 7000)], later + 1.0)
    assert e.ruled_by == "predicted" and e.allowed > 60, "twice the prompt takes twice as long: 60 s"


def test_one_hiccup_does_not_lengthen_every_later_patience() -> None:
    """Slowness is a percentile: a single first token that took 100 times too long changes little."""
    p = learned()
    for n in range(40):
        serve(p, n, 3500, 6.0 if n == 20 else 0.12)
    assert p.learned.slowness < 2
    assert p.evidence([item(9000.0, 3500)], 9001.0).ruled_by in ("floor", "learned")


def test_a_gap_fades_with_the_time_of_work_only() -> None:
    """An idle hour teaches nothing about how long this engine's silences are."""
    p = learned()
    p.evidence([item(0.0)], 0.0)
    p.evidence([item(0.0)], 20.0)
    p.delivered(20.0)
    for hour in range(1, 5):
        p.evidence([], hour * 3600.0)
    assert p.evidence([item(14_400.0)], 14_401.0).ruled_by == "learned"


def test_own_lag_lengthens_patience_and_a_rebaseline_forgets_silence() -> None:
    """Our own ill-health is never the engine's."""
    p = learned()
    e = p.evidence([item(0.0)], 5.0, extra=4.0)
    assert e.allowed == 12.0
    p.rebaseline(100.0)
    assert p.evidence([item(0.0)], 101.0).age == 1.0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (EngineSample(started_wall=100.0), EngineSample(started_wall=1005.0), True),
        (EngineSample(started_wall=100.0), EngineSample(started_wall=200.0), False),
        (EngineSample(generation_tokens=9), EngineSample(generation_tokens=0), False),
        (EngineSample(generation_tokens=9, started_wall=100.0), EngineSample(started_wall=1005.0), True),
        (EngineSample(started_wall=100.0), EngineSample(), False),
    ],
)
def test_a_start_after_the_last_page_is_a_restart_and_a_fallen_counter_alone_is_none(
    before: EngineSample, after: EngineSample, expected: bool
) -> None:
    """Several processes behind one port have different counters and start times, and none of them is new."""
    p = Progress(LIMITS)
    assert not p.engine(before, 10.0, wall=1000.0)
    assert p.engine(after, 20.0, wall=1010.0) is expected
    assert p.last() == ("none", None), "nothing to compare with is no progress"


def test_the_bounds_follow_from_floor_and_cap() -> None:
    """The defaults are those of the product; a short cap shortens what the unknown may take, a low floor does not."""
    engine = "http://engine"
    assert silence_limits(Settings(engine=engine)) == SilenceLimits()
    assert silence_limits(Settings(engine=engine, silence_floor=5, silence_cap=300)) == SilenceLimits(floor=5, cap=300)
    short = silence_limits(Settings(engine=engine, silence_cap=30))
    assert (short.unlearned, short.blocked, short.margin) == (6.0, 10.0, 3.0)
