"""Finished tensors: a real vLLM, loaded with the plug-in from the state directory, computes with the sidecar's arrays.

The plug-in comes by PYTHONPATH alone: nothing is installed into vLLM's environment, no other variable is set. What the
tower gets, and what the model answers, must equal what the same vLLM makes of the same requests by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.images.engine_tensors import PARAMETER
from sidecar.images.shm_cache import FOLDER_PREFIX, SHARED_PREFIX, SHM_DIR
from sidecar.images.vllm_plugin import NO_OFFER, read_offer, read_status
from sidecar.kernels import families
from sidecar.launch import engine_plugin
from sidecar.settings import Settings
from sidecar.tools.doctor import engine as doctor
from sidecar.tools.synthetic_photos import photo

from . import client, processes, tensor_files
from .client import Http
from .processes import Engine, Sidecar
from .test_images import BODIES, PATH, Recorder, chat, prepared_images, recording

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SHM = Path(SHM_DIR)
# Every kind of file: both orientations, alpha, grey, one that is enlarged, several in a request, and again.
NAMES = ("720p", "12 MP", "EXIF 6", "EXIF 7", "small, enlarged", "long", "grey", "PNG", "WebP", "alpha", "two", "720p")
PIXELS = Path(__file__).with_name("tensors.py")


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    """Two vLLMs that share /dev/shm count as one, so another one with the plugin would hide this one."""
    if not read_status(SHM_DIR).why:
        pytest.skip(f"a vLLM with the plugin uses {SHM_DIR} on this machine")


def site(folder: Path) -> dict[str, str]:
    """The plug-in as `sidecar run` writes it, and the engine's one variable."""
    return {"PYTHONPATH": engine_plugin.write(str(folder))}


@pytest.fixture(scope="module", params=["vision", "small", "qwen3"])
def engine(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("state")
    with processes.engine(model(request.param), folder / "engine.log", environ=site(folder)) as running:
        yield running


def waiting() -> set[Path]:
    """Files that wait for a reader, of any sidecar."""
    return set(SHM.glob(f"{FOLDER_PREFIX}*/{SHARED_PREFIX}*"))


def urls(body: dict[str, Any]) -> list[str]:
    return [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]


def _spec(engine: Engine) -> Any:
    return families.from_dir(str(engine.model))


async def prepares(
    start_sidecar: Callable[..., Sidecar], recorder: Recorder, url: str, model: Path, http: Http
) -> Sidecar:
    """A sidecar that has prepared an image: its workers do, and the engine has shown its image sizes."""
    sidecar = start_sidecar(url, model=str(model), images="auto")
    body = chat(photo(1280, 720, 99)) | {"max_tokens": 1}

    async def has_prepared() -> bool:
        await client.ask(http, sidecar.url + PATH, body)
        return await prepared_images(sidecar, http) > 0

    await client.until(has_prepared, "image workers and the engine's image sizes", 120)
    recorder.bodies.clear()
    return sidecar


# The first two have engines of their own, and come before the others' is started.


async def test_an_engine_with_other_sizes_gets_its_images_as_they_came(
    model: Any, start_sidecar: Callable[..., Sidecar], http: Http, tmp_path: Path
) -> None:
    """Pixels in the size of the model's files would be resized once more: all passes, and the reason is counted."""
    kwargs = json.dumps({"size": {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}})
    log, environ, body = tmp_path / "engine.log", site(tmp_path), BODIES["PNG"]
    with processes.engine(model("small"), log, environ=environ, more=("--mm-processor-kwargs", kwargs)) as other:
        without = await client.ask(http, other.url + PATH, body)
        assert read_offer(SHM_DIR, _spec(other)).differs
        async with recording(other.url, http) as (url, recorder):
            sidecar = start_sidecar(url, model=str(other.model), images="auto")

            async def differs() -> float:
                assert await client.ask(http, sidecar.url + PATH, body) == without
                page, of = f"{sidecar.admin}/metrics", {"outcome": "passed", "reason": "size_differs"}
                return await client.sample(http, page, "sidecar_images_total", **of)

            await client.until(differs, "an image that passes for its engine's sizes", 120)
    chats = [body for body in recorder.bodies if any(part.startswith("data:image/png") for part in urls(body))]
    assert chats and all(urls(seen) == urls(body) for seen in chats)


async def test_an_unknown_version_is_left_as_it_is(
    model: Any, start_sidecar: Callable[..., Sidecar], http: Http, tmp_path: Path
) -> None:
    """A vLLM of another version serves as without the plug-in, says so once, and offers nothing."""
    environ = site(tmp_path)
    source = tmp_path / engine_plugin.FOLDER / "sidecar_vllm/tensors.py"
    source.write_text(source.read_text().replace('KNOWN_VERSIONS = ("0.32.",)', 'KNOWN_VERSIONS = ("0.0.",)'))
    log = tmp_path / "engine.log"
    with processes.engine(model("small"), log, environ=environ) as other:
        async with recording(other.url, http) as (url, recorder):
            sidecar = await prepares(start_sidecar, recorder, url, other.model, http)
            through = await client.ask(http, sidecar.url + PATH, BODIES["PNG"])
        assert through == await client.ask(http, other.url + PATH, BODIES["PNG"])
        assert read_offer(SHM_DIR, _spec(other)).why == NO_OFFER.why
    assert not any(PARAMETER in url for body in recorder.bodies for url in urls(body))
    assert log.read_text().count("is not known to this plug-in") == 1


async def test_equal_answers(engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http) -> None:
    """Text, log-probabilities and usage are the same to the last bit; vLLM unlinks each file; a repeat names none."""
    bodies, before = [BODIES[name] for name in NAMES], waiting()
    without = [await client.ask(http, engine.url + PATH, body) for body in bodies]
    async with recording(engine.url, http) as (url, recorder):
        sidecar = await prepares(start_sidecar, recorder, url, engine.model, http)
        through = [await client.ask(http, sidecar.url + PATH, body) for body in bodies]
    assert through == without
    sent = [url for body in recorder.bodies for url in urls(body)]
    originals = [url for body in bodies for url in urls(body)]
    named = [index for index, url in enumerate(sent) if f";{PARAMETER}=1." in url[:200]]
    assert len(sent) == len(originals) == len(NAMES) + 1
    assert all(sent[i].partition(",")[2] == originals[i].partition(",")[2] for i in named), "the original goes along"
    if "vision" in str(engine.model):  # others shrink to so little that another way may cost less
        assert len(named) > 2 and ".0.0." not in sent[named[0]][:200]
        assert ".0.0." in sent[-1][:200], "it was sent before"
    assert waiting() <= before
    text = (sidecar.state.parent / "sidecar.log").read_text()
    assert text.count("finished tensors go through") == 1 and "not used" not in text
    finding = (await doctor.check(Settings(engine=engine.url, images="auto", model=str(engine.model))))["images-shm"]
    assert finding.level == "ok" and "tensors" in finding.what


async def test_a_lost_or_wrong_file_is_the_processors_work(engine: Engine, http: Http) -> None:
    """No file, a short one, a link, a pipe, another dtype, another grid: vLLM's own answer, by its own processor."""
    body = BODIES["odd"]
    without = await client.ask(http, engine.url + PATH, body)
    spec = families.from_dir(str(engine.model))
    assert spec is not None
    offer, geometry = read_offer(SHM_DIR, spec), spec.geometry(337, 613)
    assert not offer.why
    folder = SHM / f"{FOLDER_PREFIX}test_{os.getpid()}"
    folder.mkdir(mode=0o700)
    name, (height, width) = f"{SHARED_PREFIX}{'0' * 32}", (geometry.grid_h, geometry.grid_w)
    file, size = folder / name, 3 * 2 * spec.patch_size**2 * height * width  # type: ignore[attr-defined]
    target = folder / "target"
    target.write_bytes(bytes(size))

    def cases() -> Iterator[tuple[str, str]]:
        good = f"337.613.{height}.{width}.{offer.dtype}"
        yield "no file", good
        file.write_bytes(bytes(size - 1))
        yield "short", good
        file.write_bytes(bytes(size))
        yield "dtype", good.replace(offer.dtype, "F16")
        file.write_bytes(bytes(size))
        yield "grid", f"337.613.{width}.{height}.{offer.dtype}"
        file.write_bytes(bytes(size))
        yield "another size", f"613.337.{height}.{width}.{offer.dtype}"
        file.symlink_to(target)
        yield "a link", good

    try:
        for case, numbers in cases():
            changed = json.loads(json.dumps(body))
            for part in changed["messages"][0]["content"]:
                if part["type"] == "image_url":
                    url = part["image_url"]["url"]
                    named = f";{PARAMETER}=1.{folder.name}.{name}.{numbers};base64,"
                    part["image_url"]["url"] = url.replace(";base64,", named, 1)
            assert await client.ask(http, engine.url + PATH, changed) == without, case
            file.unlink(missing_ok=True)
        assert target.stat().st_size == size, "a link is not followed"
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


async def test_a_request_with_its_own_processing_is_left_alone(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http
) -> None:
    """Other sizes of one request, in its own words: the same answer as without the sidecar, and no tensors."""
    own = {"mm_processor_kwargs": {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}}
    async with recording(engine.url, http) as (url, recorder):
        sidecar = await prepares(start_sidecar, recorder, url, engine.model, http)
        body = BODIES["720p"] | own
        assert await client.ask(http, sidecar.url + PATH, body) == await client.ask(http, engine.url + PATH, body)
    assert not any(PARAMETER in url for body in recorder.bodies for url in urls(body))


@pytest.mark.parametrize("kind", ["small", "qwen3"])
@pytest.mark.parametrize("flags", ["", "floats", "half"])
def test_equal_tensors(vllm_python: Path, model: Any, tmp_path: Path, kind: str, flags: str) -> None:
    """What reaches the tower has the bytes, shapes and dtypes of vLLM's own processor: as bytes, floats and halves."""
    env = os.environ | processes.ENGINE_ENV | site(tmp_path)
    with tensor_files.written(model(kind), tmp_path, flags) as cases:
        run = [str(vllm_python), str(PIXELS), str(model(kind)), flags, str(cases)]
        done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (own, taken, calls) in json.loads(done.stdout.splitlines()[-1]).items():
        assert taken == own, name
        assert calls == 0, f"{name}: vLLM's processor ran"
