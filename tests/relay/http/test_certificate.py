"""TLS on the relay's own port."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.errors import UsageError
from sidecar.launch.preflight import check_certificate
from sidecar.relay.http.certificate import Certificate
from sidecar.settings import Settings
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ...certificates import Authority
from ..work import CHAT, FAST

NONE = Settings(engine="http://127.0.0.1:1")


async def test_requests_come_over_tls(rig: Any, tmp_path: Path) -> None:
    """Requests and streams are served; the engine learns how its client came."""
    authority = Authority(tmp_path)
    cert, key = authority.issue()
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url, tls_cert=str(cert), tls_key=str(key))
        assert r.relay.certificate is not None
        accepting = await asyncio.get_running_loop().create_server(
            r.relay.server, "127.0.0.1", 0, ssl=r.relay.certificate.context
        )
        url = f"https://127.0.0.1:{accepting.sockets[0].getsockname()[1]}/v1/chat/completions"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=authority.trust())) as client:
            for stream in (False, True):
                async with client.post(url, json={**CHAT, "stream": stream}) as got:
                    assert got.status == 200 and await got.read()
        accepting.close()


async def test_a_certificate_that_changes_is_read_again(tmp_path: Path) -> None:
    """Handshakes from then on get the new one; amid a swap the old one stays."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("127.0.0.1")
    of = Certificate(str(cert), str(key))
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=of.context)

    async def serial() -> int:
        address = server.sockets[0].getsockname()
        _, writer = await asyncio.open_connection(*address, ssl=authority.trust())
        found = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        return int(found, 16)

    before = await serial()
    of.refresh()
    assert await serial() == before
    new_cert, new_key = authority.issue("127.0.0.1", (-1, 2))
    new_cert.replace(cert)
    of.refresh()
    assert await serial() == before, "its key has not come yet"
    new_key.replace(key)
    of.refresh()
    assert await serial() != before
    server.close()


def test_what_is_no_certificate_ends_the_start(tmp_path: Path) -> None:
    """Both files or none, and each of the other."""
    authority = Authority(tmp_path)
    cert, key = map(str, authority.issue())
    check_certificate(NONE)
    check_certificate(replace(NONE, tls_cert=cert, tls_key=key))
    with pytest.raises(UsageError, match="both, or none"):
        check_certificate(replace(NONE, tls_cert=cert))
    with pytest.raises(UsageError, match="not a certificate"):
        check_certificate(replace(NONE, tls_cert=key, tls_key=key))
