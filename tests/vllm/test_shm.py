"""Through shared memory and the plugin, a real vLLM sees the same pixels and gives the same answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.images.shm_cache import FOLDER_PREFIX, SHARED_PREFIX, SHM_DIR
from sidecar.images.vllm_plugin import MARK_PREFIX, read_status
from sidecar.settings import Settings
from sidecar.tools.doctor import engine as doctor
from sidecar.tools.doctor.finding import DoctorFinding

from . import client, processes
from .client import Http
from .processes import Engine, Sidecar
from .test_images import BODIES, LOSSLESS, PATH, formats, recording, sidecar_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

NAMES = ("1080p", "EXIF 6", "small, enlarged", "alpha", "two", "1080p")


SHM = Path(SHM_DIR)


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    """Two vLLMs that share /dev/shm count as one, so another one with the plugin would hide this one."""
    if not read_status(SHM_DIR).why:
        pytest.skip(f"a vLLM with the plugin uses {SHM_DIR} on this machine")


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A vLLM with the plugin, which lies in a folder of its own: the shared environment stays as it is."""
    site = tmp_path_factory.mktemp("site")
    environ = processes.with_plugin(site)
    with processes.engine(model("small"), site / "engine.log", environ=environ) as running:
        yield running


def waiting() -> set[Path]:
    """Files that wait for a reader, of any sidecar."""
    return set(SHM.glob(f"{FOLDER_PREFIX}*/{SHARED_PREFIX}*"))


async def found(engine: Engine) -> DoctorFinding:
    """What `sidecar doctor` says of the hand-over."""
    return (await doctor.check(Settings(engine=engine.url, images="shm")))["images-shm"]


async def test_a_vllm_without_the_plugin_gets_its_images_inline(
    model: Any, start_sidecar: Callable[..., Sidecar], http: Http, tmp_path: Path
) -> None:
    """With only the unlocked mark of an earlier vLLM, images go inline with vLLM's own answer, logged once."""
    mark = {"form": 1, "version": "0.1.0", "pid": 1, "user": 0, "reads_all": True, "connector": "inference_sidecar"}
    left = SHM / f"{MARK_PREFIX}test"  # the plugin names it by a user's number
    left.write_text(json.dumps(mark))
    bodies = [BODIES[name] for name in ("1080p", "two")]
    try:
        with processes.engine(model("small"), tmp_path / "engine.log") as bare:
            without = [await client.ask(http, bare.url + PATH, body) for body in bodies]
            async with recording(bare.url, http) as (url, recorder):
                sidecar = await sidecar_for(start_sidecar, url, bare.model, http, images="shm")
                through = [await client.ask(http, sidecar.url + PATH, body) for body in bodies]
            finding = await found(bare)
    finally:
        left.unlink()
    assert through == without
    seen = [kind for body in recorder.bodies for kind in formats(body)]
    assert len(seen) == 3 and all(kind in LOSSLESS for kind in seen)
    said = [line for line in (sidecar.state.parent / "sidecar.log").read_text().splitlines() if "go inline" in line]
    assert len(said) == 1 and finding.level == "warn" and "go inline" in finding.what and finding.remedy in said[0]


async def test_pixels_in_shared_memory_give_the_same_answer(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http
) -> None:
    """Text, log-probabilities and usage are the same to the last bit; nothing is left behind; a repeated image, too.

    One with transparent parts passes as it came.
    """
    bodies, before = [BODIES[name] for name in NAMES], waiting()
    without = [await client.ask(http, engine.url + PATH, body) for body in bodies]
    async with recording(engine.url, http) as (url, recorder):
        sidecar = await sidecar_for(start_sidecar, url, engine.model, http, images="shm")
        through = [await client.ask(http, sidecar.url + PATH, body) for body in bodies]
    assert through == without
    seen = [kind for body in recorder.bodies for kind in formats(body)]
    assert len(seen) == 7 and sum(kind.startswith("sidecar-shm://") for kind in seen) == 6
    assert formats(recorder.bodies[NAMES.index("alpha")]) == ["data:image/png"]
    assert waiting() <= before
    assert (await found(engine)).level == "ok"


async def test_a_name_that_is_not_there_is_the_clients_error(engine: Engine, http: Http) -> None:
    """What a client makes up is answered with 4xx, and the engine goes on."""
    url = "sidecar-shm://sidecar-images-x/out-" + "0" * 32 + "?h=28&w=28&o=0"
    part = {"type": "image_url", "image_url": {"url": url}}
    body = client.completion(max_tokens=1) | {"messages": [{"role": "user", "content": [part]}]}
    async with http.post(engine.url + PATH, json=body) as answer:
        assert 400 <= answer.status < 500, await answer.text()
    good = {"role": "user", "content": "hello"}
    async with http.post(engine.url + PATH, json=client.completion(max_tokens=1) | {"messages": [good]}) as answer:
        assert answer.status == 200
