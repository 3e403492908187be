"""One completion on its way to its client: whole, as server-sent events, or as lines of JSON."""

from __future__ import annotations

import json
import time
from typing import Any

from aiohttp import web

from sidecar.tools.scripted_engine import responses
from sidecar.tools.scripted_engine.core import TokenStream
from sidecar.tools.scripted_engine.faults import Faults
from sidecar.tools.scripted_engine.requests import CompletionRequest
from sidecar.tools.scripted_engine.responses import AnswerForm


class CompletionAnswer:
    """One completion being delivered to its client."""

    content_type = "text/event-stream; charset=utf-8"

    def __init__(
        self,
        form: AnswerForm,
        id: str,
        completion: CompletionRequest,
        stream: TokenStream,
        faults: Faults,
        seed: int,
    ) -> None:
        self._form, self._id, self._completion, self._stream = form, id, completion, stream
        self._created = int(time.time())
        self._faults = faults
        self._words = responses.words(completion, seed, faults.behaviour.text)
        self._opened = not form.opens

    async def whole(self) -> web.Response:
        """Respond with all tokens at once, in JSON."""
        seen = 0
        while not self._stream.done:
            seen = await self._stream.more(seen)
        await self._wait_for_piece(1)
        return web.json_response(self._whole(self._words(self._stream.ready)))

    async def stream_to(self, request: web.Request) -> web.StreamResponse:
        """Send tokens as they are generated."""
        response = web.StreamResponse(headers={"Content-Type": self.content_type})
        await response.prepare(request)
        seen = pieces = 0
        while seen < self._completion.limit:
            ready = await self._stream.more(seen)
            if self._hidden() and not self._opened:
                await response.write(self._open())
            while ready < self._hidden():
                ready = await self._stream.more(ready)
            await self._wait_for_piece(pieces)
            await response.write(self._events(seen, ready))
            seen, pieces = ready, pieces + 1
        await response.write(self._closing(seen))
        await response.write_eof()
        return response

    def _hidden(self) -> float:
        """Tokens that are generated before the next piece is delivered."""
        behaviour = self._faults.behaviour
        hides_all = behaviour.hides_tools and self._completion.tools
        return min(self._completion.limit, self._completion.limit if hides_all else behaviour.hidden)

    async def _wait_for_piece(self, pieces: int) -> None:
        await self._faults.until(
            lambda behaviour: behaviour.answering and (behaviour.max_pieces is None or pieces < behaviour.max_pieces)
        )

    def _whole(self, text: str) -> dict[str, Any]:
        used = self._usage(self._stream.ready)
        return responses.whole(self._form, self._id, self._created, self._completion, text, used)

    def _open(self) -> bytes:
        """The chunk that starts a chat."""
        self._opened = True
        return self._chunk([responses.opening()], 0)

    def _events(self, seen: int, ready: int) -> bytes:
        """The events of the tokens from `seen` to `ready`; a chat starts with its role."""
        first = b"" if self._opened else self._open()
        finish = self._completion.finish if ready >= self._completion.limit else None
        return first + self._chunk([responses.choice(self._form, self._words(ready - seen), finish)], ready)

    def _closing(self, seen: int) -> bytes:
        if not self._completion.include_usage:
            return responses.DONE
        return self._encode([], usage=self._usage(seen)) + responses.DONE

    def _chunk(self, choices: list[dict[str, Any]], generated: int) -> bytes:
        more = {"usage": self._usage(generated)} if self._completion.continuous_usage else {}
        return self._encode(choices, **more)

    def _encode(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return responses.chunk(self._form, self._id, self._created, self._completion.model, choices, **more)

    def _usage(self, generated: int) -> dict[str, Any]:
        return responses.usage(self._completion, generated, self._stream.sequence.cached)


class NativeAnswer(CompletionAnswer):
    """The answer of /api/chat or /api/generate: lines of JSON, as Ollama sends them."""

    content_type = "application/x-ndjson"

    def _whole(self, text: str) -> dict[str, Any]:
        return self._line(text, self._stream.ready)

    def _open(self) -> bytes:
        self._opened = True
        return b""

    def _events(self, seen: int, ready: int) -> bytes:
        return json.dumps(self._line(self._words(ready - seen))).encode() + b"\n"

    def _closing(self, seen: int) -> bytes:
        return json.dumps(self._line("", seen)).encode() + b"\n"

    def _line(self, text: str, generated: int | None = None) -> dict[str, Any]:
        """One line; `generated` on the last one."""
        piece = {"message": {"role": "assistant", "content": text}} if self._form.opens else {"response": text}
        line = {"model": self._completion.model, "created_at": _written(self._created), **piece, "done": False}
        if generated is None:
            return line
        counts = {"prompt_eval_count": self._completion.prompt, "eval_count": generated}
        return line | {"done": True, "done_reason": self._completion.finish} | counts


def _written(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
