"""`sidecar doctor`: its findings on a sound installation and on broken ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar import __main__
from sidecar.engines import registry
from sidecar.engines.image_loading import ImageModel
from sidecar.load import body_scan
from sidecar.settings import Settings
from sidecar.tools.doctor import engine as engine_checks
from sidecar.tools.doctor import machine
from sidecar.tools.doctor.finding import DoctorFinding
from sidecar.tools.doctor.report import CHECKS, examine, text
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..cuda_stub.build import build as build_cuda
from ..engines.engine_faces import OnDemand, Shown, models, said, shown
from ..images.published import settings
from ..nvml_stub.build import build as build_nvml
from ..seeing_engine import processor, prompt_tokens
from ..waiting import PATIENCE

TOKEN = 'data: {"choices": [{"delta": {"content": "1"}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
PROCESSOR = settings("Qwen2VLImageProcessor")


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedEngine]:
    async with ScriptedEngine(EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=1.0)) as engine:
        yield engine


async def of_engine(url: str, **chosen: Any) -> dict[str, DoctorFinding]:
    return await engine_checks.check(Settings(engine=url, **chosen))


async def serve(stack: list[web.AppRunner], **answers: tuple[int, str]) -> str:
    """A server with fixed responses: path (`_` for slashes) -> (status, body). Returns its URL."""
    app = web.Application()

    def fixed(status: int, body: str) -> Any:
        async def handle(_: web.Request) -> web.Response:
            return web.Response(status=status, text=body)

        return handle

    for path, (status, body) in answers.items():
        app.router.add_route("*", "/" + path.replace("_", "/"), fixed(status, body))
    runner = web.AppRunner(app)
    await runner.setup()
    stack.append(runner)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
async def servers() -> AsyncIterator[list[web.AppRunner]]:
    stack: list[web.AppRunner] = []
    yield stack
    for runner in stack:
        await runner.cleanup()


HF = ImageModel("hf", "Qwen2VLForConditionalGeneration", "Qwen2VLImageProcessor")


@pytest.mark.parametrize(
    ("chosen", "kind", "page", "model", "level", "words"),
    [
        ("auto", "vllm", {"version": "0.33.0"}, HF, "ok", "vllm >=0.24,<0.34, tokenizer hf"),
        ("auto", "vllm", {"version": "0.33.0", "rust_frontend_version": "0.33.0"}, HF, "warn", "Rust front end"),
        ("auto", "vllm", {"version": "0.23.0"}, HF, "absent", "<0.24"),
        ("inline", "vllm", {"version": "0.23.0"}, HF, "warn", "<0.24"),
        ("auto", "vllm", {"version": "0.32.0"}, ImageModel("mistral"), "absent", "Mistral's tokenizer"),
        ("auto", "sglang", {"version": "0.5.23"}, HF, "absent", "sglang"),
        ("auto", "openai", {}, HF, "absent", "not known"),
        ("off", "vllm", {"version": "0.33.0", "rust_frontend_version": "0.33.0"}, HF, "absent", "--images off"),
    ],
    ids=str,
)
def test_whether_the_engine_gets_prepared_images_is_said(
    chosen: str, kind: str, page: dict[str, str], model: ImageModel, level: str, words: str, tmp_path: Path
) -> None:
    """The row that decides is shown, with why images pass; what can be mended is said."""
    identity = registry.identity({"/version": json.dumps(page).encode()})
    found, needs_canary = engine_checks.prepared(Settings(images=chosen, model=str(tmp_path)), kind, identity, model)
    assert found.level == level and words in found.what
    assert needs_canary is (level == "ok")
    assert bool(found.remedy) == ("rust_frontend_version" in page and chosen != "off")


@pytest.mark.parametrize(("largest", "level"), [(448 * 448, "ok"), (224 * 224, "warn")])
async def test_image_sizes_that_differ_are_found(
    largest: int, level: str, tmp_path: Path, requires: Callable[[str], Path]
) -> None:
    """The engine is sent the image canary; where its sizes are others than the files', the remedy is said."""
    requires("python:transformers")
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 448 * 448},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    sees = processor(config | {"size": {"shortest_edge": 3136, "longest_edge": largest}})

    async def chat(request: web.Request) -> web.StreamResponse:
        tokens = prompt_tokens(await request.json(), sees)
        return web.json_response({"choices": [{}], "usage": {"prompt_tokens": tokens}})

    answers = {"/v1/models": models("vllm"), "/version": said(version="0.32.0")}
    async with Shown(answers, handlers={"/v1/chat/completions": chat}) as engine:
        found = (await engine_checks.check(Settings(engine=engine.url, model=str(tmp_path))))["images-engine"]
    assert found.level == level and bool(found.remedy) == (level == "warn")


async def test_a_whole_world_has_nothing_to_mend(engine: ScriptedEngine, tmp_path: Path) -> None:
    """With a serving engine, a writable directory and free ports, no finding is a `fail`."""
    any_port = ("127.0.0.1", 0)
    chosen = Settings(engine=engine.url, state_dir=str(tmp_path / "state"), listen=any_port, admin=any_port)
    findings = await examine(chosen)
    assert [f for f in findings.values() if f.level == "fail"] == []
    assert set(findings) == {
        "engine",
        "engine-kind",
        "engine-metrics",
        "canary",
        "engine-rest",
        "images-shm",
        "images-engine",
        "engine-threads",
        *CHECKS,
    }
    assert not (tmp_path / "state").exists(), "a check leaves nothing behind"


async def test_the_engine_is_recognised_and_serves(engine: ScriptedEngine) -> None:
    """Kind, metrics and canary of a serving engine are ok, and its model is named."""
    found = await of_engine(engine.url)
    assert {found[n].level for n in ("engine", "engine-kind", "engine-metrics", "canary")} == {"ok"}
    assert "scripted" in found["engine"].what and found["engine-kind"].what == "scripted"


async def test_an_engine_that_is_not_there_is_one_failure(unused_tcp_port: int) -> None:
    """Without a connection there is one finding with a remedy, and no further request."""
    found = await of_engine(f"http://127.0.0.1:{unused_tcp_port}")
    assert list(found) == ["engine"] and found["engine"].level == "fail" and found["engine"].remedy


@pytest.mark.parametrize(
    ("fault", "name", "level"),
    [
        ("error_500", "canary", "fail"),
        ("garbage_metrics", "engine-metrics", "warn"),
        ("no_metrics", "engine-metrics", "warn"),
    ],
)
async def test_a_broken_engine_is_named(engine: ScriptedEngine, fault: str, name: str, level: str) -> None:
    """What is broken gets the finding, with a remedy; the rest stays ok."""
    engine.faults.start(fault)
    found = await of_engine(engine.url, engine_kind="scripted")
    assert (found[name].level, found["engine"].level) == (level, "ok") and found[name].remedy


async def test_a_frozen_engine_fails_the_canary(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that answers HTTP and serves no token is found."""
    monkeypatch.setattr(engine_checks, "TOKEN_TIMEOUT_S", 0.3)
    engine.faults.start("freeze")
    found = await of_engine(engine.url)
    assert found["canary"].level == "fail" and "starved" in found["canary"].what


@pytest.mark.parametrize(("status", "level", "words"), [(401, "fail", "--engine-key"), (404, "warn", "--canary-model")])
async def test_refusals_say_what_to_do(servers: list[web.AppRunner], status: int, level: str, words: str) -> None:
    """For a missing key or list of models, the remedy names the flag."""
    found = await of_engine(await serve(servers, v1_models=(status, "")))
    assert found["engine"].level == level and words in found["engine"].remedy


async def test_an_unknown_engine_is_taken_as_openai(servers: list[web.AppRunner]) -> None:
    """An unrecognised server gets a warning, and its metrics are not missed."""
    models = json.dumps({"data": [{"id": "m"}]})
    answers = {"v1_models": (200, models), "v1_chat_completions": (200, TOKEN)}
    found = await of_engine(await serve(servers, **answers))
    assert (found["engine-kind"].level, found["engine-metrics"].level) == ("warn", "absent")
    assert found["canary"].level == "ok"


async def test_a_page_for_each_model_is_no_fault(servers: list[web.AppRunner]) -> None:
    """A router that has no page of its own was started with its metrics on."""
    listed = json.dumps({"data": [{"id": "m", "owned_by": "llamacpp"}]})
    found = await of_engine(await serve(servers, v1_models=(200, listed), metrics=(400, "model name is missing")))
    assert found["engine-metrics"].level == "absent" and "each model has its own" in found["engine-metrics"].what


@pytest.mark.parametrize(("says", "words"), [(True, "no model is loaded"), (False, "several models and none known")])
async def test_no_model_is_loaded_by_looking(says: bool, words: str) -> None:
    """Of a server that loads on demand nothing is asked that it would load a model for, and the report says so."""
    server = OnDemand("a", "b", says=says)
    async with server.shown() as face:
        found = await of_engine(face.url)
    assert server.loads == []
    assert found["engine"].what == "serves a, b"
    assert found["canary"].level == "warn" and words in found["canary"].what


async def test_an_engine_that_takes_no_canary_is_said(servers: list[web.AppRunner]) -> None:
    """A server that refuses each form gets a warning that names what it refused."""
    found = await of_engine(await serve(servers, v1_models=(200, '{"data": [{"id": "m"}]}')))
    assert found["canary"].level == "warn" and "no canary passes here: HTTP 404" in found["canary"].what


@pytest.mark.parametrize("name", ["tei", "ollama"])
async def test_engines_without_openai_routes_are_whole(name: str) -> None:
    """Text Embeddings Inference has no list of models and Ollama no metrics: neither is a fault."""
    async with shown(name) as engine:
        found = await of_engine(engine.url)
        assert (found["engine-kind"].what, found["canary"].level, found["engine"].level) == (name, "ok", "ok")
        assert found["engine-metrics"].level == ("ok" if name == "tei" else "absent")


async def test_an_unloaded_model_is_no_fault() -> None:
    """Ollama with nothing loaded gets no canary, and the report says what would."""
    async with shown("ollama") as engine:
        engine.answers["/api/ps"] = (200, '{"models": []}')
        found = await of_engine(engine.url)
    assert found["canary"].level == "warn" and "no model is loaded" in found["canary"].what
    assert "load a model" in found["canary"].remedy


async def test_the_model_that_is_loaded_answers_the_canary() -> None:
    """It stays loaded, whatever stands before it in the list."""
    server = OnDemand("a", "b", says=True, loaded="b")
    async with server.shown() as face:
        found = await of_engine(face.url)
    assert (server.loads, found["canary"].level) == ([], "ok")


async def test_what_tells_a_rest_is_named(engine: ScriptedEngine, servers: list[web.AppRunner]) -> None:
    """Sources of sleep and pause are listed; without one, the remedy says what to do."""
    assert "/is_sleeping" in (await of_engine(engine.url))["engine-rest"].what
    unknown = await serve(servers, v1_models=(200, json.dumps({"data": [{"id": "m"}]})))
    found = (await of_engine(unknown))["engine-rest"]
    assert found.level == "absent" and "relay" in found.what


async def test_a_wrong_engine_kind_is_noticed(engine: ScriptedEngine) -> None:
    """A configured kind that differs from the recognised one is a warning that names both."""
    found = await of_engine(engine.url, engine_kind="tgi")
    assert found["engine-kind"].level == "warn" and "tgi" in found["engine-kind"].what


@pytest.mark.parametrize(("wanted", "level"), [(None, "warn"), ("4096", "warn"), ("1", "ok")])
def test_the_engines_threads(wanted: str | None, level: str) -> None:
    """OMP_NUM_THREADS of the process on the engine's port is compared with the usable CPUs."""
    import subprocess

    code = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
        "sys.stdin.read()"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | (
        {"OMP_NUM_THREADS": wanted} if wanted else {}
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout and child.stdin
        found = engine_checks.threads(f"http://127.0.0.1:{int(child.stdout.readline())}", "vllm")
        child.stdin.close()
        child.wait(PATIENCE)
    assert found.level == level


def test_an_engine_elsewhere_has_no_threads_to_see(unused_tcp_port: int) -> None:
    """A process that is not on this machine is absent, not wrong."""
    assert engine_checks.threads(f"http://127.0.0.1:{unused_tcp_port}", "vllm").level == "absent"
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert engine_checks.threads(f"http://192.0.2.1:{other.getsockname()[1]}", "vllm").level == "absent"


def test_a_directory_that_cannot_be_is_a_failure(tmp_path: Path) -> None:
    """A state directory below a file cannot be made; the line says what to mount."""
    (tmp_path / "file").touch()
    found = machine.state_dir(Settings(state_dir=str(tmp_path / "file" / "state")))
    assert found.level == "fail" and "emptyDir" in found.remedy


def test_a_taken_port_is_a_failure() -> None:
    """The port that is taken is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        found = machine.ports(Settings(listen=("127.0.0.1", 0), admin=address))
        reports = machine.ports(Settings(listen=("127.0.0.1", 0), admin=("127.0.0.1", 0), orca_grpc=address))
    assert found.level == "fail" and str(address[1]) in found.what
    assert reports.level == "fail" and "--orca-grpc" in reports.what


@pytest.mark.parametrize(
    ("content", "level"),
    [
        ('{"a": 0.1, "d": 0.2, "fingerprint": "x"}', "ok"),
        ('{"version": 3, "a": 0.1, "no_capacity": "the rate still rose; give --seconds 600"}', "warn"),
        ("{", "fail"),
        ('{"zz": 1}', "fail"),
    ],
)
def test_a_coefficients_file_is_read(tmp_path: Path, content: str, level: str) -> None:
    """A good file is ok; one without a capacity is a warning; a broken one fails, as it would fail the start."""
    file = tmp_path / "c.json"
    file.write_text(content)
    assert machine.coefficients(Settings(coefficients=str(file))).level == level


@pytest.mark.parametrize(
    ("content", "level"), [("[tenants.acme]\nmu_in_flight = 3", "ok"), ("[tenants.acme]\nmu = 3", "fail")]
)
def test_a_file_of_limits_is_read(tmp_path: Path, content: str, level: str) -> None:
    """A good file is ok, a wrong one fails as it would fail the start, and none is absent."""
    file = tmp_path / "limits.toml"
    file.write_text(content)
    assert CHECKS["tenant-limits"](Settings(tenant_limits=str(file))).level == level
    assert machine.limits(Settings()).level == "absent"


def test_a_missing_scanner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled module long bodies are not read, which is a warning with its remedy."""
    assert machine.bodies(Settings()).level == "ok"
    monkeypatch.setattr(body_scan, "_fused", None)
    found = machine.bodies(Settings())
    assert found.level == "warn" and "8 KiB" in found.what and "compiler" in found.remedy


def test_default_coefficients_are_a_warning() -> None:
    """The roofline of another model is a warning."""
    assert machine.coefficients(Settings()).level == "warn"


def model_dir(path: Path, config: dict[str, Any]) -> str:
    (path / "preprocessor_config.json").write_text(json.dumps(config))
    return str(path)


def test_a_known_and_an_unknown_processor(tmp_path: Path) -> None:
    """A known image processor is ok, another one is passed through with a warning, none at all is absent."""
    known = Settings(model=model_dir(tmp_path, PROCESSOR))
    assert machine.model(known).level == "ok"
    assert machine.model(Settings(model=model_dir(tmp_path, {"image_processor_type": "Other"}))).level == "warn"
    assert machine.model(Settings()).level == "absent"


@pytest.mark.parametrize(
    ("config", "level", "why"),
    [
        ({"image_processor_type": "Other"}, "warn", "Other is not one of the known"),
        (settings("LlavaNextImageProcessor", do_pad=False), "warn", "do_pad is not True"),
        (settings("Gemma4ImageProcessor"), "ok", "/v1/preprocess"),
        (
            settings("SiglipImageProcessor", auto_map={"AutoImageProcessor": "x.SiglipImageProcessor"}),
            "warn",
            "(auto_map)",
        ),
        (settings("SiglipImageProcessor", max_tiles=12), "warn", "has no setting max_tiles"),
        ({"image_processor_type": "SiglipImageProcessor"}, "warn", "size is missing"),
        ({}, "warn", "preprocessor_config.json"),
    ],
    ids=str,
)
def test_why_images_pass_is_said(tmp_path: Path, config: dict[str, Any], level: str, why: str) -> None:
    """An unknown processor, setting or code, no size, a processor that only makes tensors, no file: each is named."""
    found = machine.model(Settings(model=model_dir(tmp_path, config)))
    assert found.level == level and why in found.what


def test_the_image_extra_loads(tmp_path: Path, requires: Callable[[str], Path]) -> None:
    """With a known processor, the image libraries are really loaded, in a process of their own."""
    requires("python:simplejpeg")
    found = machine.images(Settings(model=model_dir(tmp_path, PROCESSOR)))
    assert found.level == "ok" and "JPEG by simplejpeg" in found.what


@pytest.mark.parametrize(
    ("device", "cuda", "nvml", "level", "said"),
    [
        ("cuda", "", "", "ok", "Stub GPU 0 (driver of CUDA 12.9)"),
        ("auto", "", "", "ok", "measured at the first image"),
        ("cuda", "devices 0\n", "", "fail", "finds no device"),
        ("auto", "devices 0\n", "", "absent", "finds no device"),
        ("cuda", "capability 75\n", "", "fail", "no shipped kernel"),
        ("cuda", "cuInit 999\n", "", "fail", "cuInit"),
        ("cuda", "", "free 900\n", "warn", "900 MiB are free"),
        ("cuda", "", "nvmlDeviceGetMemoryInfo 3\n", "fail", "NVML"),
        ("cpu", "", "", "absent", "--images-device cpu"),
    ],
)
def test_what_keeps_images_from_the_gpu_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    requires: Callable[[str], Path],
    device: str,
    cuda: str,
    nvml: str,
    level: str,
    said: str,
) -> None:
    """CUDA's driver and NVML are asked, without a context; the answer has a remedy."""
    gcc, library = requires("gcc"), tmp_path / "lib"
    build_cuda(gcc, library)
    build_nvml(gcc, library)
    for name, lines in {"CUDA_STUB_SCRIPT": cuda, "NVML_STUB_SCRIPT": nvml, "CUDA_STUB_LOG": ""}.items():
        (tmp_path / name).write_text(lines)
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    found = machine.images_gpu(Settings(model=model_dir(tmp_path, PROCESSOR), images_device=device))
    assert (found.level, said in found.what) == (level, True), found
    assert bool(found.remedy) == (found.level in ("warn", "fail") or "finds no device" in found.what)
    assert "cuDevicePrimaryCtxRetain" not in (tmp_path / "CUDA_STUB_LOG").read_text()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("gpm 1\nrecovery 0\n", "0: Stub GPU (shows a hang by power, kernels, tensor cores and memory, faults)"),
        ("", "0: Stub GPU (shows a hang by power, kernels)"),
        ("mig 3\n", "0:3: Stub GPU MIG 1g.10gb (shows nothing of a hang)"),
    ],
)
def test_what_a_gpu_shows_of_a_hang_is_said(
    tmp_path: Path, requires: Callable[[str], Path], script: str, said: str
) -> None:
    """By its generation and driver: GPM and faults are recent; a slice has neither power nor kernels of its own."""
    library = build_nvml(requires("gcc"), tmp_path / "lib")
    (tmp_path / "script").write_text(script)
    code = "from sidecar.tools.doctor import machine; print(machine.gpu(machine.Settings()))"
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_STUB_SCRIPT": str(tmp_path / "script")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert said in done.stdout, done.stdout


def test_a_machine_without_a_driver_is_no_failure_of_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most machines have no GPU: that is absent with `auto`, and a failure with `cuda`, each with what to do."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    folder = model_dir(tmp_path, PROCESSOR)
    for device, level in (("auto", "absent"), ("cuda", "fail")):
        found = machine.images_gpu(Settings(model=folder, images_device=device))
        assert found.level == level and found.remedy
        assert "no CUDA driver" in found.what or "finds no device" in found.what


def test_an_image_extra_that_does_not_load_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requires: Callable[[str], Path]
) -> None:
    """A library that fails at import is reported with its last line and a remedy."""
    requires("python:simplejpeg")
    (tmp_path / "simplejpeg.py").write_text("raise OSError('libjpeg is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = machine.images(Settings(model=model_dir(tmp_path, PROCESSOR)))
    assert found.level == "fail" and "libjpeg is broken" in found.what and found.remedy


@pytest.mark.parametrize(
    ("mode", "level"), [("auto", "absent"), ("off", "absent"), ("inline", "fail"), ("shm", "fail")]
)
def test_images_that_cannot_be_had(mode: str, level: str) -> None:
    """Without a model, images are off; this fails only if they are configured, as it fails the start."""
    assert machine.images(Settings(images=mode)).level == level


def test_a_small_shared_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than an engine with several GPUs needs is a warning, no /dev/shm is absent."""
    monkeypatch.setattr(machine, "MIN_SHM_BYTES", 1 << 62)
    assert machine.shm(Settings()).level == "warn"
    monkeypatch.setattr(machine, "SHM_DIR", tmp_path / "none")
    assert machine.shm(Settings()).level == "absent"


def test_few_open_files_are_a_warning() -> None:
    """It says how many clients a relay can serve, and what to raise."""
    code = "import sys; from sidecar.settings import Settings; from sidecar.tools.doctor import machine; "
    code += "print(machine.files(Settings()))"
    for limit, level in (("1024", "warn"), ("4096", "ok")):
        command = ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", sys.executable, "-c", code]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"level='{level}'" in said and ("480 client connections" in said) is (level == "warn")


def test_more_processes_than_cpus_is_a_warning() -> None:
    """More configured processes than CPUs are a warning."""
    assert machine.cpu(Settings(workers=64)).level == "warn"
    assert machine.cpu(Settings()).level == "ok"


def test_text_is_aligned_and_remedies_follow() -> None:
    """One line each, the remedy below, a count at the end."""
    lines = text({"a": DoctorFinding("ok", "well"), "longer": DoctorFinding("fail", "broken", "fix it")}).splitlines()
    assert lines == [
        "ok      a       well",
        "fail    longer  broken",
        "                -> fix it",
        "1 to fix",
    ]


def test_the_command_prints_json_and_exits_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`--json` prints a list of findings; a failure (no --engine) is exit code 1; a bad setting is 2."""
    assert __main__.run(["doctor", "--json", "--state-dir", str(tmp_path), "--listen", "127.0.0.1:0"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert findings[0]["name"] == "engine" and findings[0]["level"] == "fail"
    assert __main__.run(["doctor", "--workers", "many"]) == 2
