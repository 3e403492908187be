"""Images behind links: fetched from where the operator allows, within bounds, and from nowhere else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sidecar.errors import BadImage, ImagesBusy
from sidecar.events import ImagePrepared
from sidecar.relay import url_policy
from sidecar.relay.media import fetch as fetching
from sidecar.relay.media.fetch import Fetcher
from sidecar.relay.media.inline import MAX_IMAGES, MAX_LINKS_AT_ONCE

from ..pictures import Prepared, Workers
from ..work import echo

PIXELS = b"\xff\xd8\xff" + bytes(range(256)) * 40
SECRET = "169.254.169.254"


class Names(AbstractResolver):
    """A test name server: each query gets the next list of addresses, later ones the last."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): rows for name, rows in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[Any]:
        self.asked.append(host)
        rows = self.answers.get(host)
        if rows is None:
            raise OSError(f"no such name: {host}")
        addresses = rows[min(self.asked.count(host), len(rows)) - 1]
        return [
            ResolveResult(hostname=host, host=a, port=port, family=socket.AF_INET, proto=0, flags=0) for a in addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


class Web:
    """A server of pictures on the loopback address, known as img.test and other.test."""

    def __init__(self) -> None:
        self.requests: list[web.BaseRequest] = []
        self.met = asyncio.Event()  # somebody has asked for /slow
        self.release = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        port = request.url.port
        match request.path.split("/")[1:]:
            case ["to", *rest]:
                return web.Response(status=302, headers={"location": "/" + "/".join(rest)})
            case ["go"]:
                return web.Response(status=307, headers={"location": request.query["to"].replace("PORT", str(port))})
            case ["loop"]:
                return web.Response(status=301, headers={"location": "/loop"})
            case ["nowhere"]:
                return web.Response(status=302)
            case ["long"]:
                return web.Response(body=bytes(1_000_001))
            case ["chunked"]:
                response = web.StreamResponse()
                await response.prepare(request)
                with contextlib.suppress(ConnectionError):
                    for _ in range(40):
                        await response.write(bytes(100_000))
                return response
            case ["broken"]:
                response = web.StreamResponse(headers={"content-length": "5000"})
                await response.prepare(request)
                await response.write(b"abc")
                assert request.transport is not None
                request.transport.close()
                return response
            case ["slow"]:
                self.met.set()
                await self.release.wait()
            case ["zip"]:
                return web.Response(body=b"\x1f\x8b", headers={"content-encoding": "gzip"})
            case ["missing"]:
                return web.Response(status=404, text="secret of the intranet")
        return web.Response(body=PIXELS, content_type="text/html", headers={"set-cookie": "a=b"})


Make = Callable[..., Fetcher]


@pytest.fixture
async def pictures_web(serve: Callable[..., Awaitable[str]]) -> AsyncIterator[tuple[Web, int]]:
    """The server and its port."""
    site = Web()
    yield site, URL(await serve(site.handle)).port or 0
    site.release.set()


@pytest.fixture
async def make(pictures_web: tuple[Web, int]) -> AsyncIterator[Make]:
    """A function: names, options -> a fetcher that may go to img.test and other.test."""
    _, port = pictures_web
    async with contextlib.AsyncExitStack() as stack:

        def made(names: Names | None = None, **options: Any) -> Fetcher:
            names = names or Names(img_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
            options = {"is_permitted": lambda address: address == "127.0.0.1", **options}
            among = url_policy.parse_domains(f"img.test:{port},other.test:{port},127.0.0.1:{port},{SECRET}:{port}")
            fetcher = Fetcher(among, 1_000_000, resolver=names, **options)
            stack.push_async_callback(fetcher.close)
            return fetcher

        yield made


async def fails(fetcher: Fetcher, link: str) -> BadImage:
    """The error of a link, which must quote neither the link nor an address."""
    with pytest.raises(BadImage) as refused:
        await fetcher.fetch(link, "messages[0].content[1]")
    text = str(refused.value)
    assert text.startswith("messages[0].content[1]: ") and refused.value.status == 400
    assert not any(word in text for word in ("127.", SECRET, "img.test", "evil", "404", "secret"))
    return refused.value


async def test_an_image_is_fetched_and_nothing_goes_along(make: Make, pictures_web: tuple[Web, int]) -> None:
    """The bytes come as they are, whatever type the server names; no cookie is kept, no credentials are sent."""
    site, port = pictures_web
    fetcher = make()
    for _ in range(2):
        assert await fetcher.fetch(f"http://img.test:{port}/a.jpg?x=1", "x") == PIXELS
    for request in site.requests:
        assert {name.lower() for name in request.headers} == {
            "host",
            "accept",
            "accept-encoding",
            "connection",
            "user-agent",
        }
        assert request.path_qs == "/a.jpg?x=1"


async def test_redirects_are_followed_within_the_list(make: Make, pictures_web: tuple[Web, int]) -> None:
    """Three hops, relative or to another listed host, are followed; the fourth is not."""
    _, port = pictures_web
    fetcher = make()
    assert await fetcher.fetch(f"http://img.test:{port}/to/to/to/a", "x") == PIXELS
    assert await fetcher.fetch(f"http://img.test:{port}/go?to=//other.test:PORT/a", "x") == PIXELS
    assert (await fails(fetcher, f"http://img.test:{port}/to/to/to/to/a")).reason == "image_url_failed"
    assert (await fails(fetcher, f"http://img.test:{port}/loop")).reason == "image_url_failed"


@pytest.mark.parametrize(
    "onward",
    [
        "http://evil.test/",
        "//evil.test:PORT/",
        f"http://{SECRET}:PORT/",
        "file:///etc/passwd",
        "http://[",
        "gopher://img.test:PORT/",
    ],
)
async def test_a_redirect_elsewhere_is_not_followed(make: Make, pictures_web: tuple[Web, int], onward: str) -> None:
    """Another host, a private address though it is listed, another scheme, and what is no URL end the fetch."""
    site, port = pictures_web
    names = Names(img_test=[["127.0.0.1"]], evil_test=[["127.0.0.1"]])
    assert (await fails(make(names), f"http://img.test:{port}/go?to={onward}")).reason == "image_url_failed"
    assert len(site.requests) == 1 and names.asked == ["img.test"]


async def test_a_name_is_resolved_once_and_judged(make: Make, pictures_web: tuple[Web, int]) -> None:
    """The connection goes to the checked address; a name that turns private later is refused without a connection."""
    site, port = pictures_web
    names = Names(img_test=[["127.0.0.1"], [SECRET]])
    fetcher = make(names)
    assert await fetcher.fetch(f"http://img.test:{port}/a", "x") == PIXELS
    assert names.asked == ["img.test"]
    assert (await fails(fetcher, f"http://img.test:{port}/a")).reason == "image_url_failed"
    assert len(site.requests) == 1


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.0.0.1"], [SECRET], ["1.1.1.1", "127.0.0.1"], []], ids=str)
async def test_private_addresses_are_refused(make: Make, pictures_web: tuple[Web, int], addresses: list[str]) -> None:
    """By default a listed name with an address that is not public is refused without a connection."""
    site, port = pictures_web
    fetcher = make(Names(img_test=[addresses]), is_permitted=url_policy.is_public)
    unknown = await fails(fetcher, f"http://other.test:{port}/a")
    refused = await fails(fetcher, f"http://img.test:{port}/a")
    assert str(refused) == str(unknown), "a private name and an unknown one must look alike"
    assert (await fails(fetcher, f"http://127.0.0.1:{port}/a")).reason == "image_url_failed"
    assert not site.requests


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("long", "image_too_large"),
        ("chunked", "image_too_large"),
        ("broken", "image_url_failed"),
        ("zip", "image_url_failed"),
        ("missing", "image_url_failed"),
        ("nowhere", "image_url_failed"),
    ],
)
async def test_what_cannot_be_taken(make: Make, pictures_web: tuple[Web, int], path: str, reason: str) -> None:
    """Too long, cut off, packed, missing: each ends in its own refusal."""
    _, port = pictures_web
    assert (await fails(make(), f"http://img.test:{port}/{path}")).reason == reason


async def test_a_host_that_is_not_listed_is_refused_unasked(make: Make) -> None:
    """Not even its name is looked up."""
    names = Names(evil_test=[["127.0.0.1"]])
    assert (await fails(make(names), "http://evil.test/a")).reason == "image_url"
    assert not names.asked


async def test_no_tls_no_image(make: Make, pictures_web: tuple[Web, int]) -> None:
    """A server that does not prove who it is gives no image."""
    _, port = pictures_web
    assert (await fails(make(), f"https://img.test:{port}/a")).reason == "image_url_failed"


async def test_slow_servers_and_full_places(
    make: Make, pictures_web: tuple[Web, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch ends with its timeout; one that found no slot by then gets a 503 to retry."""
    site, port = pictures_web
    monkeypatch.setattr(fetching, "MAX_CONCURRENT_FETCHES", 1)
    fetcher = make(timeout_s=0.3)
    first = asyncio.create_task(fails(fetcher, f"http://img.test:{port}/slow"))
    await site.met.wait()
    fetcher._timeout_s = 0.01
    with pytest.raises(ImagesBusy):
        await fetcher.fetch(f"http://img.test:{port}/a", "x")
    assert (await first).reason == "image_url_failed"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*urls: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": [part(url) for url in urls]}]}


class Bytes(Workers):
    """Image workers that look at what they get."""

    async def hand_over(
        self, data: Any, where: str, tenant: str, request: str, handoffs: Any, is_base64: bool, max_small_chars: int
    ) -> Prepared:
        assert not is_base64
        if bytes(data) != PIXELS:
            return await super().hand_over(data, where, tenant, request, handoffs, is_base64, max_small_chars)
        self.started.set()
        return Prepared(b"Qk0=")


async def test_the_relay_puts_a_fetched_image_in_the_links_place(
    rig: Any, serve: Any, make: Make, pictures_web: tuple[Web, int]
) -> None:
    """The engine gets the prepared image instead of the link; the time of fetching is reported as a stage."""
    _, port = pictures_web
    r = await rig(await serve(echo), images=Bytes(), fetch=make().fetch)
    async with r.client.post(r.url + "/v1/chat/completions", json=chat(f"http://img.test:{port}/a")) as got:
        [sent] = (await got.json(content_type=None))["messages"][0]["content"]
    assert sent["image_url"] == {"url": "data:image/bmp;base64,Qk0="} and sent["uuid"]
    [imaged] = r.emitted.of(ImagePrepared)
    assert [stage for stage, _ in imaged.stages] == ["fetch", "decode"]


async def test_an_image_that_passes_is_not_fetched_twice(rig: Any, serve: Any) -> None:
    """What the workers leave to the engine goes on as the bytes that were fetched, in a data URL."""

    async def fetch(link: str, where: str) -> bytes:
        return b"PASS"

    class Passing(Bytes):
        async def hand_over(self, *args: Any, **kwargs: Any) -> Prepared:
            prepared = await super().hand_over(*args, **kwargs)
            prepared.outcome = "passed"
            return prepared

    r = await rig(await serve(echo), images=Passing(), fetch=fetch)
    async with r.client.post(r.url + "/v1/chat/completions", json=chat("https://img.test/a")) as got:
        assert (await got.json(content_type=None))["messages"] == chat("data:image/png;base64,UEFTUw==")["messages"]


async def test_links_over_what_is_prepared_are_fetched_and_pass(rig: Any, serve: Any) -> None:
    """An engine takes any number of images, so the sidecar follows their links, some at once, and passes the rest."""
    at_once = most = 0
    enough = asyncio.Event()

    async def fetch(link: str, where: str) -> bytes:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == MAX_LINKS_AT_ONCE:
            enough.set()
        await enough.wait()
        at_once -= 1
        return link[-2:].encode()

    links = [f"https://img.test/{index:02}" for index in range(MAX_IMAGES + 10)]
    r = await rig(await serve(echo), images=Bytes(), fetch=fetch)
    async with r.client.post(r.url + "/v1/chat/completions", json=chat(*links)) as got:
        assert got.status == 200
        content = (await got.json(content_type=None))["messages"][0]["content"]
    sent = [part["image_url"]["url"].partition(",")[2] for part in content]
    assert sent[MAX_IMAGES:] == [base64.b64encode(link[-2:].encode()).decode() for link in links[MAX_IMAGES:]]
    assert most == MAX_LINKS_AT_ONCE
    reasons = [image.reason for image in r.emitted.of(ImagePrepared)]
    assert reasons.count("count") == 10 and len(reasons) == len(links)


async def test_what_links_bring_counts_as_the_body_does(rig: Any, serve: Any) -> None:
    """A short body of links is refused where its images as data URLs would be, and holds memory like them."""

    async def fetch(link: str, where: str) -> bytes:
        return bytes(300)

    body = chat(*[f"https://img.test/{index}" for index in range(10)])
    for limit, status, code in ((10_000, 200, ""), (3_000, 413, "body_too_large")):
        assert len(json.dumps(body)) < 3_000
        r = await rig(await serve(echo), images=Bytes(), fetch=fetch, max_body_bytes=limit)
        async with r.client.post(r.url + "/v1/chat/completions", json=body) as got:
            assert got.status == status
            assert not code or (await got.json())["error"]["code"] == code


async def test_the_relay_refuses_what_may_not_be_fetched(rig: Any, serve: Any, make: Make) -> None:
    """The error names the part, and the engine receives nothing."""
    r = await rig(await serve(echo), images=Workers(), fetch=make().fetch)
    async with r.client.post(r.url + "/v1/chat/completions", json=chat("http://evil.test/a")) as got:
        error = (await got.json())["error"]
    assert (got.status, error["code"]) == (400, "image_url") and "messages[0].content[0]" in error["message"]


@pytest.mark.parametrize("url", ["http://evil.test/a", "file:///etc/passwd"])
async def test_links_are_the_engines_where_fetching_is_off(rig: Any, serve: Any, url: str) -> None:
    """By default a link goes to the engine as it came, and with fetching on one that is not http still does."""
    for fetch in (None,) if url.startswith("http") else (None, Fetcher.fetch):
        r = await rig(await serve(echo), images=Workers(), fetch=fetch)
        async with r.client.post(r.url + "/v1/chat/completions", json=chat(url)) as got:
            assert await got.json(content_type=None) == chat(url)
