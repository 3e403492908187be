"""Calibration: what is fitted, what it is worth, and the whole of it against a real scripted engine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import units
from sidecar.__main__ import run
from sidecar.calibrate import fit, report
from sidecar.calibrate.command import CalibrateSettings, calibrate
from sidecar.calibrate.fit import Measured
from sidecar.calibrate.journal import Journal
from sidecar.calibrate.shapes import LEAST, Shape, plan, reference
from sidecar.engine.scripted import EngineSettings, ScriptedEngine
from sidecar.facts import Work
from sidecar.units import Coefficients

TRUE = Coefficients(k=5.0, a=0.2, b=2e-5, d=3.0, f=4e-4)


def measured(shapes: list[Shape], noise: float = 0.0, seed: int = 1) -> list[Measured]:
    rng = random.Random(seed)
    works = [Work(s.uncached, s.cached, s.output) for s in shapes]
    return [Measured(w, units.gpu_ms(w, TRUE) * (1 + rng.uniform(-noise, noise))) for w in works]


def split(noise: float = 0.0) -> tuple[list[Measured], list[Measured]]:
    shapes = plan(8192, cached=True)
    return measured([s for s in shapes if not s.held_out], noise), measured([s for s in shapes if s.held_out], noise, 2)


def test_known_coefficients_are_found_again() -> None:
    """From costs without noise, held-out shapes are predicted within a hundredth, and far better than by a line."""
    fitted, held_out = split()
    co = fit.fit(fitted)
    assert fit.accuracy(held_out, co).mape < 0.01
    assert fit.line_accuracy(held_out, fit.line(fitted)).mape > 5 * fit.accuracy(held_out, co).mape
    assert fit.variation([*fitted, *held_out], co) < 0.05


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0, 0.3))
def test_noise_gives_no_negative_and_no_wild_coefficient(seed: int, noise: float) -> None:
    """Whatever the noise: all at least 0, finite, and errors of about its size."""
    shapes = plan(4096, cached=False, seed=seed)
    fitted = measured([s for s in shapes if not s.held_out], noise, seed)
    co = fit.fit(fitted)
    assert all(0 <= getattr(co, name) < 1e6 for name in fit.TERMS)
    assert fit.accuracy(fitted, co).mape < 0.02 + noise


def test_a_term_that_no_shape_shows_keeps_the_priors_share() -> None:
    """Without images their price is the prior's, scaled to this machine, not 0."""
    fitted, _ = split()
    co = fit.fit(fitted)
    scale = fit._scale(fitted, Coefficients())
    assert co.g == pytest.approx(Coefficients().g * scale) and co.h == pytest.approx(Coefficients().h * scale)


def test_too_few_measurements_are_said() -> None:
    """Three costs cannot tell seven prices."""
    with pytest.raises(ValueError, match="at least four"):
        fit.fit(split()[0][:3])


@pytest.mark.parametrize("context", [LEAST, 512, 4096, 131_072])
@pytest.mark.parametrize("cached", [True, False])
def test_a_plan_fits_the_context(context: int, cached: bool) -> None:
    """Every request fits; shapes differ; some are held out; another seed is another order of the same."""
    shapes = plan(context, cached=cached)
    assert all(s.uncached + s.cached + s.output <= context for s in shapes)
    assert any(s.held_out for s in shapes) and sum(not s.held_out for s in shapes) >= 8
    assert any(s.cached for s in shapes) is cached
    assert sorted(map(repr, shapes)) == sorted(map(repr, plan(context, cached=cached, seed=5)))
    assert reference(context).uncached + reference(context).output <= context


def test_a_context_that_is_too_short_is_refused() -> None:
    """Prompt and output could not be told apart."""
    with pytest.raises(ValueError, match="256"):
        plan(LEAST - 1, cached=False)


def test_a_journal_goes_on_and_belongs_to_one_plan(tmp_path: Path) -> None:
    """What was measured is read back, a half-written line is left out, another plan begins anew."""
    out, shape, cost = tmp_path / "co.json", Shape(8, 0, 1), Measured(Work(8, output=1), 2.5)
    journal = Journal(out, {"model": "a"})
    assert journal.read() == {}
    journal.add(shape, 0, cost)
    with (tmp_path / "co.json.partial").open("a") as file:
        file.write('{"shape": {"unca')
    assert Journal(out, {"model": "a"}).read() == {(shape, 0): cost}
    assert Journal(out, {"model": "b"}).read() == {}
    journal.close()
    assert not list(tmp_path.iterdir())


async def test_a_scripted_engine_is_calibrated(tmp_path: Path) -> None:
    """Prefill and decode prices come out near the engine's own speeds; the file is read by `sidecar run`; the report names errors."""
    engine = EngineSettings(listen=("127.0.0.1", 0), prefill_tokens_per_second=20_000, decode_step_ms=4.0)
    async with ScriptedEngine(engine) as running:
        chosen = CalibrateSettings(
            engine=running.url, out=str(tmp_path / "co.json"), seconds=5, concurrency=2, context=LEAST, slo_seconds=2
        )
        found, met = await calibrate(chosen, tmp_path / "co.json")
        done = Journal(
            tmp_path / "co.json", json.loads((tmp_path / "co.json.partial").read_text().splitlines()[0])
        ).read()
    assert len(done) == 2 * len(plan(LEAST, cached=met.cached))
    co = found.co
    assert 0.4 * 4.0 / 2 < co.d < 2.5 * 4.0 / 2, "two requests share a step of 4 ms"
    assert units.from_json(units.to_json(co)) == co and co.source.startswith("calibrated") and co.model == "scripted"
    text = report.text(found, 2)
    assert "held out: MAPE" in text and "alpha-beta line" in text and "MU in flight" in text


def test_mu_in_flight_is_the_measured_one_at_its_slo() -> None:
    """At another SLO Little's law stands in."""
    co = Coefficients(mu_in_flight=7.0, slo_seconds=10.0)
    assert units.max_mu_in_flight(co, 10.0) == 7.0
    assert units.max_mu_in_flight(co, 5.0) == units.max_mu_in_flight(Coefficients(), 5.0)


def test_no_engine_and_no_folder_are_said(tmp_path: Path, capsys: Any) -> None:
    """One line each, with what to do."""
    assert run(["calibrate"]) == 2
    assert run(["calibrate", "--engine", "http://127.0.0.1:9", "--out", str(tmp_path / "no" / "co.json")]) == 2
    assert run(["calibrate", "--engine", "http://127.0.0.1:9", "--out", str(tmp_path / "co.json")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "--engine" in errors[0] and "--out" in errors[1] and "no engine answers" in errors[2]
