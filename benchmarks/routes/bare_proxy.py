"""A pass-through of aiohttp and uvloop that does nothing else: what a relay on these libraries costs at the least."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web

HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host", "date", "server"})


async def serve(port: int, engine_port: int) -> None:
    """Pass everything on, until killed."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:

        async def pass_on(request: web.BaseRequest) -> web.StreamResponse:
            url = f"http://127.0.0.1:{engine_port}{request.path_qs}"
            headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
            async with session.request(request.method, url, headers=headers, data=await request.read()) as answer:
                return await send(request, answer)

        server = web.Server(pass_on, access_log=None, handler_cancellation=True)
        await asyncio.get_running_loop().create_server(server, "127.0.0.1", port, backlog=4096)
        await asyncio.Event().wait()


async def send(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """The engine's answer, to the client: chunk by chunk, or at once where its length is known."""
    headers = [(k, v) for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP]
    if answer.content_length is not None:
        return web.Response(status=answer.status, headers=headers, body=await answer.read())
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    async for chunk in answer.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response
