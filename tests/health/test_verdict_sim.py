"""The verdict simulator: its engine keeps the bounds that skipping time rests on, its detectors do as published."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from sim import field_reports, modes, sites, traces, weeks  # noqa: E402  # the path above must come first
from sim.alarms import ALARMS, Alarm  # noqa: E402
from sim.detectors import CHECKS, Baseline, Check, Seen  # noqa: E402
from sim.keep import Kept  # noqa: E402
from sim.seqs import FOREIGN, USER, Seq, Site, Special  # noqa: E402
from sim.surface import sample  # noqa: E402
from sim.world import CALM, UNLIVE, World  # noqa: E402

from sidecar.control.state import ControlState  # noqa: E402
from sidecar.events import Admitted, Delivered, Settled, UnreadRequest  # noqa: E402
from sidecar.health.progress import SilenceLimits  # noqa: E402
from sidecar.load.cost_model import Coefficients  # noqa: E402
from sidecar.readings import Value  # noqa: E402

CO = Coefficients()
TRACES = {"synthetic": traces.synthetic()}
TRACE = TRACES["synthetic"]

Danger = tuple[str, float]


@pytest.mark.slow
def test_a_quick_run_prints_what_it_covered_and_every_table() -> None:
    """The command ends well on synthetic arrivals and says how much of the weeks was simulated in full resolution."""
    command = [
        sys.executable,
        str(BENCHMARKS / "verdict_sim.py"),
        "--quick",
        "--processes",
        "1",
        "--traces",
        "/nonexistent",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "12.0 engine-weeks" in done.stdout
    assert "In full resolution" in done.stdout
    titles = ("Figures", "Both axes", "Whole-engine hangs", "right reason", "Hangs of the field", "Healthy engines")
    for title in (*titles, "Every hang mode"):
        assert title in done.stdout
    assert "synthetic" in done.stdout


def test_a_folder_without_traces_is_an_error_that_names_what_is_expected(tmp_path: Path) -> None:
    """An empty folder is not taken for real traces."""
    with pytest.raises(ValueError, match=r"azure-2023-code\.csv\.gz"):
        traces.load(tmp_path)


def test_real_traces_are_read_in_order_of_time(requires: Callable[[str], Path]) -> None:
    """Each file of the shared folder gives thousands of arrivals of about an hour."""
    for trace in traces.load(requires("../shared/traces")).values():
        assert len(trace) > 5000
        assert 3000 < trace[-1].at < 4000
        assert all(a.at <= b.at for a, b in pairwise(trace))


@pytest.mark.parametrize("seed", range(8))
def test_no_silence_of_a_healthy_engine_is_longer_than_the_bound_that_weeks_pass_over_by(seed: int) -> None:
    """In full resolution, on drawn sites: between two signs of progress never more than `longest_gap` of an arrival."""
    rng = random.Random(f"bound:{seed}")
    site = sites.draw(rng, TRACES, CO)
    w = World(site, rng, compare=False, co=CO)
    w.run(15)
    start = rng.uniform(0, 3000)
    served = [a for a in TRACE if start <= a.at]
    w.traffic(sites.slice_of(TRACE, start, site.rate, w.now))
    longest = 0.0
    for _ in range(600):
        w.tick()
        longest = max(longest, w.control.health.evidence.age or 0.0)
    bound = max(
        sites.longest_gap(a, p, site, CO) for a, p in zip(served, sites.prefills(traces.Trace(served), CO), strict=True)
    )
    assert longest <= bound


@pytest.mark.parametrize("seed", range(12))
def test_passing_over_calm_time_hides_no_danger_that_full_resolution_shows(seed: int) -> None:
    """Calm time in full resolution kills nothing; and what a story then does to a verdict, it does no later, and no
    less, after calm time that was passed over."""
    skipped, _ = lived(seed, skip=True)
    full, calm = lived(seed, skip=False)
    assert calm == []
    for state, at in full:
        assert any(other == state and when <= at for other, when in skipped), (state, at, skipped)


def lived(seed: int, *, skip: bool) -> tuple[list[Danger], list[str]]:
    """A quarter of an hour of calm, then a story, with the same draws either way.

    Returns the story's dangers and the kills of the calm.
    """
    rng = random.Random(f"lived:{seed}")
    site, busy = sites.draw(rng, TRACES, CO), rng.random() < 0.7
    alarm = rng.choice([a for a in ALARMS if a.number != 3])
    w = World(site, random.Random(f"calm:{seed}"), compare=False, co=CO)
    w.run(15)
    began = w.now
    if skip:
        weeks.pass_over(w, 900, busy, {site.trace: TRACE})
    else:
        if busy:
            w.traffic(sites.slice_of(TRACE, w.rng.uniform(0, 3000), site.rate, w.now))
        w.run(400)
        assert w.drained(490)
        w.run(began + 900 - w.now)
    calm = [c.state for c in w.trail if c.at >= began and c.state not in CALM]
    w.rng, began = random.Random(f"story:{seed}"), w.now
    w.traffic(sites.slice_of(TRACE, w.rng.uniform(0, 3000), site.rate, w.now))
    w.run(weeks.LEAD_S)
    alarm.story(w)
    w.run(weeks.AFTER_S)
    dangers = [(c.state, c.at - began) for c in w.trail if c.at >= began and c.state in ("suspect", *UNLIVE)]
    first = dict(reversed(dangers))
    return list(first.items()), calm


def test_natural_windows_are_found_where_hardware_is_far_slower_than_the_coefficients_say() -> None:
    """At the coefficients' speed no arrival of the trace can end in a kill; ten times slower, its long prompts can."""
    at_speed, slow = (sites.windows(TRACE, Site(slowness=s), CO, SilenceLimits(), kill=0.0) for s in (1.0, 10.0))
    assert at_speed == []
    assert slow
    assert all(sites.prefills(TRACE, CO)[i] > 0.5 and ratio > sites.SHARE for ratio, i in slow)
    bounded = sites.windows(TRACE, Site(slowness=10.0), CO, SilenceLimits(), kill=75.0)
    assert 0 < len(bounded) < len(slow)
    assert {i for _, i in bounded} < {i for _, i in slow}


def test_only_calm_time_may_be_passed_over() -> None:
    """Not while users wait, nor while the verdict is anything but calm."""
    w = World(Site(), random.Random(0), compare=False)
    with pytest.raises(AssertionError, match="only calm time"):
        w.skip(10, busy=True)
    w.run(15)
    w.request(100_000, 100)
    with pytest.raises(AssertionError, match="only calm time"):
        w.skip(10, busy=True)


def test_a_week_is_the_same_again_from_its_seed() -> None:
    """What a false kill's seed names can be looked at again."""
    one, two = (weeks.week("7:3", TRACES, CO) for _ in range(2))
    assert one == two
    assert one.weeks == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "alarm", [a for a in ALARMS if not a.hidden and a.number != 15 and not a.kind], ids=weeks.label
)
def test_the_production_code_stays_silent_in_the_simulated_alarm(alarm: Alarm) -> None:
    """Three stories of each alarm kill nothing; not held of a tokenizer of 60 s, on an engine without a page."""
    for seed in range(3):
        tally, rng = weeks.Tally(), random.Random(f"alarm:{seed}:{alarm.text}")
        w = World(sites.draw(rng, TRACES, CO), rng, compare=False, co=CO)
        w.run(15)
        weeks.event(w, alarm, TRACES, tally, str(seed))
        assert tally.kills == {}, tally.examples


class Watched(World):
    """A world that notes what its users and its engine's counters go through."""

    def __init__(self, site: Site, rng: random.Random) -> None:
        super().__init__(site, rng, compare=False, relief=False, co=CO)
        # Longest seconds: tokens kept back, an answer in one piece, a wait for a first token, running without a token,
        # work past the relay while no user waits, without a served port, since the page's counters, without steps.
        self.longest = dict.fromkeys(("kept", "whole", "waits", "stands", "foreign", "starts", "page", "stopped"), 0.0)
        self.overtaken: dict[str, int] = {}
        self.seen: dict[str, int] = {}  # events by what is special about them
        self._since: dict[str, float] = {}
        self.falls = 0  # of the page's counter, where another process answers
        self._counted = 0.0

    def _live(self) -> None:
        super()._live()
        if isinstance(self._reading, Value) and (counted := self._reading.value.generation_tokens) is not None:
            self.falls += counted < self._counted
            self._counted = counted
        e, users = self.engine, self.users.values()
        self._note_longest("kept", any(s.kept for s in users))
        self._note_longest("stopped", not e.how.stepping)
        self._note_longest("foreign", not users and any(s.owner == FOREIGN for s in (*e.running, *e.waiting)))
        self._note_longest("starts", e.how.loading or not e.how.port_open)
        self._note_longest("stands", bool(e.running) and e.token_at < self.now - 0.5)
        ages = {"whole": [s for s in users if not s.streams], "waits": [s for s in users if s.first_at is None]}
        for name, seqs in ages.items():
            self.longest[name] = max([self.longest[name], *(self.now - s.came for s in seqs if s.came)])
        if isinstance(self._reading, Value) and self.site.page_seconds:
            self.longest["page"] = max(self.longest["page"], self.now - self._reading.at)
        self._note_order()
        for event in self._events:
            self._note_event(event)

    def _note_longest(self, name: str, holds: bool) -> None:
        since = self._since.setdefault(name, self.now) if holds else self._since.pop(name, self.now)
        self.longest[name] = max(self.longest[name], self.now - since)

    def _note_order(self) -> None:
        """Count the later ones that run, for each that waits."""
        running = [s.came for s in self.engine.running if s.owner == USER]
        for s in self.engine.waiting:
            self.overtaken[s.id] = max(self.overtaken.get(s.id, 0), sum(came > s.came for came in running))

    def _note_event(self, event: object) -> None:
        names = {
            "unread": isinstance(event, UnreadRequest) and event.on,
            "untold": isinstance(event, Delivered) and event.tokens == 0,
            "404": isinstance(event, Settled) and event.status == 404,
            "full": isinstance(event, Settled) and event.status in (429, 503),
            "left": isinstance(event, Settled) and event.outcome == "client_cancelled" and event.first_at is None,
            "reorders": isinstance(event, Admitted) and event.reorders,
            "withholds": isinstance(event, Admitted) and event.withholds,
            "served without a canary": isinstance(event, Settled)
            and event.outcome == "ok"
            and not self.site.takes_canary,
            "short": isinstance(event, Admitted) and event.route in ("embeddings", "rerank", "transcription"),
        }
        for name, holds in names.items():
            self.seen[name] = self.seen.get(name, 0) + bool(holds)


CLAIMS: dict[str, Callable[[Watched], bool]] = {
    "tool calls withheld to their end": lambda w: w.longest["kept"] > 30 and w.seen["withholds"] > 0,
    "thoughts hidden": lambda w: w.longest["kept"] > 20,
    "priority scheduling": lambda w: max(w.overtaken.values()) >= 3 and w.longest["waits"] > 60,
    "LoRA slots": lambda w: max(w.overtaken.values()) >= 3 and w.longest["waits"] > 60,
    "grammars or transfers of 20-180 s": lambda w: w.longest["waits"] > 20 and w.seen["reorders"] > 0,
    "longest prefix first": lambda w: max(w.overtaken.values()) >= 3,
    "one slot: a long answer after 40 short ones": lambda w: w.longest["whole"] > 60,
    "whole answers of up to the model's length": lambda w: w.longest["whole"] > 50,
    "the same at one slot": lambda w: w.longest["whole"] > 50,
    "images of 20-120 s, unread": lambda w: w.longest["whole"] > 19 and w.seen["unread"] > 0,
    "lines of JSON, unread": lambda w: w.seen["untold"] > 50 and w.seen["unread"] > 0,
    "raw audio": lambda w: w.seen["untold"] > 50 and w.seen["short"] > 0,
    "the whole engine compiles for 10-60 s in service": lambda w: w.longest["stands"] > 9,
    "the same for 46-50 s, three times": lambda w: w.longest["stands"] > 45,
    "first long prompt, 100-700 times slower": lambda w: w.longest["waits"] > 35,
    "no canary passes": lambda w: w.seen["served without a canary"] > 5,
    "memory released through the relay": lambda w: w.verdict in CALM,
    "memory released past the relay": lambda w: w.longest["stopped"] > 30,
    "long prompt past the relay": lambda w: w.longest["foreign"] > 2,
    "the same, and the sidecar restarts": lambda w: w.longest["foreign"] > 2,
    "users ask for a model that is not there": lambda w: w.seen["404"] > 5,
    "bounded queue refuses": lambda w: w.seen["full"] > 20,
    "embeddings, nothing learned yet": lambda w: w.longest["stands"] > 9 and w.seen["short"] == 2,
    "embeddings, learned": lambda w: w.longest["stands"] > 9 and w.seen["short"] > 20,
    "rerank, learned": lambda w: w.longest["stands"] > 9 and w.seen["short"] > 20,
    "transcription, nothing learned yet": lambda w: w.longest["stands"] > 9 and w.seen["short"] == 2,
    "transcription, learned": lambda w: w.longest["stands"] > 9 and w.seen["short"] > 20,
    "start of up to 20 min after a restart": lambda w: 250 < w.longest["starts"] < 1201,
    "impatient clients behind prefills": lambda w: w.seen["left"] >= 3,
    "metrics page takes 3 s": lambda w: w.longest["page"] >= 3,
    "pages of two backends behind one port": lambda w: w.falls > 5,
    "pages of four backends behind one port": lambda w: w.falls > 5,
    "disk, swap, peer, GPU, debugger, freezer or compiler hold it up 10-60 s": lambda w: w.longest["stands"] > 9,
    "a lock is held for 10-60 s and released": lambda w: w.longest["stands"] > 9,
}


@pytest.mark.parametrize("alarm", [a for a in ALARMS if a.kind], ids=weeks.label)
def test_a_field_report_of_a_healthy_engine_does_what_it_says(alarm: Alarm) -> None:
    """Its users go through what it claims, nothing is killed or ended for it, and the engine serves afterwards."""
    rng = random.Random(f"field:{alarm.text}")
    w = Watched(sites.draw(rng, TRACES, CO), rng)
    before = w.site
    w.run(15)
    weeks.pass_over(w, 3600, True, TRACES)
    w.traffic(sites.slice_of(TRACE, w.rng.uniform(0, 3000), w.site.rate, w.now))
    w.run(10)
    began = w.now
    alarm.story(w)
    w.run(5)
    assert CLAIMS[alarm.text](w), (w.longest, w.seen, w.overtaken)
    assert w.site == before
    if not alarm.hidden:
        assert w.killed(began) is None, w.trail
        assert (w.cut, w.engine.harmed) == (0, 0)
    weeks.settle(w)
    assert serves(w)


def serves(w: World) -> bool:
    """Whether a request that is sent now is answered to its end."""
    seq = w.request(50, 5)
    field_reports.served(w, [seq], 60)
    return seq is not None and seq.sent == 5


FIELD = [(m, load) for m in modes.FIELD_MODES for load in m.loads]
HALF = (210, 211)  # of these hangs, every second request is answered


@pytest.mark.parametrize(("mode", "load"), FIELD, ids=lambda p: p if isinstance(p, str) else str(p.number))
def test_a_field_report_of_a_hang_hangs(mode: modes.Mode, load: str) -> None:
    """Requests were answered before, and none, or every second, is answered after."""
    w = modes.made_for(mode, random.Random(f"hangs:{mode.number}:{load}"))
    modes.loaded(w, load)
    assert w.engine.counters.finished > 0
    modes.strike(w, mode)
    w.traffic(None)
    sent: list[Seq | None] = []
    for _ in range(6):
        sent.append(w.request(50, 5, special=w.usual))
        w.run(0.5)
    w.run(40)
    assert sum(seq is not None and seq.sent == 5 for seq in sent) == (3 if mode.number in HALF else 0)


@pytest.mark.parametrize(("mode", "load"), FIELD, ids=lambda p: p if isinstance(p, str) else str(p.number))
def test_the_production_code_finds_the_hang_of_a_field_report(mode: modes.Mode, load: str) -> None:
    """The expected probe fails, with a right reason."""
    found = tried(mode, load)
    assert found.found is not None, found.trail
    assert found.right, found.trail


def test_reports_decide_nothing() -> None:
    """With and without the control's own reports a story takes the same course."""
    assert "_snapshot" in vars(ControlState)
    courses = []
    for reports in (True, False):
        rng = random.Random("reports")
        w = World(sites.draw(rng, TRACES, CO), rng, compare=False, co=CO, reports=reports)
        w.new_control()
        w.run(15)
        next(a for a in ALARMS if a.text == "the same for 46-50 s, three times").story(w)
        courses.append(w.trail)
    assert courses[0] == courses[1]


def test_schedulers_serve_in_the_order_that_the_site_has() -> None:
    """One slot: priorities and adapters let a later request go first, arrival alone does not."""
    urgent, lazy = Special(priority=0), Special(priority=10)
    for order, first in (("fcfs", 0), ("priority", 1)):
        w = World(Site(order=order, max_batch=1), random.Random(0), compare=False)
        w.request(50, 2000)
        w.run(1)
        seqs = [w.request(50, 2000, special=special) for special in (lazy, urgent)]
        w.run(20)
        assert seqs[first] in w.engine.running
        assert seqs[1 - first] in w.engine.waiting
    w = World(Site(adapters=1), random.Random(0), compare=False)
    one, two, three = (w.request(50, 2000, special=Special(adapter=name)) for name in "aba")
    w.run(1)
    assert [one, three] == w.engine.running
    assert [two] == list(w.engine.waiting)


def test_tokens_that_the_engine_keeps_are_counted_and_come_at_once() -> None:
    """The counter rises while nothing is delivered; then all that was kept comes in one piece."""
    w = World(Site(), random.Random(0), compare=False)
    w.run(15)
    w.request(50, 2000, special=Special(hides=1500))
    w.run(5)
    delivered, counted = w.control.ledger.delivered_total, w.engine.counters.generation
    assert delivered < 100 < counted
    w.run(10)
    assert w.control.ledger.delivered_total == 2000


def test_a_canary_into_released_memory_is_counted_as_harm() -> None:
    """The core dies of it, and the tally of alarms would show it."""
    w = World(Site(), random.Random(0), compare=False)
    w.engine.fault("memory_released")
    w.run(15)
    assert w.engine.harmed > 0
    assert not w.engine.how.stepping


def test_a_full_queue_refuses_with_503() -> None:
    """What is beyond the bound is refused; a canary then counts as busy."""
    w = World(Site(queue=2, max_batch=1), random.Random(0), compare=False)
    w.run(15)
    taken = [w.request(5000, 5000) for _ in range(8)]
    assert [seq is None for seq in taken] == [False, False, *[True] * 6]
    w.control.health.canary_sent(w.now)
    w._send_canary(5.0)
    assert w.control.health.canaries.last.outcome == "busy"


WHOLE = [(m, load) for m in modes.MODES for load in m.loads if m.whole and load in ("idle", "decoding")]
PARTS = [(m, load) for m in modes.MODES for load in m.loads[:1] if not m.whole]


@pytest.mark.parametrize(("mode", "load"), WHOLE, ids=lambda p: p if isinstance(p, str) else str(p.number))
def test_the_production_code_finds_every_hang_of_the_whole_engine(mode: modes.Mode, load: str) -> None:
    """Idle or decoding, liveness fails with a right reason while only the fault happens."""
    found = tried(mode, load)
    assert found.before in CALM
    assert found.liveness is not None, found.trail
    assert found.liveness > 0
    assert found.right, found.trail


@pytest.mark.parametrize(("mode", "load"), PARTS, ids=lambda p: p if isinstance(p, str) else str(p.number))
def test_the_production_code_finds_every_hang_of_a_part(mode: modes.Mode, load: str) -> None:
    """What the catalogue requires comes, with a right reason."""
    found = tried(mode, load)
    assert found.found is not None, found.trail
    assert found.right, found.trail
    assert found.owed != "request" or found.liveness is None, found.trail


def tried(mode: modes.Mode, load: str) -> modes.Trial:
    """One trial without the baselines."""
    w = modes.made_for(mode, random.Random(f"mode:{mode.number}:{load}"))
    w.compare, w.rivals.baselines = False, []
    return modes.trial(w, mode, load)


def test_a_request_that_control_ends_frees_its_place_in_the_engine() -> None:
    """The relay of the simulation obeys End: the stuck stream is gone from the engine, and is settled as stalled."""
    mode = next(m for m in modes.MODES if m.number == 14)
    w = modes.made_for(mode, random.Random(0))
    assert modes.trial(w, mode, "decoding", horizon=200.0).ended is not None
    assert w.ended[0].id not in {s.id for s in w.engine.running}
    assert w.control.ledger.totals[("t", "m", "stalled")][1] == 1


def test_a_client_that_does_not_read_is_reported_and_gets_all_in_the_end() -> None:
    """Backpressure goes to control after a second, deliveries stop, and come at once when the client reads again."""
    w = World(Site(), random.Random(0), compare=False)
    w.run(15)
    seq = w.request(100, 200)
    w.unread(seq)
    w.run(10)
    (hold,) = w.control.ledger.holds()
    assert (hold.blocked, hold.delivered) == (True, 0)
    w.read(seq)
    w.run(1)
    assert not w.users
    assert w.control.ledger.delivered_total == 200


def test_work_past_the_relay_shows_on_the_page_alone() -> None:
    """It moves gauges and counters, and is none of the relay's requests."""
    w = World(Site(), random.Random(0), compare=False)
    w.past_relay(4000, 1000)
    w.run(2)
    page = sample(w.engine, w.now, 0.0).value
    assert page.running == 1
    assert page.generation_tokens > 10
    assert w.control.health.evidence.outstanding == 0


def test_each_rank_counts_its_own_tokens() -> None:
    """With one of two ranks dead, its counter stands and the other's moves."""
    w = World(Site(ranks=2), random.Random(0), compare=False)
    for _ in range(4):
        w.request(100, 5000)
    w.run(2)
    w.engine.fault("one_rank", rank=0)
    before = [r.generation_tokens for r in sample(w.engine, w.now, 0.0).value.ranks]
    w.run(2)
    after = [r.generation_tokens for r in sample(w.engine, w.now, 0.0).value.ranks]
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_a_run_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """What is kept is read again, a record that was cut off is dropped, and other code's results are refused."""
    file = tmp_path / "kept"
    first: Kept[str] = Kept(file, BENCHMARKS)
    first.add(("week", "1", 0, 10), "one")
    first.add(("week", "1", 10, 10), "two")
    file.write_bytes(file.read_bytes()[:-3])
    again: Kept[str] = Kept(file, BENCHMARKS)
    assert again.done == {("week", "1", 0, 10): "one"}
    again.add(("week", "1", 10, 10), "two")
    assert list(Kept(file, BENCHMARKS).done.values()) == ["one", "two"]
    with pytest.raises(ValueError, match="other code"):
        Kept(file, tmp_path)


def test_prefills_share_the_step_or_starve_the_decodes() -> None:
    """A prefill of seconds leaves a running stream its share of tokens, or nothing, as the site has it."""
    counts = {}
    for starves in (False, True):
        w = World(Site(starves=starves), random.Random(0), compare=False)
        w.request(100, 5000)
        w.run(2)
        before = w.control.ledger.delivered_total
        w.request(100_000, 10)  # 8.5 s of prefill
        w.run(5)
        counts[starves] = w.control.ledger.delivered_total - before
    assert counts[True] == 0 < counts[False]


def test_a_prefill_under_way_moves_no_counter_but_kv_use() -> None:
    """As vLLM: prompt, generation and iteration counters stand still, KV use grows."""
    w = World(Site(), random.Random(0), compare=False)
    w.request(100_000, 10)
    w.run(2)
    one = sample(w.engine, w.now, 0.0).value
    w.run(3)
    two = sample(w.engine, w.now, 0.0).value
    assert (one.prompt_tokens, one.generation_tokens, one.iterations) == (
        two.prompt_tokens,
        two.generation_tokens,
        two.iterations,
    )
    assert two.kv_usage > one.kv_usage > 0


def test_chunks_held_up_by_a_blocked_api_reach_the_relay_when_it_answers_again() -> None:
    """Nothing is lost: the tokens and the end of a stream come late."""
    w = World(Site(), random.Random(0), compare=False)
    w.engine.submit("a", 100, 50, w.now)
    w.engine.fault("api_block")
    assert w.engine.advance(w.now, w.now + 10) == []
    w.engine.heal()
    w.engine.submit("b", 100, 50, w.now + 10)
    events = w.engine.advance(w.now + 10, w.now + 15)
    assert sum(f.tokens for f in events if isinstance(f, Delivered) and f.id == "a") == 50
    assert [f.outcome for f in events if isinstance(f, Settled)] == ["ok", "ok"]


def seen(now: float, **changes: object) -> Seen:
    """A healthy look, with changes."""
    calm = {
        "health_status": 200,
        "health_seconds": 0.01,
        "running": 0.0,
        "waiting": 0.0,
        "token_age": 0.0,
        "loop_age": 0.0,
        "chunk_age": 0.0,
        "iterations": now,
        "users": 0,
        "canary": lambda whose, limit: True,
    }
    return Seen(now=now, **{**calm, **changes})  # type: ignore[arg-type]


def failing(whose: str, limit: float) -> bool:
    """Every canary fails."""
    return False


FIRES = {
    "vLLM /health": {"health_status": 503},
    "llm-d, kubelet 1 s": {"health_seconds": 1.5},
    "KServe, NIM: static page": {"health_seconds": 1.5},
    "Ray Serve": {"health_seconds": 31.0},
    "vLLM PR 45526": {"running": 1.0, "token_age": 61.0},
    "gonka PR 1421": {"running": 1.0, "iterations": 5.0},
    "SGLang /health_generate": {"canary": failing, "token_age": 25.0},
    "LMDeploy 90 s": {"loop_age": 91.0},
    "Dynamo canary": {"canary": failing, "chunk_age": 11.0},
    "TensorRT-LLM 300 s": {"loop_age": 301.0},
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_baseline_fires_on_its_own_condition_and_on_nothing_else(check: Check) -> None:
    """Each detector fails on the one thing that it looks at, not before, and not on what the others look at."""
    calm = Baseline(check)
    for now in range(0, 400, 10):
        calm.poll(seen(float(now)))
    assert (calm.failing_since, calm.killed_at) == (None, None)
    fires = Baseline(check)
    for now in range(0, 400, 10):
        fires.poll(seen(float(now), **FIRES[check.name]))
    assert fires.killed_at is not None
    assert fires.killed_at >= (fires.failing_since or 0.0)
