"""The live page in a real browser: the real document and feed, scripted snapshots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from sidecar import events, readings, snapshot
from sidecar.report import live_page

from ..waiting import PATIENCE

Script = Callable[..., Any]


def text_of(driver: webdriver.Chrome, selector: str) -> str:
    return str(driver.find_element(By.CSS_SELECTOR, selector).get_property("textContent")).replace("\u00a0", " ")


def await_text(driver: webdriver.Chrome, selector: str, wanted: str) -> None:
    WebDriverWait(driver, PATIENCE, 0.05).until(
        lambda d: wanted in text_of(d, selector), f"{selector} never said {wanted!r}"
    )


def requested(driver: webdriver.Chrome) -> set[str]:
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


def test_the_page_shows_every_part_with_units(
    site: Any, open_page: Callable[..., webdriver.Chrome], story: Script
) -> None:
    """Verdict, load, tenants, images, GPU, engine, relays, canary and changes all appear, numbers with units."""
    site.publish(*story(600))
    driver = open_page()
    await_text(driver, "#state", "progressing")
    shown = {
        "#for": "for 2 min 4",
        "#detail": "Tokens are delivered.",
        "#reason": "progress",
        "#now-silence-of": "of 8 s allowed",
        "#now-utilization-of": "limited by MU per minute",
        "#engine-kind": "engine: vllm 0.32.0",
        "#model": "model: Qwen/Qwen2.5-VL-7B-Instruct",
        "#pod": "pod: serving/llm-7d9f6c5b8-x2k4p",
        "#node": "node: gpu-node-12",
        "#now-first-of": "objective 2 s",
        "#probes": "probes: live passes, ready passes, startup passes",
        "#charts": "capacity 12 MU",
        "#tenants": "client_cancelled 14",
        "#images": "6.02 ms",
        "#gpus": "640 W",
        "#engine": "46 %",
        "#own": "48 MiB",
        "#relays": "1, pid 22",
        "#canary": "starved",
        "#changes": "no_progress",
        "#diagnoses": "EngineCore (pid 12): stopped (T)178 KiB",
        "#version": "0.1.0",
    }
    assert {selector: wanted for selector, wanted in shown.items() if wanted not in text_of(driver, selector)} == {}
    assert "absent: not supported under MIG" in text_of(driver, "#gpus")
    assert "not reported" in text_of(driver, "#engine")
    assert "XID 31 × 2" in text_of(driver, "#gpus")
    link = driver.find_element(By.CSS_SELECTOR, "#diagnoses a").get_attribute("href")
    assert link == site.url + "diagnoses/20251121-030522-stalled"
    assert len(driver.find_elements(By.CSS_SELECTOR, "#charts svg")) == 8
    assert driver.title.endswith("– llm-7d9f6c5b8-x2k4p")


def test_a_stall_turns_the_headline(site: Any, open_page: Callable[..., webdriver.Chrome], story: Script) -> None:
    """A stall changes word, color, reason, title and icon of an open page, and recovery changes them back."""
    site.publish(*story(310))
    driver = open_page()
    await_text(driver, "#state", "suspect")
    hero = driver.find_element(By.ID, "verdict")
    before, icon = (
        hero.value_of_css_property("background-color"),
        driver.find_element(By.ID, "icon").get_attribute("href"),
    )
    past = list(story(500))
    site.publish(*past[310:340])
    await_text(driver, "#state", "stalled")
    assert hero.value_of_css_property("background-color") != before
    assert driver.find_element(By.ID, "icon").get_attribute("href") != icon
    assert text_of(driver, "#reason") == "no_progress"
    assert "restarted" in text_of(driver, "#meaning")
    assert "of 8 s allowed" in text_of(driver, "#now-silence-of")
    WebDriverWait(driver, PATIENCE, 0.05).until(lambda d: d.title.startswith("■ stalled"))
    site.publish(*past[340:])
    await_text(driver, "#state", "progressing")


def test_the_band_tells_each_change_and_its_reason(
    site: Any, open_page: Callable[..., webdriver.Chrome], story: Script
) -> None:
    """The timeline has a segment for each verdict of the window, and pointing at one shows its reason."""
    past = list(story(600))
    site.publish(*past)
    driver = open_page()
    await_text(driver, "#state", "progressing")
    segments = driver.find_elements(By.CSS_SELECTOR, "#timeline .run")
    assert [segment.get_attribute("data-state") for segment in segments] == [
        change.state for change in reversed(past[-1].changes)
    ]
    stalled = next(segment for segment in segments if segment.get_attribute("data-state") == "stalled")
    ActionChains(driver).move_to_element(stalled).perform()
    await_text(driver, "#tip", "stalled: no_progress")
    assert "40 s" in text_of(driver, "#tip")
    assert driver.find_elements(By.CSS_SELECTOR, "#charts .cross"), "the same moment is marked in the charts"


def test_latencies_are_drawn_against_their_objective(
    site: Any, open_page: Callable[..., webdriver.Chrome], moment: Script, story: Script
) -> None:
    """Time to first token and per token have a chart and a tile; without a stream in the last minute they say so."""
    site.publish(*story(600))
    driver = open_page()
    await_text(driver, "#charts", "Time to first token")
    await_text(driver, "#charts", "objective 2 s")
    assert "Time per output token" in text_of(driver, "#charts")
    assert re.match(r"(19|2[0-3])\d ms", text_of(driver, "#now-first")) and " ms" in text_of(driver, "#now-token")
    site.publish(moment(601.0, latencies=snapshot.RecentLatencies()))
    await_text(driver, "#now-first-of", "no stream")
    assert (text_of(driver, "#now-first"), text_of(driver, "#now-token")) == ("–", "–")


def test_a_stall_says_what_fails_and_where_to_read_on(
    site: Any, open_page: Callable[..., webdriver.Chrome], moment: Script, story: Script
) -> None:
    """Failing probes are named, with the runbook's paragraph; and whether a person must act."""
    past = list(story(340))
    site.publish(*past)
    driver = open_page()
    await_text(driver, "#probes", "live fails, ready fails, startup fails")
    assert text_of(driver, "#what-to-do") == "What to do: docs/runbook.md#no_progress"
    assert not driver.find_element(By.ID, "operator").is_displayed()
    site.publish(replace(past[-1], handover="useless_restarts"))
    await_text(driver, "#operator", "An operator must act: useless_restarts")
    site.publish(moment(341.0))
    await_text(driver, "#state", "progressing")
    assert text_of(driver, "#what-to-do") == ""


def test_hours_can_be_shown(site: Any, open_page: Callable[..., webdriver.Chrome], moment: Script) -> None:
    """The reader chooses the time that is shown; a choice beyond the history shows all of it."""
    site.publish(*(moment(float(at)) for at in range(0, 4000, 2)))
    driver = open_page()
    await_text(driver, "#state", "progressing")
    for choice, words in (("1\u00a0h", "last 1 h"), ("6\u00a0h", "last 6 h"), ("10\u00a0min", "last 10 min")):
        button = next(
            b
            for b in driver.find_elements(By.CSS_SELECTOR, "#spans button")
            if b.text.replace("\u00a0", " ") == choice.replace("\u00a0", " ")
        )
        button.click()
        await_text(driver, "#span", words)
        assert button.get_attribute("aria-pressed") == "true"
        assert len(driver.find_elements(By.CSS_SELECTOR, "#timeline .run")) == 1, "coarse points are no gaps"


def test_evidence_unfolds_and_stays_unfolded(
    site: Any, open_page: Callable[..., webdriver.Chrome], story: Script
) -> None:
    """The evidence of a change can be expanded, and stays expanded after the next change."""
    past = list(story(500))
    site.publish(*past[:340])
    driver = open_page()
    await_text(driver, "#state", "stalled")
    driver.find_element(By.CSS_SELECTOR, "#changes summary").click()
    await_text(driver, "#changes details[open]", "24.1 s")
    site.publish(*past[340:440])
    await_text(driver, "#state", "progressing")
    assert "starved" in text_of(driver, "#changes details[open]")


def test_what_is_absent_says_why(site: Any, open_page: Callable[..., webdriver.Chrome], moment: Script) -> None:
    """Missing GPU, engine metrics, image worker and canary are shown with their reasons, never as zeros."""
    site.publish(
        moment(
            gpus=readings.Absent("no NVIDIA driver library"),
            engine=readings.Failed("connection refused"),
            images_device="off",
            canary=events.CanaryResult("rejected", 1.0, 1.1, 8.0, "no canary passes here: HTTP 404 on /v1/completions"),
            canaries=snapshot.CanaryUse(usable=False),
            progress_age=None,
            relays=(),
            tenants=(),
            changes=(),
        )
    )
    driver = open_page()
    await_text(driver, "#gpus", "absent: no NVIDIA driver library")
    assert text_of(driver, "#engine") == "could not be read: connection refused"
    assert "off" in text_of(driver, "#images")
    assert "silence alone" in text_of(driver, "#canary")
    assert "nothing outstanding" in text_of(driver, "#now-silence-of")
    assert "GPU busy not read" in text_of(driver, "#charts")
    assert text_of(driver, "#tenants") == "no request yet"
    assert not driver.find_element(By.ID, "draining").is_displayed()
    site.publish(moment(canary=None))
    await_text(driver, "#canary", "no result yet")
    site.publish(moment(601.0, draining=True))
    WebDriverWait(driver, PATIENCE, 0.05).until(lambda d: d.find_element(By.ID, "draining").is_displayed())


def test_hostile_names_stay_text(
    site: Any, open_page: Callable[..., webdriver.Chrome], verdict: Script, moment: Script
) -> None:
    """Names from clients and texts from engines are shown as text; nothing in them runs."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>window.owned=1</script>"
    site.publish(
        moment(
            tenants=(snapshot.TenantUse(evil, 1, 0.1, 1.0, 1, 1, ((evil, 1),)),),
            verdict=verdict("suspect", evil, evil, evil=evil),
            changes=(verdict("suspect", evil, evil, evil=evil),),
            engine=readings.Failed(evil),
            gpus=readings.Absent(evil),
            engine_kind=evil,
            version=evil,
            diagnoses=(events.DiagnosisSummary("../../x?" + evil, 1.0, evil, 1, evil),),
        )
    )
    driver = open_page()
    await_text(driver, "#tenants", evil)
    for selector in ("#detail", "#changes", "#engine", "#gpus", "#diagnoses"):
        assert evil in text_of(driver, selector)
    assert driver.find_elements(By.CSS_SELECTOR, "main img, main script") == []
    assert driver.execute_script("return window.owned") is None
    assert "owned" not in driver.title.split("–")[0]
    link = str(driver.find_element(By.CSS_SELECTOR, "#diagnoses a").get_attribute("href"))
    assert link.startswith(site.url + "diagnoses/")


def test_nothing_is_loaded_from_elsewhere(
    site: Any, open_page: Callable[..., webdriver.Chrome], moment: Script
) -> None:
    """The page requests itself and its events, and nothing else."""
    site.publish(moment())
    driver = open_page()
    await_text(driver, "#state", "progressing")
    asked = {url for url in requested(driver) if not url.startswith(("data:", "about:"))}
    assert asked == {site.url, site.url + "events"}


def luminance(colour: str) -> float:
    red, green, blue = (float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3])
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", events.STATES)
def test_text_is_readable_in_light_and_dark(
    state: events.State,
    scheme: str,
    site: Any,
    open_page: Callable[..., webdriver.Chrome],
    verdict: Script,
    moment: Script,
) -> None:
    """In both color schemes, for every verdict, text has a contrast of at least 4.5."""
    site.publish(moment(verdict=verdict(state)))
    driver = open_page(scheme=scheme)
    await_text(driver, "#state", state)
    colour = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert (luminance(colour) > 0.5) == (scheme == "light")
    hero = driver.find_element(By.ID, "verdict").value_of_css_property("background-color")
    if hero.startswith("color("):  # mixed colors are shares of 1
        hero = " ".join(str(float(part) * 255) for part in re.findall(r"[\d.]+", hero.removeprefix("color(srgb"))[:3])
    for selector in ("#state", "#detail", "#reason", "#since", "#now-silence-of"):
        ink = driver.find_element(By.CSS_SELECTOR, selector).value_of_css_property("color")
        assert contrast(ink, hero) >= 4.5, selector
    card = driver.find_element(By.CSS_SELECTOR, ".card")
    note = driver.find_element(By.CSS_SELECTOR, ".card small")
    assert contrast(note.value_of_css_property("color"), card.value_of_css_property("background-color")) >= 4.5


@pytest.mark.parametrize("width", [400, 800])
def test_a_narrow_window_needs_no_sideways_scrolling(
    width: int, site: Any, open_page: Callable[..., webdriver.Chrome], verdict: Script, moment: Script, story: Script
) -> None:
    """On a phone's width nothing is cut off or overflows, even with long names and texts."""
    long = snapshot.TenantUse("t" * 64, 1, 0.1, 1.0, 1, 1, (("ok", 1),))
    site.publish(*story(340), moment(tenants=(long,), verdict=verdict("stalled", "r" * 60, "d" * 200)))
    driver = open_page(width=width)
    await_text(driver, "#tenants", "tttt")
    widths = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1] == width


def test_lost_connection_is_said_and_healed(
    site: Any, open_page: Callable[..., webdriver.Chrome], verdict: Script, moment: Script
) -> None:
    """Without data the page reports for how long and marks itself stale; it reconnects by itself."""
    site.publish(moment())
    driver = open_page()
    await_text(driver, "#state", "progressing")
    assert not driver.find_element(By.ID, "lost").is_displayed()
    site.end_streams()
    await_text(driver, "#lost", "No data for ")
    assert driver.find_element(By.ID, "lost").is_displayed()
    assert text_of(driver, "#link") == "connection lost"
    assert driver.title.startswith("no data")
    assert site.refused.wait(PATIENCE)
    fresh = live_page.PageFeed()
    fresh.publish(moment(605.0, verdict=verdict("quiet", "within_allowed", since=604.0)))
    site.feed = fresh
    await_text(driver, "#state", "quiet")
    await_text(driver, "#link", "live")
    assert not driver.find_element(By.ID, "lost").is_displayed()
