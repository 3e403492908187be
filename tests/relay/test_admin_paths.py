"""Paths that control the engine: refused from other machines unless the setting lets them pass."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.errors import AdminPathRefused
from sidecar.relay import admin_paths
from sidecar.relay.engine_pauses import PAUSE_ROUTES, route_of

from ..ports import outer_address
from .test_relay_process import relay_process as relay_process
from .work import echo

OTHER = "10.1.2.3"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in PAUSE_ROUTES),
        ("GET", "/flush_cache"),
        ("PUT", "/set_internal_state"),
        ("PUT", "/hicache/storage-backend"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/collective_rpc"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/props"),
        ("POST", "/slots/0"),
        ("POST", "/models/unload"),
        *(("POST", path) for path in ("/sleep%0A", "/sleep#x", "/slee%70", "/%u0073leep", "/v1%2Fload_lora_adapter")),
        ("DELETE", "/models"),
        ("DELETE", "/api/delete"),
        ("POST", "/%73leep"),
        ("POST", "/flush%5Fcache"),
        ("POST", "/%61pi%2Fpull"),
        ("POST", "/prefix/sleep"),  # with vLLM's --root-path /prefix
        ("POST", "/a/b/v1/load_lora_adapter"),
    ],
)
def test_what_changes_the_engine_for_all_is_control(method: str, path: str) -> None:
    """Each is refused from another machine, passes from this one, and from everywhere if the setting says so."""
    with pytest.raises(AdminPathRefused, match="--admin-paths pass"):
        admin_paths.check("refuse", method, path, OTHER)
    admin_paths.check("refuse", method, path, "127.0.0.1")
    admin_paths.check("pass", method, path, OTHER)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("POST", "/generate"),
        ("POST", "/tokenize"),
        ("POST", "/open_session"),
        ("POST", "/api/chat"),
        ("POST", "/api/show"),
        ("GET", "/props"),
        ("GET", "/slots"),
        ("GET", "/models"),
        ("GET", "/lora-adapters"),
        ("GET", "/is_sleeping"),
        ("GET", "/server_info"),
        ("GET", "/hicache/storage-backend"),
        ("OPTIONS", "/sleep"),
    ],
)
def test_use_and_reading_are_no_control(method: str, path: str) -> None:
    """What users need, and what routers and monitors read, passes from everywhere."""
    admin_paths.check("refuse", method, path, OTHER)


@pytest.mark.parametrize(
    ("peer", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("localhost", False),
        ("", False),
        (None, False),
    ],
)
def test_who_is_of_this_machine(peer: str | None, is_ours: bool) -> None:
    """By address only, as the kernel gives it; one that is not known is another machine's."""
    assert admin_paths.is_loopback(peer) is is_ours


def test_a_pause_is_known_however_its_path_is_written() -> None:
    """Engines decode a path before they look it up."""
    assert route_of("POST", "/%73leep") == PAUSE_ROUTES["/sleep"]
    assert route_of("POST", "/%2573leep") is None


@pytest.mark.parametrize("forwarded", [{}, {"x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1"}])
async def test_another_machine_is_refused_by_a_relay(relay_process: Any, serve: Any, forwarded: dict[str, str]) -> None:
    """The engine gets nothing; the error is OpenAI's, and says how to allow it; no header makes a client local."""
    seen: list[str] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.path)
        return await echo(request)

    process = await relay_process(await serve(engine))
    other = f"http://{outer_address()}:{process.port}"
    async with aiohttp.ClientSession(headers=forwarded) as client:
        for path in ("/sleep", "/flush_cache"):
            async with client.post(other + path, data=b"x") as got:
                assert got.status == 403
                error = (await got.json())["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "admin_path_refused")
            assert "--admin-paths pass" in error["message"]
        assert seen == []
        async with client.post(other + "/tokenize", data=b"x") as got:
            assert got.status == 200
        async with client.post(process.url + "/sleep", data=b"x") as got:
            assert (got.status, await got.read()) == (200, b"x")
    assert seen == ["/tokenize", "/sleep"]


async def test_a_relay_lets_all_through_if_told_so(relay_process: Any, serve: Any) -> None:
    """--admin-paths pass."""
    process = await relay_process(await serve(echo), admin_paths="pass")
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"http://{outer_address()}:{process.port}/sleep", data=b"x") as got,
    ):
        assert (got.status, await got.read()) == (200, b"x")
