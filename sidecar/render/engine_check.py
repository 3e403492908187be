"""Whether an engine makes prompts as they are rendered here, and what image hashes and limits depend on.

Two conversations through the engine's own `/tokenize`: if its tokens differ, its template or tokenizer is another one
than that of the model's directory, and nothing may be rendered for it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from sidecar.errors import RequestError
from sidecar.render.protocol import CHAT, RenderCall

# (path, JSON body or None for GET) -> status and JSON
Ask = Callable[[str, dict[str, Any] | None], Awaitable[tuple[int, Any]]]
Render = Callable[[RenderCall, bytes], Awaitable[bytes]]

_TALK: Final = [
    {"role": "system", "content": "You count to 1234567890."},
    {"role": "user", "content": "Übung macht 漢字 🙂\n\n\tif (x != y) { return 'naïve'; }  "},
    {"role": "assistant", "content": "don't"},
    {"role": "user", "content": "<b>and</b>\r\nmore"},
]
_TOOL: Final = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
PROBES: Final[tuple[dict[str, Any], ...]] = (
    {"messages": _TALK},
    {"messages": [_TALK[1]], "tools": [_TOOL]},
)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What rendering depends on of an engine.

    `model`: as its command line names it; `names`: as requests may name it, without adapters; none: any.
    """

    model: str
    max_model_len: int
    names: tuple[str, ...] = ()


async def check(ask: Ask, render: Render) -> EngineFacts | str:
    """The engine's facts, or why nothing may be rendered for it. Raises what `ask` raises."""
    status, listed = await ask("/v1/models", None)
    cards = listed.get("data") if status == 200 and isinstance(listed, dict) else None
    bases = [card for card in cards or [] if isinstance(card, dict) and not card.get("parent")]
    roots = {card.get("root") for card in bases}
    if len(roots) != 1 or not isinstance(root := roots.pop(), str):
        return "the engine's /v1/models does not name one model with its root, as vLLM's does"
    most = bases[0].get("max_model_len")
    facts = EngineFacts(root, most if type(most) is int else 0, tuple(str(card.get("id")) for card in bases))
    for probe in PROBES:
        status, theirs = await ask("/tokenize", {"model": bases[0].get("id"), **probe})
        if status != 200 or not isinstance(theirs, dict):
            return f"the engine's /tokenize answers {status}"
        call = RenderCall(CHAT, engine_model=facts.model)
        try:
            ours = json.loads(await render(call, json.dumps(probe).encode()))
        except RequestError as e:
            return f"a probe is not rendered: {e}"
        if ours["token_ids"] != theirs.get("tokens"):
            return "the engine's /tokenize gives other tokens: its chat template or tokenizer is another one"
    return facts
