"""Pure: which model of an engine's list can be asked for without making the engine load it, and perhaps evict another.

Servers that load on demand list all models that they could serve. Some say which are loaded (`status`: llama.cpp's
router mode, transformers serve, newer llama-swap), or list those apart (Ollama's /api/ps). Otherwise a model is known
to be loaded if it is the only one (all names of one `root`, without adapters, whose `parent` it is), or if users used
it last. The only one of llama-swap may be unloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

LOADED: Final = "loaded"
# `owned_by` of servers that unload even their only model, and in older versions do not say so.
ON_DEMAND_OWNERS: Final = frozenset({"llama-swap"})
# States of llama.cpp's router mode and of transformers serve. Any other word says nothing.
NOT_LOADED: Final = frozenset({"unloaded", "loading", "downloading", "sleeping", "failed", "error"})
NONE_NAMED: Final = "the engine names no model; set --canary-model"
NONE_LOADED: Final = "no model is loaded, and a canary loads none"
SEVERAL: Final = "several models and none known to be loaded; set --canary-model"
UNSURE: Final = "its only model is loaded when users use it; set --canary-model"

Card = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """The model to ask for; where it is "", `why` there is none. `lasts`: as long as the engine's process does.

    `is_unloaded`: there is none because none is loaded. `fields`: members of a request that keep it as it was loaded.
    """

    model: str = ""
    why: str = ""
    lasts: bool = False
    is_unloaded: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


def choose(body: bytes, chosen: str = "", used: str = "") -> Choice:
    """The model of /v1/models, or of the list of loaded ones, to ask for.

    `chosen`: by an operator, listed or not. `used`: the one that users used last.
    """
    if (loaded := _loaded(body)) is not None:
        return _choose_loaded(loaded, chosen, used)
    cards = listed(body)
    says = any(_status(card) for card in cards)
    if chosen and any(_is(card, chosen) and _status(card) not in ("", LOADED) for card in cards):
        return Choice(why=f"{chosen[:80]} is not loaded, and a canary loads none", is_unloaded=True)
    if chosen:
        return Choice(chosen, lasts=not says)
    if not cards:
        return Choice(why=NONE_NAMED)
    if not says and (only := _only(cards)):
        return Choice(only[0]["id"], lasts=True)
    able = [card for card in cards if _status(card) == LOADED] if says else cards
    if used and any(_is(card, used) for card in able):
        return Choice(used)
    if says and able:
        return Choice(able[0]["id"])
    if says:
        return Choice(why=NONE_LOADED, is_unloaded=True)
    return Choice(why=SEVERAL if len(cards) > 1 else UNSURE)


def listed(body: bytes) -> list[Card]:
    """The models of a list that have a name; empty where the body is no such list."""
    try:
        cards = json.loads(body)["data"]
        return [card for card in cards if isinstance(card["id"], str) and card["id"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _loaded(body: bytes) -> list[Card] | None:
    """The models of Ollama's list of loaded ones; None where the body is another list."""
    try:
        found = json.loads(body)
        if "data" in found:
            return None
        return [model for model in found["models"] if isinstance(model["model"], str) and model["model"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _choose_loaded(models: list[Card], chosen: str, used: str) -> Choice:
    """A model that is loaded, with the context that it was loaded with: another one would make Ollama load it again."""
    wanted = chosen or used
    named = [model for model in models if wanted in (model["model"], model["model"].removesuffix(":latest"))]
    if not models or (chosen and not named):
        return Choice(
            why=f"{chosen[:80]} is not loaded, and a canary loads none" if chosen else NONE_LOADED, is_unloaded=True
        )
    model = (named or models)[0]
    context = model.get("context_length")
    is_context = isinstance(context, int) and context > 0
    return Choice(model["model"], fields={"options": {"num_ctx": context}} if is_context else {})


def _status(card: Card) -> str:
    """What a server says of a model's state; "" where it says nothing."""
    status = card.get("status")
    value = status.get("value") if isinstance(status, dict) else status
    return value if value == LOADED or value in NOT_LOADED else ""


def _is(card: Card, name: str) -> bool:
    aliases = card.get("aliases")
    return name == card["id"] or (isinstance(aliases, list) and name in aliases)


def _only(cards: list[Card]) -> list[Card]:
    """The names of the one model that there is; empty where there are several."""
    if any(card.get("owned_by") in ON_DEMAND_OWNERS for card in cards):
        return []
    bases = [card for card in cards if not card.get("parent")]
    return bases if len({str(card.get("root") or card["id"]) for card in bases}) == 1 else []
