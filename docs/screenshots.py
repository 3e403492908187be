"""Takes the pictures of the live page for docs/live-page.md, in a real browser: PYTHONPATH=. python docs/screenshots.py

The page is the real one, with the scripted snapshots of its tests (tests/report/conftest.py). Needs chromium and
chromedriver. `make docs` does not take them again, as two browsers never draw the same bytes.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from sidecar.snapshot import Snapshot
from tests.report.conftest import Site, story, verdict

ASSETS: Final = Path(__file__).resolve().parent / "assets"
PATIENCE_S: Final = 30
QUALITY: Final = 60


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture: what happens, and who looks."""

    name: str
    past: Callable[[], Iterator[Snapshot]]
    state: str
    scheme: str
    width: int
    height: int


def healthy() -> Iterator[Snapshot]:
    """Ten minutes with a stall, its restart and recovery."""
    yield from story(600)


def stalled() -> Iterator[Snapshot]:
    """Half a minute after a stall was found."""
    yield from story(352)


def unknown() -> Iterator[Snapshot]:
    """The sidecar's own loop was late, so that it judges nothing."""
    past = list(story(300))
    yield from past
    for at, one in enumerate(story(330)):
        if at >= 300:
            found = verdict(
                "unknown", "own_lag", "The sidecar's own loop was 6 s late: its evidence proves nothing.", 300
            )
            passing = tuple((kind, True) for kind, _ in one.probes)
            yield replace(one, verdict=found, probes=passing, changes=(found, *past[-1].changes), own_lag=6.2)


SHOTS: Final = tuple(
    Shot(f"page-{past.__name__}-{look}", past, state, scheme, width, height)
    for past, state in ((healthy, "progressing"), (stalled, "stalled"), (unknown, "unknown"))
    for look, scheme, width, height in (
        ("light", "light", 1280, 1000),
        ("dark", "dark", 1280, 1000),
        ("phone", "light", 400, 1250),
    )
)


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "force-color-profile=srgb", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def take(driver: webdriver.Chrome, shot: Shot) -> bytes:
    """The picture as PNG."""
    media = {"features": [{"name": "prefers-color-scheme", "value": shot.scheme}]}
    size = {"width": shot.width, "height": shot.height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    site = Site()
    try:
        site.publish(*shot.past())
        driver.get(site.url)
        WebDriverWait(driver, PATIENCE_S, 0.05).until(
            lambda d: d.find_element(By.ID, "state").get_property("textContent") == shot.state
        )
        return driver.get_screenshot_as_png()
    finally:
        driver.get("about:blank")
        site.stop()


def main(folder: Path = ASSETS) -> int:
    """Write the pictures. Returns 0."""
    driver = browser()
    try:
        for shot in SHOTS:
            path = folder / f"{shot.name}.webp"
            Image.open(io.BytesIO(take(driver, shot))).convert("RGB").save(path, quality=QUALITY, method=6)
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
    finally:
        driver.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
