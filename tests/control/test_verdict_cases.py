"""More cases of each kind of false alarm and of missed hang, one test each, named by its kind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.events import Admitted, Delivered, Directing, FirstToken, RequestSize, Settled, UnreadRequest
from sidecar.health import probes
from sidecar.health.verdict import UNASKED_KILLS
from sidecar.readings import EngineSample

from .judged_pod import WALL, Pod


def admit(pod: Pod, route: str, mu: float, work: RequestSize, *, stream: bool = False, most: int | None = 64) -> str:
    """A request of some size."""
    pod.requests += 1
    id = str(pod.requests)
    pod.control.on_event(0, Admitted(id, pod.now, "t", "m", route, stream, work, most, mu))
    return id


def end(pod: Pod, id: str, outcome: str = "ok", status: int = 200, tokens: int = 0) -> None:
    settled = Settled(id, pod.now, outcome, status, None, tokens, 0, None, pod.now, 0.0)  # type: ignore[arg-type]
    pod.control.on_event(0, settled)


def recordings(pod: Pod, count: int, seconds: float, mu: float) -> None:
    """Transcriptions one after the other, each answered after so long."""
    for _ in range(count):
        id = admit(pod, "transcription", mu, RequestSize(4, output=20, audio_seconds=100 * seconds))
        pod.tick(seconds)
        end(pod, id)
        pod.tick(0.5)


def test_4_an_hour_of_speech_after_many_short_clips() -> None:
    """Clips take a second; an hour of speech has two hundred times their work, on a server that takes one at a time."""
    pod = Pod()
    recordings(pod, 20, 1.0, 0.02)
    pod.canaries = "starved"
    pod.control.health.progress.learned.one_by_one = 2
    pod.watch()
    id = admit(pod, "transcription", 4.0, RequestSize(4, output=9000, audio_seconds=3600))
    pod.tick(180)
    end(pod, id)
    pod.tick(5)
    assert pod.well, pod.states


def test_4_ten_pictures_after_many_single_ones() -> None:
    """A picture takes 12 s; ten of them in one request are no hang after 120 s, where one is made at a time."""
    pod = Pod()
    pod.canaries = "starved"
    for _ in range(8):
        id = admit(pod, "images", 5.0, RequestSize(10, output=4160, images=1))
        pod.tick(12)
        end(pod, id)
    pod.canaries = "starved"
    pod.control.health.progress.learned.one_by_one = 2
    pod.watch()
    id = admit(pod, "images", 50.0, RequestSize(10, output=41_600, images=10))
    pod.tick(120)
    end(pod, id)
    pod.tick(5)
    assert pod.well, pod.states


def served(pod: Pod, work: RequestSize, seconds: float, *, mu: float = 0.5) -> None:
    """A stream whose first token takes so long."""
    id = admit(pod, "chat", mu, work, stream=True)
    pod.tick(seconds)
    pod.control.on_event(0, FirstToken(id, pod.now))
    pod.tick(1, id)
    pod.settle(id, 20, pod.now - 1)


@pytest.mark.parametrize(
    "first", [RequestSize(1100, image_tokens=1000, images=1), RequestSize(900, audio_tokens=800, audios=1)]
)
def test_7_the_first_picture_or_sound_on_a_slow_machine(first: RequestSize) -> None:
    """Texts take seconds on a CPU; the first picture takes minutes, and the one slot takes no canary."""
    pod = Pod()
    pod.control.health.progress.learned.measured_to = 0.0
    for _ in range(12):
        served(pod, RequestSize(1000, output=64), 12.0)
    pod.canaries = "starved"
    pod.watch()
    id = admit(pod, "chat", 0.5, first, stream=True)
    pod.tick(170)
    pod.control.on_event(0, FirstToken(id, pod.now))
    pod.tick(1, id)
    assert pod.well, pod.states


def test_7_a_first_picture_is_no_excuse_on_a_fast_machine() -> None:
    """Texts take a moment: a freeze under the first picture is found as under any request."""
    pod = Pod()
    for _ in range(12):
        served(pod, RequestSize(1000, output=64), 0.5)
    pod.canaries = "starved"
    admit(pod, "chat", 0.5, RequestSize(1100, image_tokens=1000, images=1), stream=True)
    assert pod.until("suspect") < 20
    assert pod.until("stalled") < 90


def test_7_pictures_that_were_seen_are_no_excuse() -> None:
    """Once some were encoded in half a second each, a freeze under the next one is found as usual."""
    pod = Pod()
    work = RequestSize(1100, image_tokens=1000, images=1)
    for _ in range(12):
        served(pod, work, 0.5)
    pod.canaries = "starved"
    admit(pod, "chat", 0.5, work, stream=True)
    assert pod.until("suspect") < 60
    assert pod.until("stalled") < 120


def test_8_users_whose_path_is_redirected_are_no_refusal() -> None:
    """An engine answers each with 307, to the path without a slash; its canaries pass."""
    pod = Pod()
    pod.watch()
    for _ in range(30):
        id = admit(pod, "chat", 0.5, RequestSize(500, output=64))
        pod.tick(0.5)
        end(pod, id, "rejected", 307)
        pod.tick(1)
    assert pod.well, pod.states


def test_12_answers_of_200_that_all_fail_inside() -> None:
    """Each stream ends in an error event before its first token, and canaries are refused with an error, too."""
    pod = Pod()
    pod.canaries = "failed"
    pod.watch()
    for _ in range(200):
        if pod.state == "stalled":
            break
        id = admit(pod, "chat", 0.5, RequestSize(500, output=64), stream=True)
        pod.tick(1)
        end(pod, id, "engine_error", 200)
    assert pod.state == "stalled", (pod.state, pod.reason)


def videos(pod: Pod, count: int, seconds: float, status: int) -> None:
    """Videos, which are passed on unread, end after so long."""
    ids = [f"video {pod.now} {n}" for n in range(count)]
    for id in ids:
        pod.control.on_event(0, UnreadRequest(id, pod.now, True, path_class="other"))
    for id in ids:
        pod.tick(seconds)
        pod.control.on_event(0, UnreadRequest(id, pod.now, False, status))


@pytest.mark.parametrize("known", [True, False])
def test_16_users_leave_unread_work_unserved(known: bool) -> None:
    """Users of a frozen engine give up, again and again, after longer than its videos take: unready."""
    pod = Pod()
    for _ in range(6 if known else 0):
        videos(pod, 1, 4.0, 200)
    pod.canaries = "rejected"
    pod.watch()
    for _ in range(3):
        videos(pod, 2, 40.0 if known else 70.0, 0)
    assert "suspect" in pod.states


def test_16_users_who_leave_long_videos_early_are_no_finding() -> None:
    """Its videos take 40 s; users who give up after 20 s say nothing."""
    pod = Pod()
    pod.canaries = "rejected"
    for _ in range(6):
        videos(pod, 1, 40.0, 200)
    pod.watch()
    for _ in range(6):
        videos(pod, 1, 20.0, 0)
    assert pod.well, pod.states


def test_10_foreign_work_that_began_before_a_new_request() -> None:
    """A batch job past the relay fills the engine: running stands high, its counter rises, canaries starve."""
    pod = Pod()
    pod.page, pod.speed = EngineSample(generation_tokens=0.0, running=64, waiting=200), 2000.0
    pod.canaries = "starved"
    pod.tick(30)
    pod.watch()
    id = pod.admit()
    pod.tick(240)
    pod.control.on_event(0, FirstToken(id, pod.now))
    pod.tick(1)
    assert "stalled" not in pod.states and not pod.ends, pod.states


def test_11_a_frozen_engine_whose_key_was_changed() -> None:
    """Canaries are rejected for a key; three streams stand, and the page shows that none of its counters moves."""
    pod = Pod()
    pod.page, pod.speed = EngineSample(generation_tokens=0.0, running=3, waiting=0), 60.0
    for _ in range(3):
        pod.decoding()
    pod.tick(20, "1", "2", "3")
    pod.canaries, pod.speed = "rejected", 0.0
    assert pod.until("stalled", 400) < 300


def test_6_the_whole_engine_stands_for_sixty_seconds_and_goes_on() -> None:
    """Graphs are captured in service under 40 streams: unready, and neither killed nor cut."""
    pod = Pod()
    pod.canaries = "starved"
    ids = [pod.decoding() for _ in range(40)]
    pod.tick(10, *ids)
    pod.watch()
    pod.tick(60)
    pod.tick(30, *ids)
    pod.canaries = "ok"
    pod.tick(60, *ids)
    assert "stalled" not in pod.states and not pod.ends and pod.state == "progressing"


def restarted_soon() -> Pod:
    """One whose starts may take 225 s: a tenth of the default."""
    pod = Pod()
    progress = pod.control.health.progress
    progress.limits = replace(progress.limits, cap=90.0)
    return pod


def starts(pod: Pod, seconds: float) -> None:
    """A supervisor starts another process of the engine in its container, which loads for so long."""
    pod.page = EngineSample(started_wall=WALL + pod.now)
    pod.tick(seconds)


def test_15_processes_that_are_started_again_and_again_and_never_serve() -> None:
    """Each ends after a minute of loading: none reaches the deadline of a start, all of them together do, and the
    next start has its own."""
    pod = restarted_soon()
    pod.page = EngineSample(started_wall=WALL + pod.now - 100)
    pod.tick(5)
    pod.canaries = "failed"
    pod.watch()
    for _ in range(7):
        starts(pod, 60)
    assert "stalled" not in pod.states and pod.state == "starting"
    for _ in range(2):
        starts(pod, 60)
    assert "stalled" in pod.states
    pod.watch()
    for _ in range(6):
        starts(pod, 60)
    assert pod.states == {"starting"}


def test_15_a_process_that_replaced_others_and_serves_at_last() -> None:
    """The third start works: from then on the next one has all of its time."""
    pod = restarted_soon()
    pod.page = EngineSample(started_wall=WALL + pod.now - 100)
    pod.tick(5)
    pod.canaries = "failed"
    starts(pod, 180)
    starts(pod, 180)
    pod.canaries = "ok"
    starts(pod, 30)
    assert pod.state == "idle"
    pod.canaries = "failed"
    pod.watch()
    starts(pod, 200)
    assert "stalled" not in pod.states


def test_3_turns_of_a_cache_that_nobody_reports_are_no_speed() -> None:
    """vLLM finds 40 turns in its cache and does not say so; then the cache is full, and the same prompt takes 100 s."""
    pod = Pod()
    pod.control.health.progress.learned.measured_to = 0.0
    work = RequestSize(20_000, output=64)
    for seconds in (100.0, *[0.5] * 40):
        served(pod, work, seconds, mu=8.0)
    pod.canaries = "starved"
    pod.watch()
    id = admit(pod, "chat", 8.0, work, stream=True)
    pod.tick(100)
    pod.control.on_event(0, FirstToken(id, pod.now))
    pod.tick(1, id)
    assert "stalled" not in pod.states and not pod.ends, pod.states


def test_3_eight_answers_side_by_side_are_not_eight_times_as_fast() -> None:
    """Each of the n = 8 gets a token every 50 ms; that is learned, and not 6 ms."""
    pod = Pod()
    learned = pod.control.health.progress.learned
    for _ in range(30):
        id = admit(pod, "chat", 2.0, RequestSize(500, output=800, sequences=8), stream=True, most=800)
        pod.control.on_event(0, FirstToken(id, pod.now))
        pod.control.on_event(0, Delivered(id, pod.now, 8, 32))
        first = pod.now
        for _ in range(10):
            pod.tick(0.5)
            pod.control.on_event(0, Delivered(id, pod.now, 80, 320))
        pod.settle(id, 808, first)
    assert learned.token_seconds / 2 == pytest.approx(0.05, rel=0.1)  # kept at twice the mean


def test_9_a_server_that_sleeps_when_idle_falls_asleep() -> None:
    """llama.cpp with --sleep-idle-seconds 300: canaries grow apart, so that it sleeps within 900 s."""
    pod = Pod(wakes=True)
    pod.tick(60)
    idle_since, asked_at = pod.now, pod.now
    while pod.now - asked_at < 300:
        sends = pod.sends
        pod.tick()
        asked_at = pod.now if pod.sends > sends else asked_at
    assert pod.sends > 2 and pod.now - idle_since < 3 * 300


def test_9_a_server_that_sleeps_until_a_request_wakes_it_gets_traffic() -> None:
    """It is ready while it sleeps; the next request loads the model again, which takes minutes and is no hang."""
    pod = Pod(wakes=True)
    pod.tick(30)
    pod.resting, sends = "engine_sleeping", pod.sends
    pod.tick(600)
    assert (pod.state, pod.reason, pod.sends) == ("exempt", "engine_sleeping", sends)
    state = pod.control.health.probe_state()
    assert probes.passes("ready", state) and probes.passes("live", state)
    pod.canaries = "starved"
    id = pod.admit()
    pod.tick(5)
    pod.resting = ""
    pod.watch()
    pod.tick(150)
    pod.control.on_event(0, FirstToken(id, pod.now))
    pod.tick(1, id)
    assert pod.well, pod.states
    assert pod.until("suspect") < 20, "the patience with its loading is over"


def test_9_no_canary_foils_a_call_that_needs_an_idle_engine() -> None:
    """SGLang's /flush_cache is 400 while a request runs: none is sent meanwhile; and a flush excuses no silence."""
    pod = Pod()
    pod.control.on_event(0, Directing(pod.now, 1, "cache_reset", True))
    sends = pod.sends
    pod.tick(60)
    assert pod.sends == sends and pod.state == "idle"
    pod.canaries = "starved"
    pod.decoding()
    pod.tick(5)
    pod.control.on_event(0, Directing(pod.now, 1, "cache_reset", False, taken=True))
    assert pod.until("suspect") <= 15


@pytest.mark.parametrize(
    ("route", "work"),
    [
        ("transcription", RequestSize(4, output=1000, audio_seconds=300)),
        ("chat", RequestSize(4000, output=64)),
        ("rerank", RequestSize(51_200, prompts=100, sequences=100)),
        ("chat", RequestSize(10_000, output=64, image_tokens=9000, images=5, image_squares=5 * 1800**2)),
    ],
    ids=["recordings", "prompts", "documents", "pictures"],
)
def test_14_patience_is_of_one_piece_of_work_however_many_wait(route: str, work: RequestSize) -> None:
    """Five hundred wait, and the engine freezes: no more is allowed than with twenty."""
    allowed = []
    for count in (20, 500):
        pod = Pod()
        pod.control.health.progress.learned.measured_to = 1e9
        for _ in range(20):
            id = admit(pod, route, 1.0, work)
            pod.tick(5)
            end(pod, id)
        pod.canaries = "starved"
        for _ in range(count):
            admit(pod, route, 1.0, work)
        pod.tick(1)
        evidence = pod.control.health.evidence
        allowed.append((evidence.allowed, evidence.kill_after))
    assert allowed[1] == pytest.approx(allowed[0], rel=0.2), allowed


def test_18_words_keep_their_promise_where_canaries_are_refused_as_too_much() -> None:
    """The line of the doubt names the second at which liveness fails."""
    pod = Pod()
    pod.canaries = "busy"
    for _ in range(3):
        pod.decoding()
    pod.until("suspect")
    pod.tick(30)
    detail = pod.control.health.verdict.detail
    promised = UNASKED_KILLS * pod.control.health.evidence.kill_after
    assert f"liveness fails at {promised:.0f} s" in detail, detail
    began = pod.now - (pod.control.health.evidence.age or 0.0)
    pod.until("stalled", 400)
    assert pod.now - began == pytest.approx(promised, abs=2)


@pytest.mark.parametrize("what", ["engine_sleeping", "engine_paused", "engine_profiling", "weight_update"])
def test_18_words_say_what_ends_an_exemption(what: str) -> None:
    """What was ordered, what is done now, and what ends it."""
    pod = Pod()
    pod.direct(what, True)
    pod.tick(5)
    detail = pod.control.health.verdict.detail
    assert "readiness fails, liveness passes, until" in detail and "order" in detail


def test_8_a_canary_is_known_to_pass_although_users_came_first() -> None:
    """A restarted engine serves users first; a canary is tried next to them, so that a hang is killed in time."""
    pod = Pod()
    pod.page = EngineSample(started_wall=WALL + pod.now - 100)
    pod.tick(5)
    pod.canaries = "busy"  # 503 while it loads
    pod.page = EngineSample(started_wall=WALL + pod.now)
    pod.tick(5)
    assert pod.state == "starting"
    id = pod.decoding()
    pod.tick(2, id)
    pod.canaries = "ok"
    pod.tick(20, id)
    assert pod.control.health.canary_usable
    sends = pod.sends
    pod.tick(60, id)
    assert pod.sends <= sends + 1, "and then no more of it"
    pod.canaries = "starved"
    assert pod.until("stalled") < 90
