"""The table of real engines: how each is started, what it is expected to show, and which cases do not apply to it.

A command's words may hold `{home}` (its environment), `{python}`, `{port}`, `{model}` (a folder), `{folder}` (an empty
one), `{certificate}`, `{certificate_key}` and `{binary}`. All are on loopback and compute with one CPU thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..environments import Environment, PackageFile
from ..vllm import processes
from . import environments

HERE = Path(__file__).parent
TINY_GGUF = HERE / "tiny_gguf.py"
TINY_MODELS = HERE.parent / "vllm" / "tiny_models.py"
MOCKED_WORDS = HERE / "mocked_words.py"
HEALTHY = frozenset({"starting", "idle", "progressing", "quiet"})


@dataclass(frozen=True, slots=True)
class Call:
    """A request of a route of the engine's own; without a body a GET. `is_work`: it is charged where it is served."""

    path: str
    body: Mapping[str, Any] | None = None
    is_work: bool = True


@dataclass(frozen=True, slots=True)
class RealEngine:
    """One way to run an engine.

    `series`: the fields of a sample that its metrics page fills once it has worked; none: there is no page to read.
    Its model is made by `script` as the kind `made`, in the environment `maker` if it is not its own. `parts`:
    processes by what their command line holds; empty is the first one. `routes`: which of chat, completions and
    embeddings it serves. `unharmed`: parts whose loss users do not see. `given_up`: parts that the front end drops for
    good once they were stopped; SIGUSR1 to the first process starts another. `absent` says of a case why it does not
    apply.
    """

    name: str
    page: str  # docs/engines/PAGE.md
    environment: Environment
    command: tuple[str, ...]
    kind: str
    script: Path
    made: str
    maker: Environment | None = None
    binary: PackageFile | None = None
    series: frozenset[str] = frozenset()
    prefix: str = ""  # of its own series' names
    environ: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=lambda: {"front": ""})
    routes: frozenset[str] = frozenset({"chat", "completions"})
    sees_images: bool = False
    calls: tuple[Call, ...] = ()
    hides_in_work: bool = False  # a stopped part of several shows only beside working ones
    is_asked_idle: bool = True  # canaries while it is idle
    unharmed: frozenset[str] = frozenset()
    given_up: frozenset[str] = frozenset()
    sentences: int = 480  # of 28 letters, in a long prompt
    refused_members: frozenset[str] = frozenset()  # of a request; the cases leave them out
    stream_tokens: int = 3500  # of a stream in which something is stopped
    absent: Mapping[str, str] = field(default_factory=dict)
    base: str = ""  # path in front of the engine's own
    key: str = ""
    is_tls: bool = False
    start_seconds: float = processes.START_SECONDS

    @property
    def needed(self) -> tuple[Environment | PackageFile, ...]:
        """All that must have been made for it."""
        every = (self.environment, self.maker, self.binary)
        return tuple(dict.fromkeys(each for each in every if each is not None))

    @property
    def id(self) -> str:
        """The name as `pytest -k` takes it."""
        return self.name.replace(",", "").replace(" ", "-")


def without(parts: tuple[str, ...], why: str) -> dict[str, str]:
    """Cases that do not apply to an engine without these processes."""
    cases = [f"stop_{part}_{when}" for part in parts for when in ("idle", "in_a_stream")]
    return dict.fromkeys([*cases, *(["kill_worker"] if "worker" in parts else [])], why)


def llamacpp(name: str, *flags: str, **more: Any) -> RealEngine:
    """The server of llama.cpp's older build."""
    flags = ("--host", "127.0.0.1", "--port", "{port}", "-t", "1", "--metrics", *flags)
    chosen: dict[str, Any] = {
        "page": "llamacpp",
        "environment": environments.LLAMACPP,
        "command": ("{home}/bin/llama-server-vulkan", *flags),
        "kind": "llamacpp",
        "script": TINY_GGUF,
        "made": "text",
        "series": LLAMACPP_SERIES,
        "prefix": "llamacpp:",
        "calls": LLAMACPP_CALLS,
        "absent": ONE_PROCESS,
        "sentences": 64,  # a token is a letter
        "start_seconds": 60.0,
    }
    return RealEngine(name=name, **(chosen | more))


ALONE = {"stop_one_of_many": "each part is there once"}
ONE_PROCESS = without(("core", "worker"), "one process does all") | ALONE
ONE_MODEL = ("-m", "{model}/tiny.gguf", "--alias", "tiny")
LLAMACPP_SERIES = frozenset({"running", "waiting", "prompt_tokens", "iterations", "cached_tokens", "generation_tokens"})
LLAMACPP_CALLS = (
    Call("/completion", {"prompt": "Count to ten.", "n_predict": 8, "temperature": 0}),
    Call("/infill", {"input_prefix": "one, ", "input_suffix": ", three", "n_predict": 8, "temperature": 0}),
    Call("/v1/messages", {"max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}),
    Call("/v1/responses", {"max_output_tokens": 8, "temperature": 0, "input": "hi"}),
    Call("/v1/systemone", {"model": "tiny", "prompt": "Is it so?"}),
    Call("/tokenize", {"content": "Count to ten."}, is_work=False),
    Call("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}, is_work=False),
    Call("/props", is_work=False),
    Call("/v1/models", is_work=False),
)

VLLM_SERIES = frozenset(
    {"running", "waiting", "kv_usage", "prompt_tokens", "generation_tokens", "finished", "iterations"}
)
VLLM_CALLS = (
    Call("/v1/messages", {"max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}),
    Call("/v1/responses", {"max_output_tokens": 8, "temperature": 0, "input": "hi"}),
    Call("/tokenize", {"prompt": "Count to ten."}, is_work=False),
    Call("/v1/models", is_work=False),
    Call("/version", is_work=False),
)
AS_PLAIN = "left out: the plain server shows it"
ONE_OF_TWO = "a rank that hangs alone fails readiness first: see stop one of many"


def vllm(name: str, *flags: str, serve: bool = False, without_flags: tuple[str, ...] = (), **more: Any) -> RealEngine:
    """vLLM's Python front end; with `serve` as its command line starts it, which several API servers need."""
    start = ("{python}", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}")
    base = [flag for flag in processes.ENGINE_FLAGS if flag not in without_flags]
    if serve:
        start = ("{python}", str(HERE / "serve_vllm.py"), "serve", "{model}")
    served = ("--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "tiny")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    chosen: dict[str, Any] = {
        "page": "vllm",
        "environment": environments.VLLM,
        "command": (*start, *served, *tools, *base, *flags),
        "kind": "vllm",
        "script": TINY_MODELS,
        "made": "vision",
        "series": VLLM_SERIES,
        "prefix": "vllm:",
        "calls": VLLM_CALLS,
        "sees_images": True,
        "parts": {"front": "", "core": "VLLM::EngineCore", "worker": "VLLM::Worker"},
        "start_seconds": 600.0,
        "absent": ALONE,
    }
    return RealEngine(name=name, **(chosen | more))


MESSAGES = Call("/v1/messages", {"max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]})
RESPONSES = Call("/v1/responses", {"max_output_tokens": 8, "temperature": 0, "input": "hi"})
MODEL_LIST = Call("/v1/models", is_work=False)
DYNAMO = RealEngine(
    "Dynamo 1.6, mocker",
    "dynamo",
    environments.DYNAMO,
    ("{python}", str(HERE / "serve_dynamo.py"), "{model}", "{port}", "{folder}"),
    "openai",
    MOCKED_WORDS,
    "words",
    prefix="dynamo_",
    parts={"front": "dynamo.frontend", "worker": "dynamo.mocker"},
    sees_images=True,  # its front end takes them, the mocker looks at none
    given_up=frozenset({"worker"}),
    calls=(MESSAGES, RESPONSES, MODEL_LIST),
    absent=without(("core",), "its workers are engines of their own")
    | ALONE
    | {"stop_worker_in_a_stream": "not ready in seconds, liveness late: the page says why"},
)

TRANSFORMERS = RealEngine(
    "transformers serve 5.24",
    "transformers",
    environments.TRANSFORMERS,
    ("{python}", str(HERE / "serve_transformers.py"), "{model}", "{port}", "{folder}"),
    "openai",
    TINY_MODELS,
    "vision",
    sees_images=True,
    calls=(
        Call("/v1/responses", {"max_output_tokens": 8, "temperature": 0, "input": "hi", "stream": False}),
        Call("/v1/systemone", {"prompt": "Is it so?"}),
        MODEL_LIST,
        Call("/health", is_work=False),
    ),
    refused_members=frozenset({"ignore_eos"}),
    absent=ONE_PROCESS,
    start_seconds=300.0,
)
SGLANG = RealEngine(
    "SGLang 0.5.23",
    "sglang",
    environments.SGLANG,
    (
        *("{python}", "-m", "sglang.launch_server", "--model-path", "{model}", "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", "{port}", "--device", "cpu", "--dtype", "float32"),
        *("--attention-backend", "torch_native", "--disable-overlap-schedule", "--skip-server-warmup"),
        *("--enable-metrics", "--max-total-tokens", "16384", "--context-length", "4096"),
        *("--tool-call-parser", "qwen25"),
    ),
    "sglang",
    TINY_MODELS,
    "text",
    series=frozenset({"running", "waiting", "kv_usage", "prompt_tokens", "generation_tokens", "iterations"}),
    prefix="sglang:",
    environ={"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(HERE / "absent_kernels")},
    parts={"front": "", "core": "sglang::scheduler", "worker": "sglang::detokenizer"},
    calls=(
        Call("/generate", {"text": "Count to ten.", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}),
        MESSAGES,
        RESPONSES,
        Call("/tokenize", {"prompt": "Count to ten."}, is_work=False),
        MODEL_LIST,
        Call("/model_info", is_work=False),
        Call("/server_info", is_work=False),
    ),
    stream_tokens=300,  # while its scheduler generates, its counter hides that the detokenizer delivers nothing
    absent=ALONE,
    start_seconds=400.0,
)


ENGINES = (
    llamacpp(
        "llama.cpp b10434",
        *(*ONE_MODEL, "--mmproj", "{model}/tiny.mmproj.gguf", "-np", "4", "-c", "16384"),
        made="vision",
        sees_images=True,
    ),
    llamacpp(
        "llama.cpp b11549",
        command=("{python}", str(HERE / "serve_xllamacpp.py"), "{model}", "{port}"),
        made="vision",
        sees_images=True,
    ),
    llamacpp("llama.cpp, one slot", *ONE_MODEL, "-np", "1", "-c", "4096", "--cache-ram", "0", is_asked_idle=False),
    llamacpp(
        "llama.cpp, embeddings",
        *(*ONE_MODEL, "-np", "2", "-c", "8192", "--embeddings", "--pooling", "mean"),
        routes=frozenset({"embeddings"}),
        calls=(Call("/embedding", {"content": "hi"}), Call("/tokenize", {"content": "hi"}, is_work=False)),
        absent=ONE_PROCESS
        | dict.fromkeys(
            ("tokens", "streams", "whole", "tools", "images", "abort", "long_prompts", "stop_front_in_a_stream"),
            "it makes vectors, no tokens",
        ),
    ),
    llamacpp(
        "llama.cpp, router",
        *("--models-dir", "{model}", "--models-max", "1", "-np", "2", "-c", "8192"),
        made="two",
        series=frozenset(),
        prefix="",
        parts={"front": "", "worker": "--alias tiny"},
        unharmed=frozenset({"worker"}),
        absent=without(("core",), "the model's process does all but the front's work") | ALONE,
    ),
    vllm("vLLM 0.32"),
    vllm(
        "vLLM 0.32, TLS",
        *("--ssl-certfile", "{certificate}", "--ssl-keyfile", "{certificate_key}"),
        *("--api-key", "engine-key", "--root-path", "/llm"),
        is_tls=True,
        key="engine-key",
        base="/llm",
        absent=ALONE | dict.fromkeys(("stop_core_idle", "stop_core_in_a_stream", "long_prompts"), AS_PLAIN),
    ),
    vllm(
        "vLLM 0.32, two API servers",
        *("--api-server-count", "2"),
        serve=True,
        parts={"core": "VLLM::EngineCore", "worker": "VLLM::Worker"},
        absent=without(("front",), "the first process only waits for the others")
        | dict.fromkeys(("images", "long_prompts", "stop_worker_idle", "stop_worker_in_a_stream"), AS_PLAIN)
        | {"stop_one_of_many": "the servers share a listener: the other one takes all new connections"}
        | {"restart": "left out: kill 9 shows it"},
    ),
    vllm(
        "vLLM 0.32, Rust front end",
        serve=True,
        without_flags=("--trust-request-mm-kwargs",),  # it does not know it
        binary=environments.VLLM_RUST,
        environ={"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": "{binary}"},
        parts={"front": "vllm-rs", "core": "VLLM::EngineCore", "worker": "VLLM::Worker"},
    ),
    vllm(
        "vLLM 0.32, two ranks",
        *("--data-parallel-size", "2"),
        serve=True,
        parts={"one": "VLLM::EngineCore_DP1", "worker": "VLLM::Worker"},
        absent=without(("front",), "the first process only waits for the others")
        | without(("core",), "see stop one of many")
        | dict.fromkeys(("images", "embeddings", "long_prompts", "kill_9", "restart"), AS_PLAIN)
        | dict.fromkeys(("stop_worker_idle", "stop_worker_in_a_stream", "bundle"), ONE_OF_TWO),
    ),
    SGLANG,
    TRANSFORMERS,
    DYNAMO,
)
