"""One render worker: requests on standard input, answers on standard output, one after the other.

It ends with its parent. It is a process of its own because a template runs for as long as it likes, and only a process
can be ended from outside.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any, BinaryIO

from sidecar.errors import Internal, RequestError, SidecarError, place_of
from sidecar.render.protocol import LENGTHS, RenderCall, RenderSettings, frame
from sidecar.render.renderer import Renderer
from sidecar.runtime import logs, prctl

_log = logging.getLogger(__name__)


def main() -> int:
    """Serve until standard input ends. Returns 0."""
    prctl.die_with(int(sys.argv[1]))
    logs.setup("info")
    warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, which is the client's
    pipe_in, pipe_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    first = _receive(pipe_in)
    if first is None:
        return 0
    head, _ = first
    try:
        renderer = Renderer(RenderSettings(**head["settings"]))
    except SidecarError as e:
        _send(pipe_out, {"error": str(e)}, b"")
        return 0
    _send(pipe_out, {"no_images": renderer.no_images}, b"")
    while (received := _receive(pipe_in)) is not None:
        _send(pipe_out, *answer(renderer, *received))
    return 0


def answer(renderer: Renderer, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """The answer to one request: its status, and for an error which one."""
    try:
        return {"status": 200}, renderer.render(RenderCall(**head), body)
    except RequestError as e:
        error: RequestError = e
    except Exception as e:  # noqa: BLE001  # the border: a defect costs one request, and its place is logged
        _log.error("rendering failed: %s at %s", type(e).__name__, place_of(e))
        error = Internal("internal error of the sidecar")
    return {"status": error.status, "code": error.code}, str(error).encode(errors="replace")


def _receive(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None at the end."""
    lengths = pipe.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, body = LENGTHS.unpack(lengths)
    return json.loads(pipe.read(head)), pipe.read(body)


def _send(pipe: BinaryIO, head: dict[str, Any], body: bytes) -> None:
    for piece in frame(head, body):
        pipe.write(piece)
    pipe.flush()


if __name__ == "__main__":
    sys.exit(main())
