"""Images through the whole sidecar: the engine's input, /v1/preprocess, hostile bytes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image

from sidecar.client import Client, Preprocessed, PreprocessError
from sidecar.engines.image_loading import ENGINE_REASONS
from sidecar.images.shm_cache import FOLDER_PREFIX, SHARED_PREFIX
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine
from sidecar.tools.synthetic_photos import photo

from .. import seeing_engine
from ..seeing_engine import prompt_tokens
from ..waiting import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")

# small images, so that small photographs lose more than half of their pixels, and are prepared inline
CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 56 * 56,
    "max_pixels": 224 * 224,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224},
}


class Recorder:
    """An engine that records its requests."""

    def __init__(self, owner: str = "vllm") -> None:
        self.owner = owner
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.spans: list[Any] = []
        self.traced = asyncio.Event()
        self.processor = seeing_engine.processor(CONFIG)
        self.url = ""

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("max_tokens") != 1:  # the canary's
            self.bodies.append(body)
            self.headers.append(request.headers.copy())
        tokens = prompt_tokens(body, self.processor) if "image_url" in str(body) and body.get("max_tokens") == 1 else 9
        usage = {"prompt_tokens": tokens, "completion_tokens": 2}
        return web.json_response({"choices": [{"message": {"content": "ok"}}], "usage": usage})

    async def collect(self, request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        self.spans += [s for r in message.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.traced.set()
        return web.Response(body=b"", content_type="application/x-protobuf")

    async def span_of(self, trace_id: str, count: int) -> list[Any]:
        """The spans of a trace, once `count` of them have come."""
        while len(found := [s for s in self.spans if s.trace_id.hex() == trace_id]) < count:
            self.traced.clear()
            await self.traced.wait()
        return found

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "owned_by": self.owner}]})


@asynccontextmanager
async def recording(owner: str) -> AsyncIterator[Recorder]:
    """A Recorder that serves, and says that its models are `owner`'s."""
    recorder = Recorder(owner)
    app = web.Application(client_max_size=1 << 28)
    app.router.add_post("/v1/chat/completions", recorder.chat)
    app.router.add_post("/v1/completions", recorder.chat)
    app.router.add_get("/v1/models", recorder.models)
    app.router.add_get("/version", recorder.version)
    app.router.add_post("/v1/traces", recorder.collect)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    recorder.url = "http://{}:{}".format(*runner.addresses[0][:2])
    yield recorder
    await runner.cleanup()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recorder(requires: Any) -> AsyncIterator[Recorder]:
    requires("python:transformers")
    async with recording("vllm") as recorder:
        yield recorder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sidecar(recorder: Recorder, sidecars: Any, tmp_path_factory: Any, requires: Any) -> AsyncIterator[Any]:
    """One for all tests: its image workers load for a while. The engine is also its OTLP collector."""
    requires("python:simplejpeg")
    folder = tmp_path_factory.mktemp("images")
    (folder / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    async with sidecars(folder) as start:
        sidecar = await start(
            recorder.url,
            images="inline",
            model=str(folder),
            image_workers="1",
            canary_interval="60",
            otlp_endpoint=recorder.url,
            image_urls=recorder.url.removeprefix("http://"),
        )
        await sidecar.until_verdict("idle")
        await until_prepared(sidecar)
        yield sidecar


@pytest.fixture(autouse=True)
def fresh(recorder: Recorder) -> None:
    """Each test sees only its own requests."""
    recorder.bodies.clear()
    recorder.headers.clear()


def data_url(data: bytes, media: str = "image/jpeg") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def chat(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": "tiny",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, *parts]}],
    }


def processor(**more: Any) -> Any:
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(
        **{k: v for k, v in CONFIG.items() if k not in ("image_processor_type", "min_pixels", "max_pixels")}, **more
    )


async def ask(sidecar: Any, body: Any, **headers: str) -> tuple[int, Any, Any]:
    async with sidecar.session.post(sidecar.relay + "/v1/chat/completions", json=body, headers=headers) as answer:
        return answer.status, await answer.json(), answer.headers


async def until_prepared(sidecar: Any) -> None:
    """Send an image until one is prepared: workers load for a while, and the engine is looked at first."""
    body = chat(data_url(photo(400, 300, 99)))
    async with asyncio.timeout(PATIENCE):
        while 'sidecar_images_total{format="jpeg",outcome="ok"' not in (await sidecar.get("/metrics"))[1]:
            assert (await ask(sidecar, body))[0] == 200
            await asyncio.sleep(0.2)  # the workers load meanwhile, on the same cores


async def test_the_engine_sees_a_lossless_image_of_the_final_size(recorder: Recorder, sidecar: Any) -> None:
    """1080p JPEG in, an uncompressed image with the processor's own pixels out; content hash as uuid."""
    jpeg = photo(1920, 1080, 7)
    status, _, _ = await ask(sidecar, chat(data_url(jpeg)))
    assert status == 200
    (part,) = [p for p in recorder.bodies[0]["messages"][0]["content"] if p["type"] == "image_url"]
    media, _, payload = part["image_url"]["url"].partition(";base64,")
    assert media in ("data:image/bmp", "data:image/x-portable-pixmap") and part["uuid"]
    seen = Image.open(io.BytesIO(base64.b64decode(payload)))
    assert seen.size == (280, 168)
    theirs = processor()(Image.open(io.BytesIO(jpeg)).convert("RGB"), return_tensors="np")
    ours = processor()(seen.convert("RGB"), return_tensors="np")
    assert np.array_equal(theirs["pixel_values"], ours["pixel_values"])
    assert np.array_equal(theirs["image_grid_thw"], ours["image_grid_thw"])


async def test_a_link_into_the_pod_is_refused(recorder: Recorder, sidecar: Any) -> None:
    """Unlisted hosts, and listed ones at private addresses, are not fetched from; the engine gets no request."""
    for link, code in (
        (recorder.url + "/v1/models", "image_url_failed"),
        ("http://169.254.169.254/latest/meta-data", "image_url"),
    ):
        status, body, _ = await ask(sidecar, chat(link))
        assert (status, body["error"]["code"]) == (400, code)
        assert "messages[0].content[1]" in body["error"]["message"] and "127.0.0.1" not in body["error"]["message"]
        async with sidecar.session.post(sidecar.relay + "/v1/preprocess", json={"images": [link]}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, code)
    assert not recorder.bodies


async def test_an_image_is_counted_and_its_time_told_by_stage(recorder: Recorder, sidecar: Any) -> None:
    """The page and the metrics show the image work, and the image that would not have shrunk."""
    before = dict((await sidecar.until(lambda s: True))["images"]["outcomes"]).get("ok", 0)
    await ask(sidecar, chat(data_url(photo(640, 480, 1)), data_url(photo(320, 640, 2)), data_url(photo(200, 100, 3))))
    # an earlier test's image may be counted late
    snapshot = await sidecar.until(lambda s: dict(s["images"]["outcomes"]).get("ok", 0) >= before + 2)
    assert {stage for stage, _, _ in snapshot["images"]["stages"]} >= {"decode", "resize", "encode"}
    for outcome in ("ok", "passed"):
        await sidecar.until_metrics(f'sidecar_images_total{{format="jpeg",outcome="{outcome}"')


HOSTILE = {
    "broken": photo(640, 480, 1)[:9000],
    "too_many_pixels": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x01\xff\xff\x00\x01\xff\xff\x08\x02\x00\x00\x00",
    "unknown_format": b"this is no image",
}


@pytest.mark.parametrize("reason", HOSTILE)
async def test_broken_and_hostile_images_are_the_engines_to_refuse(
    recorder: Recorder, sidecar: Any, reason: str
) -> None:
    """The image reaches the engine as it came, counted with its reason, and the one next to it is prepared.

    `/v1/preprocess`, which has no engine to ask, answers 400 and names the image.
    """
    bad = data_url(HOSTILE[reason])
    status, body, _ = await ask(sidecar, chat(data_url(photo(480, 320, 3)), bad))
    assert status == 200, body
    urls = [part["image_url"]["url"] for part in recorder.bodies[-1]["messages"][0]["content"][1:]]
    assert urls[0].startswith("data:image/x-portable-pixmap") and urls[1] == bad
    await sidecar.until_metrics(f'outcome="passed",reason="{reason}"}}')
    async with sidecar.session.post(sidecar.relay + "/v1/preprocess", json={"images": [bad]}) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, f"image_{reason}") and "images[0]" in error["message"]


async def test_preprocess_returns_what_the_hugging_face_processor_returns(sidecar: Any) -> None:
    """pixel_values and image_grid_thw, in the order of the images, as safetensors."""
    from safetensors.numpy import load

    jpegs = [photo(640, 480, 1), photo(300, 900, 2)]
    body = {"images": [data_url(j) for j in jpegs]}
    for _ in range(100):
        async with sidecar.session.post(sidecar.relay + "/v1/preprocess", json=body) as answer:
            if answer.status != 503:
                assert answer.status == 200, await answer.text()
                got = load(await answer.read())
                break
    theirs = processor()([Image.open(io.BytesIO(j)).convert("RGB") for j in jpegs], return_tensors="np")
    assert np.array_equal(got["pixel_values"], theirs["pixel_values"])
    assert np.array_equal(got["image_grid_thw"], theirs["image_grid_thw"])


async def test_an_image_server_that_dies_is_replaced(recorder: Recorder, sidecar: Any) -> None:
    """kill -9 of the image server and its workers: no request fails until there is a new one; the others live on."""
    assert (await ask(sidecar, chat(data_url(photo(640, 480, 3)))))[0] == 200
    control = await sidecar.control()
    supervisor = psutil.Process(sidecar.process.pid)
    assert supervisor.num_threads() == 1  # it forks: nothing that it imports may start a thread
    (server,) = [p for p in supervisor.children() if "image-server" in p.cmdline()]
    server.kill()
    await asyncio.to_thread(psutil.wait_procs, [server], 30)
    async with asyncio.timeout(PATIENCE):
        prepared = False
        while not prepared:
            status, _, _ = await ask(sidecar, chat(data_url(photo(640, 480, 4))))
            assert status == 200
            url = recorder.bodies[-1]["messages"][0]["content"][1]["image_url"]["url"]
            prepared = url.startswith("data:image/x-portable-pixmap")
            await asyncio.sleep(0.2)
    assert await sidecar.control() == control
    assert (await sidecar.get("/livez"))[0] == 200


async def test_one_trace_spans_client_sidecar_and_engine(recorder: Recorder, sidecar: Any) -> None:
    """A server span under the caller's span, a child per image, and the engine gets our span as its parent."""
    trace_id, caller = "ab" * 16, "cd" * 8
    status, _, _ = await ask(sidecar, chat(data_url(photo(480, 320, 3))), traceparent=f"00-{trace_id}-{caller}-01")
    assert status == 200
    spans = await recorder.span_of(trace_id, 2)
    (server,) = [s for s in spans if s.parent_span_id.hex() == caller]
    assert server.kind == server.SPAN_KIND_SERVER and server.name.startswith("chat")
    assert {a.key: a.value.string_value for a in server.attributes}["sidecar.outcome"] == "ok"
    assert [s for s in spans if s.parent_span_id == server.span_id], "the image work is a child"
    assert recorder.headers[-1]["traceparent"] == f"00-{trace_id}-{server.span_id.hex()}-01"


async def test_an_image_of_an_earlier_turn_comes_from_the_cache(sidecar: Any, recorder: Recorder) -> None:
    """The same photograph twice, as in a long chat: the engine sees equal bytes, the workers work once."""

    async def cached() -> float:
        async with sidecar.session.get(sidecar.admin + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if "sidecar_images_total{" in line and '"cached"' in line)

    before, body = await cached(), chat(data_url(photo(700, 500, seed=77)))
    for _ in range(2):
        status, _, _ = await ask(sidecar, body)
        assert status == 200
    first, second = (body["messages"][0]["content"] for body in recorder.bodies)
    assert first == second
    async with asyncio.timeout(PATIENCE):
        while (
            await cached() == before
        ):  # facts reach the page within a second; the first result may still be on its way
            await ask(sidecar, body)


async def test_an_engine_that_reads_no_pnm_is_served_as_it_came(
    sidecars: Any, tmp_path: Path, requires: Callable[[str], Path]
) -> None:
    """It refuses the first image, which the client never sees; then images pass, until it is another process."""
    requires("python:simplejpeg")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    async with (
        ScriptedEngine(EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=1.0)) as engine,
        sidecars(tmp_path) as start,
    ):
        engine.faults.start("no_pnm")
        sidecar = await start(engine.url, images="inline", model=str(tmp_path), image_workers="1", kill_interval="0")
        body = chat(data_url(photo(640, 480, 3))) | {"model": "scripted"}
        async with asyncio.timeout(PATIENCE):
            while not any("prepared image" in line for line in sidecar.log):
                assert (await ask(sidecar, body))[0] == 200
                await asyncio.sleep(0.2)
        assert (await ask(sidecar, body))[0] == 200
        await sidecar.until_metrics('sidecar_images_total{format="jpeg",outcome="passed",reason="refused"}')
        said = [line for line in sidecar.log if "prepared image" in line]
        assert len(said) == 1 and "answered 500" in said[0]
        engine.faults.clear()
        engine.faults.start("refuse", seconds=1.0)
        await sidecar.until_changed("starting")
        await sidecar.until_verdict("idle")
        async with asyncio.timeout(PATIENCE):
            while not any("gets prepared images again" in line for line in sidecar.log):
                await ask(sidecar, body)
        assert (await ask(sidecar, body | {"max_tokens": 9}))[0] == 200
        assert sum("prepared image to" in line or "answered 500" in line for line in sidecar.log) == 1


async def test_an_engine_that_says_that_it_reads_no_pnm_gets_none(
    sidecars: Any, tmp_path: Path, requires: Callable[[str], Path]
) -> None:
    """With vLLM's Rust front end the engine gets the client's bytes once it has said what it is."""
    requires("python:simplejpeg")
    requires("python:transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    async with recording("vllm-frontend-rs") as recorder, sidecars(tmp_path) as start:
        sidecar = await start(recorder.url, images="inline", model=str(tmp_path), image_workers="1", engine_kind="vllm")
        body = chat(data_url(photo(640, 480, 3)))
        async with asyncio.timeout(PATIENCE):
            while not recorder.bodies or recorder.bodies[-1] != body:
                assert (await ask(sidecar, body))[0] == 200
        assert any(ENGINE_REASONS["rust_front_end"] in line for line in sidecar.log)


@pytest.mark.parametrize("shm", [False, True], ids=["body", "shm"])
async def test_the_client_gives_what_the_hugging_face_processor_gives(sidecar: Any, tmp_path: Path, shm: bool) -> None:
    """Bytes and paths in; the processor's tensors out, as floats and as bytes; no file is left."""
    jpegs = [photo(640, 480, 31), photo(300, 900, 32)]
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    images = [Image.open(io.BytesIO(j)).convert("RGB") for j in jpegs]
    async with Client(sidecar.relay) as client:
        for values, kind in (("", "float32"), ("uint8", "uint8")):
            made = await patiently(
                lambda v=values: client.preprocess([tmp_path / "a.jpg", jpegs[1]], values=v, shm=shm)
            )
            theirs = processor(do_rescale=not values, do_normalize=not values)(images, return_tensors="np")
            assert (
                set(made.tensors) == {"pixel_values", "image_grid_thw"} and made.tensors["pixel_values"].dtype == kind
            )
            assert all(np.array_equal(made.tensors[name], theirs[name]) for name in made.tensors)
            assert [i.grid_thw for i in made.images] == [tuple(g) for g in theirs["image_grid_thw"]]
            assert [i.tokens for i in made.images] == [g.prod() // 4 for g in theirs["image_grid_thw"]]
        with pytest.raises(PreprocessError, match=r"images\[0\]") as caught:
            await client.preprocess([b"nothing"], shm=shm)
    assert (caught.value.status, caught.value.code) == (400, "image_unknown_format")
    assert handed_over(sidecar) == []


def handed_over(sidecar: Any) -> list[str]:
    """Files waiting for a reader in this sidecar's shared memory, whose lock its supervisor holds."""
    opened = [fd.readlink() for fd in Path(f"/proc/{sidecar.process.pid}/fd").iterdir()]
    (folder,) = {path.parent for path in opened if path.parent.name.startswith(FOLDER_PREFIX)}
    return [p.name for p in folder.glob(f"{SHARED_PREFIX}*")]


async def patiently(ask: Callable[[], Any]) -> Preprocessed:
    """The image workers load for a while; until then the answer is 503."""
    for _ in range(100):
        try:
            return await ask()
        except PreprocessError as e:
            if e.status != 503:
                raise
            await asyncio.sleep(min(e.retry_after or 0.1, 0.2))
    raise AssertionError("images never became ready")
