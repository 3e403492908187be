"""How long one request holds everybody else's stream: a stream of a chunk each millisecond next to one large body.

    python benchmarks/loop_hold.py [--rivals NAMES] [--rounds N] [--megabytes N] [--quick] [--write]

Each chunk carries the time when the engine wrote it. The longest time until the client has it, from the first byte of
the body to a moment after its answer, is how long the relay's event loop was held, on top of what the machine itself
holds up: the direct row and the empty shape show that. A body goes to the same engine, which reads it without parsing.
Of several rounds the median and the longest are printed.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routes import ends, processes
from routes.ends import Load, LoadClient
from routes.report import heading, publish, table
from routes.rivals import DIRECT, RIVALS, Route, serving

PROBE = Load(connections=1, chunks=1_000_000, pace_ms=1.0)
AFTER_S = 0.1  # a chunk that was held has come by then
TARGET_MS, TARGET_MS_PER_MB = 5.0, 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A body of about `size` bytes, sent `at_once` times."""

    name: str
    body: Callable[[int], bytes]
    at_once: int = 1


@dataclass(frozen=True, slots=True)
class Hold:
    """One round of a shape: how long the probe was held, the statuses, and the probe streams that broke."""

    ms: float
    statuses: tuple[int, ...]
    broken: int


def chat(content: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}).encode()


def repeated(before: bytes, piece: bytes, after: bytes, size: int) -> bytes:
    """A list of as many pieces as fit."""
    return before + b",".join(itertools.repeat(piece, max(1, size // (len(piece) + 1)))) + after


def empty_messages(size: int) -> bytes:
    return repeated(b'{"model":"m","max_tokens":1,"messages":[', b"{}", b"]}", size)


def short_messages(size: int) -> bytes:
    return repeated(b'{"model":"m","max_tokens":1,"messages":[', b'{"role":"user","content":"Go on."}', b"]}", size)


def text_parts(size: int) -> bytes:
    start = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":['
    return repeated(start, b'{"type":"text","text":"Go on."}', b"]}]}", size)


def token_ids(size: int) -> bytes:
    return repeated(b'{"model":"m","max_tokens":1,"prompt":[', b"12345", b"]}", size)


def long_text(size: int) -> bytes:
    return chat("Say one word. " * (size // 14))


def escaped_text(size: int) -> bytes:
    return chat("é" * (size // 6))


def quoted_text(size: int) -> bytes:
    return chat('"' * (size // 2))


def image(size: int) -> bytes:
    data = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(size * 3 // 4)).decode()
    return chat([{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}])


def many_keys(size: int) -> bytes:
    keys = b",".join(b'"k%07d":0' % i for i in range(size // 13))
    return b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"Go on."}],' + keys + b"}"


def same_key(size: int) -> bytes:
    return repeated(b'{"messages":[{"role":"user","content":"Go on."}],', b'"model":"m"', b"}", size)


def tools(size: int) -> bytes:
    tool = b'{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"a":{}}}}}'
    return repeated(b'{"model":"m","messages":[{"role":"user","content":"Go on."}],"tools":[', tool, b"]}", size)


def nested(size: int) -> bytes:
    depth = size // 2
    return b'{"model":"m","messages":[{"role":"user","content":"Go on."}],"x":' + b"[" * depth + b"]" * depth + b"}"


def unfinished(size: int) -> bytes:
    return empty_messages(size)[:-2]


def white_space(size: int) -> bytes:
    return b" " * size + chat("Go on.")


SHAPES = (
    Shape("a short chat", lambda _: chat("Go on.")),
    Shape("empty messages", empty_messages),
    Shape("empty messages, six bodies at once", empty_messages, at_once=6),
    Shape("short messages", short_messages),
    Shape("one long text", long_text),
    Shape("one text of escapes", escaped_text),
    Shape("one text of quotes", quoted_text),
    Shape("short text parts", text_parts),
    Shape("an image", image),
    Shape("token ids", token_ids),
    Shape("many keys", many_keys),
    Shape("one key, repeated", same_key),
    Shape("tools", tools),
    Shape("nested lists", nested),
    Shape("cut off", unfinished),
    Shape("white space", white_space),
)


def send(port: int, body: bytes) -> int:
    """The status of the answer; 0: the connection broke."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


def hold(client: LoadClient, route: Route, shape: Shape, body: bytes) -> Hold:
    """Send a shape next to the probe."""
    client.until_all_answered(PROBE.connections)
    with concurrent.futures.ThreadPoolExecutor(shape.at_once) as pool:
        client.look()
        statuses = tuple(pool.map(lambda _: send(route.port, body), range(shape.at_once)))
    time.sleep(AFTER_S)
    figures = client.look()
    return Hold(max(figures.max_us, figures.max_gap_us - PROBE.pace_ms * 1e3) / 1e3, statuses, figures.errors)


Holds = dict[tuple[str, str], list[Hold]]


def run(names: list[str], bodies: dict[Shape, bytes], rounds: int) -> Holds:
    """All shapes through all routes, in turns."""
    holds: Holds = defaultdict(list)
    with ExitStack() as stack:
        engine_port = stack.enter_context(ends.engine())
        routes = [
            stack.enter_context(serving(rival, engine_port, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            for rival in RIVALS
            if rival.name in names
        ]
        clients = [(route, stack.enter_context(ends.client(route.port, PROBE))) for route in routes]
        for turn, (shape, body) in itertools.product(range(rounds), bodies.items()):
            print(f"round {turn + 1} of {rounds}: {shape.name}", file=sys.stderr, flush=True)
            for route, client in clients:
                holds[shape.name, route.rival.name].append(hold(client, route, shape, body))
    return holds


def cell(several: list[Hold]) -> str:
    """Median and longest, ms, and what else there is to say."""
    times = [h.ms for h in several]
    statuses = sorted({status for h in several for status in h.statuses} - {200})
    broken = sum(h.broken for h in several)
    rest = [*(f"status {s}" if s else "no answer" for s in statuses)]
    rest += [f"{broken} probe streams broken"] if broken else []
    return f"{statistics.median(times):.1f} / {max(times):.1f}" + (f" ({', '.join(rest)})" if rest else "")


def row(holds: Holds, names: list[str], shape: Shape, size: int) -> list[str]:
    mb = size / 1e6
    each = statistics.median(h.ms for h in holds[shape.name, names[-1]]) / mb / shape.at_once
    return [shape.name, f"{mb:.1f}", *(cell(holds[shape.name, n]) for n in names), f"{each:.2f}" if mb > 0.1 else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", default="sidecar", help="besides direct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=15.5)
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    wanted = {DIRECT.name, *args.rivals.split(",")}
    names = [rival.name for rival in RIVALS if rival.name in wanted]
    rounds, size = (1, 100_000) if args.quick else (args.rounds, round(args.megabytes * 1e6))
    ends.program()
    processes.stay_off_the_route()
    bodies = {shape: shape.body(size) for shape in SHAPES[: 4 if args.quick else None]}
    holds = run(names, bodies, rounds)
    remark = (
        f"load {os.getloadavg()[0]:.1f}. Median / longest; target {TARGET_MS:.0f} ms, {TARGET_MS_PER_MB:.0f} per MB."
    )
    head = ["body", "MB", *(f"{name}, ms" for name in names), f"{names[-1]}, ms per MB"]
    rows = [row(holds, names, shape, len(body)) for shape, body in bodies.items()]
    lines = [*heading("How long one request holds other streams", remark), *table(head, rows)]
    publish(lines, "loop-hold" if args.write else "")


if __name__ == "__main__":
    main()
