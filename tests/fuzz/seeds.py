"""The seeds: files of the corpus, and bodies and links of every form."""

from __future__ import annotations

import json

from ..images import corpus

MAX_SEED_BYTES = 20_000

IMAGES = (
    "data:image/png;base64,AAAA",
    "data:image/jpeg;base64,/9j/+A==",
    "data:text/plain,x",
    "https://img.example.com/a.jpg",
    "file:///a",
)
LINKS = (
    b"https://img.example.com/a.jpg?x#y",
    b"http://a.example.org:80/",
    b"http://user:word@img.example.com",
    b"//img.example.com",
    b"http://[::1]/",
    b"http://img.example.com\\@evil.net/",
    b"http://\xe2\x91\xa0.example.org/",
    b"64:ff9b::a00:1",
    b"::ffff:127.0.0.1",
    b"fe80::1%eth0",
    b"10.0.0.1",
)


REQUESTS = (
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.0\r\n\r\n",
    b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\nabc",
    b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2;a=b\r\nab\r\n0\r\nx: y\r\n\r\n",
    b"POST /d HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nab",
    b"GET /e HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\x81\x01a",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
)
ANSWERS = (
    b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\nHTTP/1.1 204 None\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;a\r\nabc\r\n0\r\nx: y\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nto the end",
    b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\x81\x01a",
)


def bodies() -> list[bytes]:
    """Request bodies: chat and responses, indented, escaped, in other encodings, cut off."""
    made = []
    for image in IMAGES:
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": image}]
        chat = {"model": "m", "stream": True, "messages": [{"role": "user", "content": parts}]}
        answer = {"input": [{"content": [{"type": "input_image", "image_url": image}]}], "stream_options": {"a": 1}}
        for body in (chat, answer):
            text = json.dumps(body)
            made += [
                text.encode(),
                text.replace("/", "\\/").encode(),
                json.dumps(body, indent=1).encode(),
                text.encode("utf-16"),
                text.encode("utf-16-le"),
                text.encode("utf-32"),
                text.encode("utf-8-sig"),
                text[:-9].encode(),
            ]
    return [
        *made,
        b'{"a":NaN,"a":1}',
        b"[1]",
        b'{"data:;base64,\\"":1}',
        b'{"data:image/png;base64,AAAA":"\xed\xa0\x80"}',
    ]


def of(target: str) -> list[bytes]:
    """The seeds of a target."""
    files = (data for data in corpus.all_files().values() if len(data) <= MAX_SEED_BYTES)
    made = {"header": lambda: list(files), "body": bodies, "scan": bodies, "link": lambda: list(LINKS)}
    made |= {"request": lambda: list(REQUESTS), "answer": lambda: list(ANSWERS)}
    return made[target]()
