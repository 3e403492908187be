"""Coefficient monitoring: the re-fit and the alarm, on synthetic engines of known cost, in simulated time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.engines.registry import identity
from sidecar.events import Admitted, Event, FirstToken, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.load.coefficient_monitor import CoefficientMonitor
from sidecar.load.cost_model import Coefficients
from sidecar.load.drift import Drift, find_mismatch
from sidecar.load.ledger import Ledger
from sidecar.load.refit import MIN_REFIT_WINDOWS, PRIOR_STEP_SHARE, TERM_COUNT, Refit
from sidecar.load.work_windows import STEP_INDEX, WINDOW_CLOSE_WAIT_S, WINDOW_S, WINDOW_TERMS, WorkWindow, WorkWindows
from sidecar.readings import EngineIdentity

from .work import found, history, slower, windows

TRUE = Coefficients(k=5.0, a=0.2, b=2e-5, d=3.0, f=4e-4, g=0.05, h=4.0, batch=8, source="calibrated")
# The speeds of `sidecar engine`.
SCRIPTED = Coefficients(k=1e-4, a=0.05, b=1e-9, d=10 / 8, f=1e-9, g=0, h=0, batch=8, source="file")
FLAGS = "cache_dtype=auto,gpu_memory_utilization=0.9"
WITHIN = 30  # windows in which a slowdown to 1.5 times is found


# --- the re-fit ---


def fitted(prior: Coefficients, seen: Iterable[WorkWindow]) -> Refit:
    refit = Refit(prior)
    for window in seen:
        refit.add(window)
    return refit


def error(refit: Refit, seen: Iterable[WorkWindow]) -> float:
    """Mean log error on windows that were not learned."""
    co = refit.shadow()
    assert co
    step, token = PRIOR_STEP_SHARE * refit.times[STEP_INDEX], (1 - PRIOR_STEP_SHARE) * refit.times[STEP_INDEX + 1]
    shared = step / (step + token)
    errors = []
    for window in seen:
        x = dict(zip(WINDOW_TERMS, window.work, strict=True))
        decode = co.d * ((1 - shared) * x["d"] + shared * co.batch * x["step"])
        said = decode + sum(getattr(co, name) * x[name] for name in cost_model.TERMS if name != "d")
        errors.append(abs(math.log(said / window.ms)))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("shared", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("prior", [Coefficients(), Coefficients(batch=8), replace(TRUE, a=0.1, d=6.0)])
def test_the_refit_converges_on_known_coefficients(prior: Coefficients, shared: float) -> None:
    """From a prior off 2 to 20 times, mixed load with 10 % noise: new windows within 5 %, one MU within 12 %."""
    refit = fitted(prior, windows(TRUE, 300, seed=1, shared=shared))
    assert error(refit, windows(TRUE, 50, seed=2, shared=shared, noise=0.0)) < 0.05
    shadow = refit.shadow()
    assert shadow
    d = TRUE.d * (1 - shared + shared * TRUE.batch / prior.batch)  # at the batch that the prior holds for
    assert cost_model.unit_ms(shadow) == pytest.approx(cost_model.unit_ms(replace(TRUE, d=d)), rel=0.12)


def test_a_term_that_the_traffic_does_not_show_keeps_its_share() -> None:
    """Without image traffic, the price of images follows the scale of the rest, and is not 0."""
    refit = fitted(replace(TRUE, g=0.025, h=2.0), windows(TRUE, 200, seed=3, images=False))
    shadow = refit.shadow()
    assert shadow
    assert 0.5 < shadow.g / 0.025 < 2.0


numbers = st.floats(0, 1e12) | st.sampled_from([0.0, 1e-12, 1e300, math.inf, math.nan])


@settings(max_examples=50)
@given(
    garbage=st.lists(
        st.tuples(numbers, st.lists(numbers, min_size=TERM_COUNT, max_size=TERM_COUNT), numbers), max_size=40
    )
)
@example(garbage=[(1.0, [math.nan if term == "step" else 1.0 for term in WINDOW_TERMS], 1.0)])
def test_garbage_keeps_the_refit_bounded(garbage: list[tuple[float, list[float], float]]) -> None:
    """Whatever is measured, coefficients are finite and at least 0, and the drift sums are bounded."""
    refit, drift = Refit(TRUE), Drift(TRUE)
    for at, (ms, work, together) in enumerate(garbage):
        window = WorkWindow(float(at), ms, tuple(work), max(1.0, together))
        refit.add(window)
        drift.add(window)
    assert all(0 <= t <= 1e4 for t in refit.times)
    assert drift.memory.misfit.over <= len(garbage)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), odd=st.floats(0.001, 1000))
def test_one_odd_window_pulls_with_a_bounded_gain(seed: int, odd: float) -> None:
    """A single window, however wrong, changes the price of one MU by at most a tenth."""
    refit = fitted(TRUE, windows(TRUE, 100, seed))
    before = refit.shadow()
    (window,) = windows(TRUE, 1, seed + 1)
    refit.add(replace(window, ms=window.ms * odd))
    after = refit.shadow()
    assert before
    assert after
    assert cost_model.unit_ms(after) == pytest.approx(cost_model.unit_ms(before), rel=0.1)


# --- the alarm ---


@pytest.mark.parametrize("shared", [0.3, 1.0])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_stationary_noise_is_no_alarm(noise: float, shared: float) -> None:
    """10,000 windows (more than a day of work) of mixed load: at most one false alarm."""
    alarms = sum(
        found(Drift(TRUE, caching=True), windows(TRUE, 1_000, seed, shared=shared, noise=noise)) is not None
        for seed in range(10)
    )
    assert alarms <= 1


@pytest.mark.parametrize("shared", [0.3, 1.0])
@pytest.mark.parametrize("noise", [0.05, 0.15])
@pytest.mark.parametrize("times", [1.5, 3.0])
def test_a_slowdown_is_found(times: float, noise: float, shared: float) -> None:
    """An engine that becomes 1.5 times slower or more is detected within WITHIN windows, in 9 of 10 histories."""
    late = 0
    for seed in range(10):
        drift = Drift(TRUE, caching=True)
        assert found(drift, windows(TRUE, 300, seed, shared=shared, noise=noise)) is None
        after = found(drift, slower(windows(TRUE, WITHIN, seed + 100, shared=shared, noise=noise), times))
        late += after is None
    assert late <= 1


def test_coefficients_that_never_fitted_are_found() -> None:
    """Without any history, an engine twice as slow as measured at the measured batch size is detected."""
    seen = (replace(w, together=8.0) for w in windows(TRUE, 40, 5))
    at_batch = (replace(w, work=(*w.work[:3], w.work[4] / 8, *w.work[4:])) for w in seen)
    priced = (
        replace(w, ms=2 * sum(getattr(TRUE, n) * x for n, x in zip(WINDOW_TERMS, w.work, strict=True) if n != "step"))
        for w in at_batch
    )
    assert (found(Drift(TRUE), priced) or 99) <= 10


def test_a_faster_engine_counts_where_cached_prompts_are_told() -> None:
    """A faster engine is detected only if it reports cached tokens; otherwise the prompts may have been cached."""
    for caching in (False, True):
        drift = Drift(TRUE, caching=caching)
        assert found(drift, windows(TRUE, 200, 1)) is None
        assert (found(drift, slower(windows(TRUE, WITHIN, 2), 0.5)) is not None) is caching


def test_unseen_caching_that_ends_is_no_slowdown() -> None:
    """An engine that was fast and becomes as predicted raises an alarm only if it reports cached tokens."""
    for caching in (False, True):
        drift = Drift(TRUE, caching=False)
        assert found(drift, slower(windows(TRUE, 300, 3), 0.4)) is None
        drift.caching = caching
        assert (found(drift, windows(TRUE, WITHIN, 4)) is not None) is caching


def test_an_engine_that_is_itself_again_is_no_longer_stale() -> None:
    """The alarm ends some windows after the slowdown, and the next slowdown is detected again."""
    drift = Drift(TRUE)
    for times, stale in ((1.0, False), (2.0, True), (1.0, False), (2.0, True)):
        for window in slower(windows(TRUE, 150, 7), times):
            drift.add(window)
        assert bool(drift.memory.stale) is stale, times


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (EngineIdentity(("a", "b"), "1.0", ("H100",)), ""),
        (EngineIdentity(), ""),
        (EngineIdentity(("c",), "1.0", ("H100",)), "model"),
        (EngineIdentity(("a",), "1.1", ("H100",)), "version"),
        (EngineIdentity(("a",), "1.0", ("NVIDIA L4",)), "L4"),
        (EngineIdentity(("a",), "1.0", ("",)), ""),  # a GPU that was lost before its name was read
        (EngineIdentity(("a",), "1.0", ("NVIDIA H100 80GB HBM3",)), ""),
        (EngineIdentity(("a",), "1.0", flags=("cache_dtype=auto", "gpu_memory_utilization=0.5")), ""),
        (EngineIdentity(("a",), "1.0", flags=("cache_dtype=fp8",)), "cache_dtype=fp8"),
    ],
)
def test_another_origin_is_a_mismatch(seen: EngineIdentity, said: str) -> None:
    """A different model, engine version or GPU is a mismatch, if both sides are known."""
    told = find_mismatch(replace(TRUE, model="a", engine="1.0", gpu="H100", flags=FLAGS), seen)
    assert said in told
    assert bool(told) is bool(said)
    assert find_mismatch(TRUE, seen) == ""


def test_the_name_of_an_engine_and_its_settings_are_read() -> None:
    """The identity comes from a model list, a version and a metrics page; anything else is unknown."""
    pages = {
        "/v1/models": b'{"data": [{"id": "a"}, {"id": 7}, 3]}',
        "/version": b'{"version": "1.0"}',
        "/metrics": b'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0"} 1.0\n',
    }
    assert identity(pages) == EngineIdentity(("a",), "1.0", flags=("cache_dtype=auto", "block_size=16"))
    assert identity(dict.fromkeys(pages, b"[]")) == EngineIdentity()


@pytest.mark.parametrize(
    ("path", "page", "prepared"),
    [
        ("/v1/models", b'{"data": [{"id": "m", "owned_by": "vllm-frontend-rs"}]}', False),
        ("/version", b'{"version": "0.33.0", "rust_frontend_version": "0.33.0"}', False),
        ("/v1/models", b'{"data": [{"id": "m", "owned_by": "vllm"}]}', True),
        ("/version", b'{"version": "0.33.0"}', True),
        ("/version", b'"rust_frontend_version"', True),
    ],
    ids=str,
)
def test_a_front_end_that_reads_no_pnm_is_known(path: str, page: bytes, prepared: bool) -> None:
    """vLLM's Rust front end says what it is in its model list and in its version: either is enough."""
    assert identity({path: page}).prepared is prepared


# --- windows, from events ---


def test_a_history_of_the_scheduler_is_accounted_for() -> None:
    """Work and busy time of the scripted engine's own scheduler agree with its speeds within 5 %, at any load."""
    for rate in (1.0, 4.0, 8.0):
        seen = list(closed(SCRIPTED, history(SCRIPTED, 200.0, 3, rate=rate)))
        assert len(seen) > 15
        work = [dict(zip(WINDOW_TERMS, w.work, strict=True)) for w in seen]
        said = sum(0.05 * x["a"] + 10.0 * x["step"] for x in work)
        assert said == pytest.approx(sum(w.ms for w in seen), rel=0.05), rate


def closed(co: Coefficients, facts: Iterable[tuple[float, Event]]) -> Iterator[WorkWindow]:
    """The windows of a history."""
    ledger, made = Ledger(co), WorkWindows(co, 0.0)
    for at, fact in facts:
        if (settlement := ledger.apply(0, fact)) is not None:
            made.settled(settlement)
        yield from made.close(ledger.holds(), at)


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_a_slower_scheduler_is_found(rate: float) -> None:
    """From events to alarm: steps that take 1.5 times as long are detected within WITHIN windows, and not before."""
    upkeep, ledger = CoefficientMonitor(SCRIPTED, 0.0), Ledger(SCRIPTED)
    stale_at = None
    facts = [*history(SCRIPTED, 600.0, 1, rate=rate), *history(SCRIPTED, 300.0, 2, rate=rate, slow=1.5, start=600.0)]
    for at, fact in facts:
        if (settlement := ledger.apply(0, fact)) is not None:
            upkeep.settled(settlement)
            upkeep.tick(ledger.holds(), at, EngineIdentity(), trusted=True)
        if upkeep.stale and stale_at is None:
            stale_at = at
    assert stale_at is not None
    assert 600.0 < stale_at < 600.0 + WITHIN * WINDOW_S
    assert upkeep.margin == pytest.approx(0.5)
    shadow = upkeep.refit.shadow()
    assert shadow
    assert shadow.a > 0.05


WORK = RequestSize(1000, output=100)


def one(id: str, at: float, *, stream: bool = True) -> Admitted:
    return Admitted(id, at, "t", "m", "chat", stream, WORK, None, 1.0)


def ended(id: str, at: float, *, sent: float, first: float, outcome: str = "ok") -> Settled:
    return Settled(id, at, outcome, 200, Usage(1000, 100), 100, 9, first, sent, 0.0)  # type: ignore[arg-type]


def test_a_window_waits_for_first_tokens_and_not_for_ever() -> None:
    """A window closes when all its requests have a first token, and is dropped after WINDOW_CLOSE_WAIT_S."""
    ledger, made = Ledger(TRUE), WorkWindows(TRUE, 0.0)
    ledger.apply(0, one("a", 12.0))
    assert made.close(ledger.holds(), 25.0) == []
    ledger.apply(0, FirstToken("a", 26.0))
    (window,) = made.close(ledger.holds(), 27.0)
    assert window.at == 20.0
    ledger.apply(0, one("b", 40.0))
    made.close(ledger.holds(), 45.0)
    assert made.close(ledger.holds(), 50.0 + WINDOW_CLOSE_WAIT_S + 2) == []


@pytest.mark.parametrize("outcome", ["engine_error", "stalled", "lost"])
def test_failed_work_spoils_its_windows(outcome: str) -> None:
    """A failed request spoils its windows, as the work done for it is unknown."""
    for how, expected in (("ok", 1), (outcome, 0)):
        ledger, made = Ledger(TRUE), WorkWindows(TRUE, 0.0)
        ledger.apply(0, one("a", 12.0))
        settlement = ledger.apply(0, ended("a", 18.0, sent=12.0, first=13.0, outcome=how))
        assert settlement
        made.settled(settlement)
        assert len(made.close(ledger.holds(), 22.0)) == expected


def test_what_is_not_trusted_teaches_nothing() -> None:
    """No window counts while the verdict is in doubt or others use the engine; a roofline is never stale."""
    rng = random.Random(1)
    for co, trusted, seen in ((SCRIPTED, False, 0), (Coefficients(), True, 1)):
        upkeep, ledger = CoefficientMonitor(co, 0.0), Ledger(co)
        for at, fact in history(SCRIPTED, 100.0, rng.randint(0, 9), rate=4.0):
            if (settlement := ledger.apply(0, fact)) is not None:
                upkeep.settled(settlement)
            upkeep.tick(ledger.holds(), at, EngineIdentity(("other",)), trusted=trusted)
        assert (upkeep.refit.windows > 0) is bool(seen)
        assert upkeep.stale == ""
        assert upkeep.use().shadow is None or upkeep.refit.windows >= MIN_REFIT_WINDOWS
