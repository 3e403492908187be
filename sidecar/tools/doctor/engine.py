"""Checks of the engine: is it reachable, which kind is it, can its metrics be read, does it serve one token.

Each request is sent once, with a timeout, by the code that `sidecar run` uses.
"""

from __future__ import annotations

import re
from typing import Final

import aiohttp
import psutil

from sidecar.engines import metrics_parser, model_list, registry
from sidecar.engines.engine_type import MODELS, EngineKind
from sidecar.engines.image_loading import RUST_FRONT_END, SIZE_DIFFERS, UNKNOWN_ROW, ImageModel, row_of
from sidecar.images import vllm_plugin
from sidecar.images.shm_cache import SHM_DIR
from sidecar.kernels import families
from sidecar.readings import EngineIdentity, EngineSample
from sidecar.runtime import cpu_quota
from sidecar.settings import Settings
from sidecar.signals import engine_processes, image_support
from sidecar.signals.canary import CanarySignal
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.identify import ProbeAnswers, probe_engine, request_pages
from sidecar.signals.image_canary import check_images
from sidecar.signals.listening_socket import host_and_port
from sidecar.tools.doctor.finding import DoctorFinding, Level

# Of /v1/models and the metrics page.
PAGE_TIMEOUT_S: Final = 10.0
TOKEN_TIMEOUT_S: Final = 60.0
LOCAL_HOSTS: Final = ("127.0.0.1", "localhost", "::1")


async def check(chosen: Settings) -> dict[str, DoctorFinding]:
    """All findings about the engine. If it is unreachable, the others are omitted."""
    if not chosen.engine:
        remedy = "give the engine's base URL, e.g. --engine http://127.0.0.1:8000"
        return {"engine": DoctorFinding("fail", "no --engine", remedy)}
    headers = {"authorization": f"Bearer {chosen.engine_key}"} if chosen.engine_key else {}
    address = EngineAddress(chosen.engine, chosen.engine_ca)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(headers=headers, cookie_jar=jar, connector=address.connector()) as session:
        met = await probe_engine(session, address.base, headers, PAGE_TIMEOUT_S)
        if trouble := await address.explain_answers(session, met):
            what, _, remedy = trouble.partition(": ")
            return {"engine": DoctorFinding("fail", what, remedy)}
        seen = registry.recognise(met.pages)
        kind = registry.KINDS[seen if chosen.engine_kind == "auto" else chosen.engine_kind]
        reached = _reached(met, kind)
        if reached.level == "fail":
            return {"engine": reached}
        pages = dict.fromkeys([*([kind.metrics_path] if kind.series else []), *kind.identity_paths])
        unread = [path for path in pages if path not in met.status]
        await request_pages(met, session, address.base, unread, headers, PAGE_TIMEOUT_S)
        return {
            "engine": reached,
            "engine-kind": _kind(seen, chosen.engine_kind),
            "engine-metrics": _metrics(met, kind),
            "canary": await _canary(session, address.base, chosen.canary_model, kind),
            "engine-rest": await _rest(session, address.base, kind),
            "images-shm": shared_memory(chosen, kind.name),
            "images-engine": await _images(session, address.base, chosen, kind.name, met),
            "engine-threads": threads(chosen.engine, kind.name),
        }


def _reached(met: ProbeAnswers, kind: EngineKind) -> DoctorFinding:
    status = met.status[MODELS]
    answers = f"{MODELS} answers {status}"
    if status == 404 and MODELS not in kind.model_paths:
        return DoctorFinding("ok", f"answers as {kind.name} does, without a list of models")
    if status == 0:
        return DoctorFinding("fail", met.error, "start the engine, or correct --engine")
    if status in (401, 403):
        return DoctorFinding("fail", answers, "give the engine's key: --engine-key")
    if status != 200:
        return DoctorFinding(
            "warn", answers, "name the canary's model (--canary-model), or wait until the engine is up"
        )
    names = [card["id"][:80] for card in model_list.listed(met.pages[MODELS])]
    if not names:
        return DoctorFinding("warn", "/v1/models names no model", "name the canary's model: --canary-model")
    return DoctorFinding("ok", f"serves {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else ""))


def _kind(seen: str, chosen: str) -> DoctorFinding:
    if chosen not in ("auto", seen) and seen != "openai":
        return DoctorFinding("warn", f"chosen {chosen}, but it looks like {seen}", "leave --engine-kind at auto")
    if chosen != "auto":
        return DoctorFinding("ok", f"{chosen} (as chosen)")
    if seen == "openai":
        text = "not recognised: its metrics are not read, silence is judged by its responses alone"
        kinds = ", ".join(name for name, kind in registry.KINDS.items() if kind.series and name != "scripted")
        return DoctorFinding("warn", text, f"if it is one of {kinds}, set --engine-kind")
    return DoctorFinding("ok", seen)


def _metrics(met: ProbeAnswers, kind: EngineKind) -> DoctorFinding:
    if not kind.series:
        return DoctorFinding("absent", f"none are read from the kind {kind.name}")
    remedy = "start the engine with its metrics on (SGLang: --enable-metrics, llama.cpp: --metrics)"
    page = met.pages.get(kind.metrics_path)
    if page is None:
        status = met.status.get(kind.metrics_path, 0)
        if status == 400:  # llama.cpp's router mode wants a model's name
            return DoctorFinding(
                "absent", f"{kind.metrics_path} answers 400: each model has its own, which is not read"
            )
        return DoctorFinding("warn", f"{kind.metrics_path} answers {status or met.error}", remedy)
    try:
        read = metrics_parser.parse(page, kind)
    except ValueError:
        return DoctorFinding("warn", f"{kind.metrics_path} is not Prometheus text", remedy)
    missing = [name for name in kind.series if getattr(read, name) is None]
    text = f"{len(kind.series) - len(missing)} of {len(kind.series)} series"
    text += f"; missing: {', '.join(missing)}" if missing else ""
    return DoctorFinding("warn", text, remedy) if read == EngineSample() else DoctorFinding("ok", text)


_CANARY: Final[dict[str, tuple[Level, str]]] = {
    "busy": ("warn", "the engine is full or starting; ask again"),
    "moot": ("warn", "load a model, or ask again once users have"),
    "rejected": (
        "warn",
        "set --canary-model or --engine-key, or load a model; without a canary silence alone is judged, and later",
    ),
    "starved": ("fail", "the engine does not serve; see its log"),
    "failed": ("fail", "the engine does not serve; see its log"),
    "refused": ("fail", "start the engine, or correct --engine"),
}


async def _canary(session: aiohttp.ClientSession, engine: str, model: str, kind: EngineKind) -> DoctorFinding:
    signal = CanarySignal(session, engine, kind, {}, model=model)
    result = await signal.send(TOKEN_TIMEOUT_S)
    if result.outcome == "ok":
        return DoctorFinding("ok", f"one token in {result.ended - result.started:.2f} s from {result.detail}")
    level, remedy = _CANARY[result.outcome]
    if result.outcome == "rejected" and re.search(r"HTTP 5(?!01)", result.detail):
        level, remedy = _CANARY["failed"]
    return DoctorFinding(level, f"{result.outcome}: {result.detail}", remedy)


async def _rest(session: aiohttp.ClientSession, engine: str, kind: EngineKind) -> DoctorFinding:
    """Where the engine's sleep and pause can be read. Without that, the sidecar sees only what passes the relay."""
    met = ProbeAnswers()
    await request_pages(met, session, engine, [sign.path for sign in kind.signs], {}, PAGE_TIMEOUT_S)
    read = [*(["its metrics page"] if kind.awake else []), *met.pages]
    if read:
        return DoctorFinding("ok", "sleep and pause are read from " + ", ".join(read))
    text = "it does not publish sleep or pause: send such calls through the relay, or their silence looks like a hang"
    return DoctorFinding("absent", text)


def shared_memory(chosen: Settings, kind: str) -> DoctorFinding:
    """Whether this engine can receive images through shared memory, as pixels or finished tensors."""
    if chosen.images not in ("auto", "shm"):
        return DoctorFinding("absent", f"not used with --images {chosen.images}")
    if chosen.images == "auto":
        return _offered(chosen, kind)
    if kind != "vllm":
        return DoctorFinding("warn", f"images go inline: {kind} takes none from shared memory", "--images inline")
    seen = vllm_plugin.read_status(SHM_DIR)
    if seen.why:
        return DoctorFinding("warn", f"images go inline: {SHM_DIR}: {seen.why}", vllm_plugin.REMEDY)
    return DoctorFinding("ok", f"vLLM reads {SHM_DIR} with plugin {seen.version}")


def _offered(chosen: Settings, kind: str) -> DoctorFinding:
    """What a vLLM takes through shared memory without being asked to."""
    spec = families.from_dir(chosen.model) if chosen.model else None
    if kind != "vllm" or spec is None:
        return DoctorFinding("absent", "not used: it is for vLLM and a model whose processor is known")
    seen, offer = vllm_plugin.read_status(SHM_DIR), vllm_plugin.read_offer(SHM_DIR, spec)
    if seen.why:
        remedy = vllm_plugin.path_remedy(chosen.state_dir)
        return DoctorFinding("absent", f"images go inline or pass: {SHM_DIR}: {seen.why}", remedy)
    if offer.why:
        return DoctorFinding("warn", f"vLLM gets pixels, not finished tensors: {offer.why}", "see docs/images.md")
    return DoctorFinding("ok", f"vLLM takes finished tensors as {offer.dtype} with plugin {seen.version}")


async def _images(
    session: aiohttp.ClientSession, engine: str, chosen: Settings, kind: str, met: ProbeAnswers
) -> DoctorFinding:
    """Whether the engine gets prepared images: by its row, and by the image canary."""
    files, spec = image_support.read_model(chosen.model) if chosen.model else (ImageModel(), None)
    identity = registry.identity(met.pages)
    found, needs_canary = prepared(chosen, kind, identity, files)
    if not needs_canary or spec is None or not spec.inline:
        return found
    model = chosen.canary_model or next(iter(identity.models), "")
    check = await check_images(session, engine, {}, model, spec)
    if not check.reason:
        return DoctorFinding(found.level, f"{found.what}; it resizes as the model's files say")
    remedy = "write the engine's image sizes into preprocessor_config.json, in a directory that both read"
    text = f"images pass as they came: {image_support.text_of(check.reason, check.detail)}"
    return DoctorFinding("warn", text, remedy if check.reason == SIZE_DIFFERS else "")


def prepared(chosen: Settings, kind: str, identity: EngineIdentity, model: ImageModel) -> tuple[DoctorFinding, bool]:
    """Whether the engine gets prepared images by what it is; and whether an image canary must show that sizes agree."""
    if chosen.images == "off":
        return DoctorFinding("absent", "not used with --images off"), False
    if not chosen.model:
        return DoctorFinding("absent", "not used without --model"), False
    reason, needs_canary = image_support.engine_reason(kind, identity, model)
    row = row_of(kind, identity.engine, model)
    of = f"{row.kind} {row.versions}, tokenizer {row.tokenizer}, architecture {row.architecture}"
    if not reason:
        return DoctorFinding("ok", f"it opens images as the sidecar does ({of})"), needs_canary
    remedy = ""
    if reason == RUST_FRONT_END:
        remedy = "serve with vLLM's Python front end (without VLLM_USE_RUST_FRONTEND), or --images off"
    level: Level = "warn" if remedy or chosen.images != "auto" else "absent"
    said = f"images pass as they came: {image_support.text_of(reason)}"
    return DoctorFinding(level, said if remedy or row is UNKNOWN_ROW else f"{said} ({of})", remedy), False


def threads(engine: str, kind: str) -> DoctorFinding:
    """OMP_NUM_THREADS of the engine's process, if it is visible on this machine."""
    if kind == "llamacpp":
        return DoctorFinding("absent", "llama.cpp takes the number of its threads from --threads")
    is_local = host_and_port(engine)[0] in LOCAL_HOSTS
    pids = engine_processes.find_listeners(engine)[0] if is_local else set()
    if not pids:
        return DoctorFinding("absent", "the engine's process cannot be seen from here")
    try:
        process = psutil.Process(min(pids))
        wanted, usable = process.environ().get("OMP_NUM_THREADS", ""), len(process.cpu_affinity())
    except psutil.Error:
        return DoctorFinding("absent", "the engine's environment may not be read from here")
    usable = min(usable, cpu_quota.quota())
    remedy = f"set OMP_NUM_THREADS to the CPUs of its container (here {usable})"
    if not wanted.isdigit():
        return DoctorFinding(
            "warn", "OMP_NUM_THREADS is not set: libraries start a thread per core of the node", remedy
        )
    if int(wanted) > usable:
        return DoctorFinding("warn", f"OMP_NUM_THREADS is {wanted}, over the {usable} usable CPUs", remedy)
    return DoctorFinding("ok", f"OMP_NUM_THREADS is {wanted}")
