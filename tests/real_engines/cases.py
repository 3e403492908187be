"""The cases of the conformance suite, in the order in which they run: what holds beside any engine.

A case asserts what must hold, and returns in a few words what this engine showed: a cell of the table in
docs/engines/seen.md. Its docstring is the table's legend. The cases share an engine and a sidecar, so later hangs are
found by a sidecar that has learned from earlier ones. `absent` of an engine's row says where a case does not apply.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import fields
from functools import partial
from typing import Any

import aiohttp
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sidecar.engines import metrics_parser, registry
from sidecar.readings import EngineSample

from ..vllm import client, processes
from .engines import HEALTHY, Call
from .scene import Answer, EngineScene, command_flags, frozen, generate, now, read_to_end, same

Case = Callable[[EngineScene], Awaitable[str]]

TEXT = "Describe what the sidecar does."
USAGE = {"stream_options": {"include_usage": True}}
POOLED = 60  # streams, one after the other, each on whatever connection the relay has kept
LONG_PROMPTS = 6
CANARIES = 3
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


async def recognition(scene: EngineScene) -> str:
    """The kind that the sidecar finds out by itself."""

    async def is_known() -> bool:
        return await scene.metric("sidecar_build_info", engine_kind=scene.row.kind) == 1

    await scene.until(is_known, f"recognised as {scene.row.kind}")
    await scene.until_probe("/startupz", 200)
    return scene.row.kind


async def series(scene: EngineScene) -> str:
    """What is read from its metrics page; the relay's page has all of the engine's own series."""
    await scene.relayed(_any_work(scene))
    kind = registry.KINDS[scene.row.kind]
    page = await scene.direct(Call(kind.metrics_path))
    if not scene.row.series and not scene.row.prefix:
        assert page.status != 200, "it has a metrics page: the row does not say which series"
        return f"no page ({page.status})"
    if not scene.row.series:
        read: set[str] = set()
    else:
        sample = metrics_parser.parse(page.body.encode(), kind)
        read = {each.name for each in fields(EngineSample) if getattr(sample, each.name) is not None}
        missing = scene.row.series - read
        assert not missing, f"not on the page: {missing}"
    theirs = {family.name for family in text_string_to_metric_families(page.body)}
    theirs = {name for name in theirs if name.startswith(scene.row.prefix)}
    assert theirs

    async def is_merged() -> bool:
        merged = (await scene.relayed(Call("/metrics"))).body
        return theirs <= {family.name for family in text_string_to_metric_families(merged)}

    await scene.until(is_merged, "the engine's series on the relay's page")
    return ", ".join(sorted(read & {*kind.series})) or f"{len(theirs)} passed on, none read"


async def tokens(scene: EngineScene) -> str:
    """Tenants are charged the tokens that the engine reports, whole and streamed, asked for or not."""
    for number, (path, body) in enumerate(_texts(scene)):
        whole, asked, plain = (f"tokens-{number}-{manner}" for manner in ("whole", "asked", "plain"))
        reported = (await scene.relayed(Call(path, body), whole)).body["usage"]
        await _is_charged(scene, whole, reported)
        lines = await scene.stream(scene.sidecar.url, Call(path, body | USAGE), asked)
        [usage] = client.said(lines)["usage"]
        await _is_charged(scene, asked, usage)
        await scene.stream(scene.sidecar.url, Call(path, body), plain)
        await _is_charged(scene, plain, usage)
    return "as reported"


async def streams(scene: EngineScene) -> str:
    """A stream says the same direct and relayed, with its usage only where asked for; 60 on kept connections pass."""
    for path, body in _texts(scene):
        for asked in ({}, USAGE):
            call = Call(path, body | asked)
            direct = _comparable(await scene.stream(scene.engine.url, call))
            relayed = _comparable(await scene.stream(scene.sidecar.url, call))
            assert relayed == direct, (path, asked)
    path, body = _texts(scene)[0]
    call = Call(path, body | {"max_tokens": 2})
    direct = _comparable(await scene.stream(scene.engine.url, call))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as kept:
        reader = EngineScene(scene.engine, scene.sidecar, kept)
        for _ in range(POOLED):
            lines = await reader.stream(scene.sidecar.url, call)
            assert _comparable(lines) == direct, lines[-4:]
    return f"the same; {POOLED} of {POOLED} on kept connections"


async def whole(scene: EngineScene) -> str:
    """Whole answers and refusals are the same direct and relayed, whatever the request asks for."""
    compared = 0
    for path, body in _texts(scene):
        for more in (
            {},
            {"logprobs": 3} if path.endswith("/completions") and "prompt" in body else {"logprobs": True},
            {"stop": ["e"]},
            {"max_tokens": "many"},
            {"temperature": "hot"},
        ):
            await _is_same(scene, Call(path, body | more))
            compared += 1
    await _is_same(scene, Call("/v1/chat/completions", {"max_tokens": 1}))
    await _is_same(scene, Call("/v1/no/such/route", {}))
    return f"{compared + 2} of {compared + 2} the same"


async def tools(scene: EngineScene) -> str:
    """Requests with tools, with a tool that must be called and with a JSON schema have the same answers."""
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": TOOL["function"]["parameters"]}}  # type: ignore[index]
    named = {"tool_choice": {"type": "function", "function": {"name": "look"}}}
    called = statuses = ""
    for more in ({"tools": [TOOL]}, {"tools": [TOOL], **named}, {"response_format": schema}):
        answer = await _is_same(scene, Call("/v1/chat/completions", client.chat(TEXT, **more)))
        statuses += f" {answer.status}"
        if answer.status == 200 and answer.body["choices"][0]["message"].get("tool_calls"):
            called = "; a call among them"
    return f"the same ({statuses.strip().replace(' ', ', ')}){called}"


async def images(scene: EngineScene) -> str:
    """Requests with a PNG, a JPEG that must be turned, and something that is no image have the same answers."""
    statuses = []
    for url in (_picture("PNG"), _picture("JPEG"), "data:image/png;base64,bm9uZQ=="):
        parts = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": url}}]
        body = client.chat("", max_tokens=8) | {"messages": [{"role": "user", "content": parts}]}
        answer = await _is_same(scene, Call("/v1/chat/completions", body))
        statuses.append(answer.status)
    assert (statuses[:2] == [200, 200]) is scene.row.sees_images, statuses
    return f"the same ({', '.join(map(str, statuses))})"


async def embeddings(scene: EngineScene) -> str:
    """Vectors, or the refusal to make them, are the same direct and relayed; a refusal costs nothing."""
    answer = await _is_same(scene, Call("/v1/embeddings", {"input": ["one", "two"]}), "vectors")
    if "embeddings" not in scene.row.routes:
        assert answer.status != 200
        assert await scene.metric("sidecar_mu_total", tenant="vectors") == 0
        return f"refused ({answer.status}), free"
    assert len(answer.body["data"]) == 2
    await _is_charged(scene, "vectors", answer.body["usage"])
    return "the same, charged as reported"


async def native_routes(scene: EngineScene) -> str:
    """The engine's own routes have the same answers; work is charged, a refusal and a question are not."""
    seen = []
    for number, call in enumerate(scene.row.calls):
        tenant = f"native-{number}"
        answer = await _is_same(scene, call, tenant)
        is_charged = call.is_work and answer.status == 200
        if is_charged:
            await scene.settled(tenant, "ok")
        assert (await scene.metric("sidecar_mu_total", tenant=tenant) > 0) is is_charged, call.path
        seen.append(f"`{call.path}` {answer.status}")
    return ", ".join(seen) or "has none"


async def abort(scene: EngineScene) -> str:
    """A client that leaves amid a stream ends the work, and its request counts as cancelled."""
    async with scene.open_stream("gone") as answer:
        answer.close()
    await scene.settled("gone", "client_cancelled")
    await scene.until_probe("/livez", 200, "idle")
    if "running" not in scene.row.series:
        return "cancelled"

    async def is_free() -> bool:
        page = await scene.direct(Call(registry.KINDS[scene.row.kind].metrics_path))
        return metrics_parser.parse(page.body.encode(), registry.KINDS[scene.row.kind]).running == 0

    await scene.until(is_free, "nothing running in the engine")
    return "cancelled, the engine is free"


async def long_prompts(scene: EngineScene) -> str:
    """Six long prompts at once: all are served, and no verdict turns against the engine."""
    began = now()
    prompts = (f"{n}: " + "The tokens come one by one. " * scene.row.sentences for n in range(LONG_PROMPTS))
    answers = await asyncio.gather(*(scene.relayed(generate(scene.row, each, max_tokens=8)) for each in prompts))
    assert {answer.status for answer in answers} == {200}, answers
    longest = max(answer.body["usage"]["prompt_tokens"] for answer in answers)
    await scene.is_quiet_since(began)
    return f"{LONG_PROMPTS} of up to {longest} tokens, no alarm"


async def canary_manners(scene: EngineScene) -> str:
    """Canaries of an idle engine: a token each, no model loaded or dropped, no user's cached prompt lost."""
    prompt = generate(scene.row, "A prompt that its user will ask again. " * 4, max_tokens=1)
    if scene.row.routes & {"chat", "completions"}:
        await scene.relayed(prompt)
        cached_before = _cached((await scene.relayed(prompt)).body)
    else:
        cached_before = 0
    await scene.until_probe("/livez", 200, "idle")
    models = _loaded(await scene.direct(Call("/v1/models")))
    generated = await _generated(scene)
    sent = await scene.metric("sidecar_canaries_total", outcome="ok")

    async def sent_more() -> bool:
        return await scene.metric("sidecar_canaries_total", outcome="ok") >= sent + CANARIES

    if scene.row.is_asked_idle:
        await client.until(sent_more, "canaries while it is idle")
        passed = await scene.metric("sidecar_canaries_total", outcome="ok") - sent
        made = await _generated(scene) - generated
        assert made <= passed + 1, (made, passed)
        manner = "canaries while idle"
    else:
        with pytest.raises(AssertionError):
            await client.until(sent_more, "canaries while it is idle", 3.0 * CANARIES)
        assert await scene.metric("sidecar_canaries_total", outcome="ok") == sent
        manner = "none while idle"
    assert _loaded(await scene.direct(Call("/v1/models"))) == models
    if cached_before:
        cached = _cached((await scene.relayed(prompt)).body)
        assert cached == cached_before, (cached, cached_before)
        manner += f"; {cached:.0f} cached tokens kept"
    return manner + (f"; models as they were ({models})" if models else "")


async def doctor(scene: EngineScene) -> str:
    """`sidecar doctor` finds the engine, its kind and its canary."""
    flags = {
        "engine": scene.engine.url,
        "state-dir": str(scene.sidecar.state.parent / "doctor"),
        "listen": "127.0.0.1:0",
    }
    flags |= {"admin": "127.0.0.1:0"} | {
        name.replace("_", "-"): value for name, value in command_flags(scene.engine).items()
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = (sys.executable, "-m", "sidecar", "doctor", "--json", *words)
    run = await asyncio.create_subprocess_exec(
        *command, cwd=processes.ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, errors = await asyncio.wait_for(run.communicate(), client.WAIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            run.kill()
    found = {each["name"]: each for each in json.loads(out)}
    of_engine = {name: each for name, each in found.items() if name.startswith(("engine", "canary", "images-engine"))}
    assert not [each for each in of_engine.values() if each["level"] == "fail"], (of_engine, errors)
    assert found["engine"]["level"] == "ok", found["engine"]
    assert found["canary"]["level"] == "ok", found["canary"]
    assert scene.row.kind in found["engine-kind"]["what"] or scene.row.kind == "openai", found["engine-kind"]
    warned = [name for name, each in of_engine.items() if each["level"] == "warn"]
    return f"canary ok; {'warns: ' + ', '.join(warned) if warned else 'no warning'}"


async def stop(scene: EngineScene, part: str, *, in_a_stream: bool) -> str:
    """A process is stopped: liveness fails, with the reason; when it goes on, all is well again."""
    await scene.until_probe("/livez", 200, "idle")
    process = scene.engine.process(part)
    async with contextlib.AsyncExitStack() as stack:
        if in_a_stream:
            answer = await stack.enter_async_context(scene.open_stream())
        with frozen(process):
            await scene.until_probe("/livez", 503)
            _, verdict, reason = await scene.probe("/livez")
            assert verdict in ("stalled", "dead"), verdict
            assert (await scene.probe("/readyz"))[0] == 503
            await client.until(partial(asyncio.to_thread, (scene.sidecar.state / "stalled").exists), "the stalled file")
        if part in scene.row.given_up:
            process.kill()
            scene.engine.replace(part)
        if in_a_stream:
            await read_to_end(answer)
    await scene.until_probe("/livez", 200, "idle")
    return f"`{verdict}` ({reason})"


async def stop_one_of_many(scene: EngineScene) -> str:
    """Of several ranks or front ends one is stopped: readiness fails and says which kind of part hangs."""
    await scene.until_probe("/livez", 200, "idle")
    await scene.until_probe("/readyz", 200, seconds=2 * client.WAIT)  # no longer held back for an earlier hang
    process = scene.engine.process("one")

    async def users() -> None:
        """Short requests, one after the other, some of which the stopped part gets."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await asyncio.wait_for(scene.relayed(_any_work(scene)), client.WAIT)

    crowd = [asyncio.create_task(users()) for _ in range(4)] if scene.row.hides_in_work else []
    try:
        with frozen(process):
            await scene.until_probe("/readyz", 503, seconds=3 * client.WAIT)
            _, verdict, reason = await scene.probe("/readyz")
            assert verdict not in HEALTHY, (verdict, reason)
    finally:
        for user in crowd:
            user.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    await scene.until_probe("/readyz", 200, seconds=2 * client.WAIT)
    return f"not ready: `{verdict}` ({reason})"


async def bundle(scene: EngineScene) -> str:
    """The diagnosis of a hang names the stopped process."""
    process = scene.engine.process("front" if "front" in scene.row.parts else "worker")
    await scene.until_probe("/livez", 200, "idle")
    before = {each["id"] for each in await _diagnoses(scene)}

    async def is_taken() -> bool:
        return any(each["id"] not in before and each["summary"] for each in await _diagnoses(scene))

    with frozen(process):
        await scene.until_probe("/livez", 503)
        await scene.until(is_taken, "a diagnosis")
    summary = next(each["summary"] for each in await _diagnoses(scene) if each["id"] not in before)
    assert f"(pid {process.pid})" in summary and "stopped (T)" in summary, summary
    await scene.until_probe("/livez", 200, "idle")
    return f"`{summary.replace(f'pid {process.pid}', 'pid N')}`"


async def kill_worker(scene: EngineScene) -> str:
    """`kill -9` of the process that computes: found, unless the engine heals itself."""
    await scene.until_probe("/livez", 200, "idle")
    began = now()
    scene.engine.process("worker").kill()
    if "worker" in scene.row.unharmed:
        answer = await scene.relayed(_any_work(scene))
        assert answer.status in (200, 500, 502, 503), answer
        await scene.until_probe("/livez", 200, "idle")
        await scene.until(partial(_is_served, scene), "served again")
        assert not [each for each in await scene.verdicts_since(began) if each["verdict"] in ("stalled", "dead")]
        return "the engine starts it again by itself; no alarm"
    await scene.until_probe("/livez", 503)
    _, verdict, reason = await scene.probe("/livez")
    if "worker" in scene.row.given_up:
        scene.engine.replace("worker")
        await scene.until_probe("/livez", 200, "idle")
        await scene.until(partial(_is_served, scene), "served again")  # the front end may try the lost one a few times
        return f"`{verdict}` ({reason}); ready with another worker behind the same front end"
    await asyncio.to_thread(scene.engine.stop)
    await _starts_again(scene)
    return f"`{verdict}` ({reason})"


async def kill_9(scene: EngineScene) -> str:
    """`kill -9` of the whole engine amid work: found, and its successor on the port is started and served."""
    await scene.until_probe("/livez", 200, "idle")
    async with contextlib.AsyncExitStack() as stack:
        if scene.row.routes & {"chat", "completions"}:
            answer = await stack.enter_async_context(scene.open_stream())
        assert scene.engine.root is not None
        for process in (*scene.engine.root.children(recursive=True), scene.engine.root):
            process.kill()
        await scene.until_probe("/livez", 503)
        _, verdict, reason = await scene.probe("/livez")
        if scene.row.routes & {"chat", "completions"}:
            await read_to_end(answer)
    assert (verdict, reason) == ("dead", "engine_gone")
    await _starts_again(scene)
    return f"`{verdict}` ({reason})"


async def restart(scene: EngineScene) -> str:
    """An idle engine that is ended and started again: not started meanwhile, then served, recognised and ready."""
    await scene.until_probe("/livez", 200, "idle")
    await asyncio.to_thread(scene.engine.stop)
    await scene.until_probe("/startupz", 503)
    await _starts_again(scene)
    assert (await scene.relayed(_any_work(scene))).status == 200
    await scene.until_probe("/readyz", 200)
    return await recognition(scene)


def _stops() -> dict[str, Case]:
    found = {}
    for part in ("front", "core", "worker"):
        for when in ("idle", "in_a_stream"):
            found[f"stop_{part}_{when}"] = partial(stop, part=part, in_a_stream=when != "idle")
    return found


CASES: dict[str, Case] = {
    **{
        case.__name__: case
        for case in (
            *(recognition, series, tokens, streams, whole, tools, images, embeddings, native_routes, abort),
            *(long_prompts, canary_manners, doctor),
        )
    },
    **_stops(),
    **{case.__name__: case for case in (stop_one_of_many, bundle, kill_worker, kill_9, restart)},
}


def legend(name: str) -> str:
    """What a case holds, in one line."""
    case = CASES[name]
    text = (case.func if isinstance(case, partial) else case).__doc__ or ""
    return text.splitlines()[0]


def _any_work(scene: EngineScene) -> Call:
    if scene.row.routes & {"chat", "completions"}:
        return generate(scene.row, TEXT, max_tokens=4)
    return Call("/v1/embeddings", {"input": TEXT})


async def _is_served(scene: EngineScene) -> bool:
    return (await scene.relayed(_any_work(scene))).status == 200


def _texts(scene: EngineScene) -> list[tuple[str, dict[str, Any]]]:
    """A greedy request for each route of text, as path and body."""
    bodies = {
        "chat": ("/v1/chat/completions", client.chat(TEXT)),
        "completions": ("/v1/completions", client.completion(TEXT)),
    }
    return [bodies[route] for route in ("chat", "completions") if route in scene.row.routes]


async def _is_same(scene: EngineScene, call: Call, tenant: str = "") -> Answer:
    """The relayed answer, which is compared with the direct one."""
    direct, relayed = await scene.direct(call), await scene.relayed(call, tenant)
    assert relayed.status == direct.status, (call, direct, relayed)
    assert same(relayed.body) == same(direct.body), (call, relayed.body, direct.body)
    return relayed


def _comparable(lines: list[str]) -> Any:
    """What a stream says, and which members its events have: a null is none."""
    fields = {name for event in client.events(lines) for name, value in event.items() if value is not None}
    end = [line for line in lines[-2:] if not line.startswith("data: {")]  # transformers ends with an event, no [DONE]
    return same(client.said(lines) | {"fields": sorted(fields), "end": end})


async def _is_charged(scene: EngineScene, tenant: str, usage: dict[str, Any]) -> None:
    """Wait until the tenant's tokens are these, reported by the engine."""
    await scene.settled(tenant, "ok")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    expected = {
        "new": usage["prompt_tokens"] - cached,
        "cached": cached,
        "out": usage.get("completion_tokens") or 0,
    }
    counted = {
        kind: await scene.metric("sidecar_tokens_total", tenant=tenant, kind=kind, source="told") for kind in expected
    }
    # Streamed and whole, the cache holds more the second time: what is new and what is cached is one sum.
    assert counted["out"] == expected["out"], (tenant, counted, expected)
    assert counted["new"] + counted["cached"] == expected["new"] + expected["cached"], (tenant, counted, expected)


async def _generated(scene: EngineScene) -> float:
    """Tokens that the engine says it has generated; 0 where it does not say."""
    if "generation_tokens" not in scene.row.series:
        return 0.0
    kind = registry.KINDS[scene.row.kind]
    page = await scene.direct(Call(kind.metrics_path))
    return metrics_parser.parse(page.body.encode(), kind).generation_tokens or 0.0


def _cached(body: dict[str, Any]) -> float:
    return (body["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0.0


def _loaded(models: Answer) -> str:
    """Each model with its status, where the list says which are loaded."""
    listed = models.body["data"] if models.status == 200 else []
    return ", ".join(
        f"{each['id']} {each['status']['value']}" for each in listed if isinstance(each.get("status"), dict)
    )


def _picture(format: str) -> str:
    """A data URL of a picture with a wave in it; a JPEG says that it lies on its side."""
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    picture.putpixel((3, 5), (250, 20, 20))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, format, **({"exif": exif} if format == "JPEG" else {}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


async def _diagnoses(scene: EngineScene) -> list[dict[str, Any]]:
    async with scene.http.get(f"{scene.sidecar.admin}/diagnoses") as answer:
        found: list[dict[str, Any]] = (await answer.json())["diagnoses"]
        return found


async def _starts_again(scene: EngineScene) -> None:
    """Start the engine, and wait until the sidecar says that it has served."""
    await asyncio.to_thread(scene.engine.start, ready=False)
    patience = scene.row.start_seconds + client.WAIT
    if scene.row.unharmed:  # loads its model for a user only, never for a canary
        await client.until(partial(asyncio.to_thread, scene.engine.serves), "the engine serving", patience)
        await scene.relayed(_any_work(scene))
    await scene.until_probe("/livez", 200, "idle", seconds=patience)
    await scene.until_probe("/startupz", 200)
