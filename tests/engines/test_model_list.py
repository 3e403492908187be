"""Which of the models that an engine lists a canary may ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engines.model_list import NONE_LOADED, NONE_NAMED, SEVERAL, Choice, choose


def card(id: str, status: str = "", **more: Any) -> dict[str, Any]:
    return {"id": id, "object": "model", **({"status": {"value": status}} if status else {}), **more}


def body(*cards: Any) -> bytes:
    return json.dumps({"object": "list", "data": cards}).encode()


VLLM = (
    card("base", root="org/model", parent=None),
    card("alias", root="org/model", parent=None),
    card("adapter", root="/adapters/one", parent="base"),
)


@pytest.mark.parametrize(
    ("cards", "used", "expected"),
    [
        ((), "", Choice(why=NONE_NAMED)),
        ((card("a"),), "", Choice("a", lasts=True)),
        ((card("a"), card("b")), "", Choice(why=SEVERAL)),
        ((card("a"), card("b")), "b", Choice("b")),
        ((card("a"), card("b")), "gone", Choice(why=SEVERAL)),
        ((card("a", "unloaded"),), "a", Choice(why=NONE_LOADED, is_unloaded=True)),
        ((card("a", "unloaded"), card("b", "loaded")), "", Choice("b")),
        ((card("a", "unloaded"), card("b", "loaded")), "a", Choice("b")),
        ((card("a", "loaded"), card("b", "loaded")), "b", Choice("b")),
        ((card("a", "loaded"), card("b", "loaded", aliases=["friend"])), "friend", Choice("friend")),
        (
            (card("a", "loading"), card("b", "sleeping"), card("c", "downloading")),
            "b",
            Choice(why=NONE_LOADED, is_unloaded=True),
        ),
        ((card("a"), card("b", "unloaded")), "a", Choice(why=NONE_LOADED, is_unloaded=True)),
        (VLLM, "adapter", Choice("base", lasts=True)),
        ((VLLM[2], VLLM[0]), "", Choice("base", lasts=True)),
        ((card("x", parent="gone"), card("y", parent="gone")), "", Choice(why=SEVERAL)),
    ],
)
def test_only_a_model_that_need_not_be_loaded_is_asked_for(cards: Any, used: str, expected: Choice) -> None:
    """One that is loaded, the only one, or the one that users used last; never another."""
    assert choose(body(*cards), used=used) == expected


@pytest.mark.parametrize(
    ("cards", "model", "lasts"),
    [
        ((card("a"), card("b")), "b", True),
        ((card("a"),), "unlisted", True),
        ((), "unlisted", True),
        ((card("a", "loaded"), card("b", "unloaded")), "a", False),
        ((card("a", "loaded"), card("b", "unloaded")), "b", False),
    ],
)
def test_an_operators_choice_is_asked_for_unless_it_is_not_loaded(cards: Any, model: str, lasts: bool) -> None:
    """--canary-model names what is asked for, listed or not; a status that says `unloaded` counts for more."""
    found = choose(body(*cards), chosen=model, used="a")
    if any(c["id"] == model and c.get("status") == {"value": "unloaded"} for c in cards):
        assert not found.model and f"{model} is not loaded" in found.why
    else:
        assert found == Choice(model, lasts=lasts)


@given(st.one_of(st.binary(max_size=100), st.recursive(st.none() | st.text() | st.integers(), st.lists).map(body)))
def test_any_bytes_are_a_choice(noise: bytes) -> None:
    """Whatever an engine says of its models, a name that it did not say is never asked for."""
    found = choose(noise, used="x")
    assert bool(found.model) != bool(found.why)


def test_an_unknown_word_for_a_models_state_says_nothing() -> None:
    """A server with words of its own for a model that serves is asked as one that says nothing."""
    body = json.dumps({"data": [{"id": "a", "status": "ready"}]}).encode()
    assert choose(body).model == choose(body, chosen="a").model == "a"


def loaded(*names: str, context: int = 4096) -> bytes:
    return json.dumps({"models": [{"model": name, "context_length": context} for name in names]}).encode()


@pytest.mark.parametrize(
    ("names", "chosen", "used", "model"),
    [
        (("a:latest", "b:7b"), "", "", "a:latest"),
        (("a:latest", "b:7b"), "", "b:7b", "b:7b"),
        (("b:7b", "a:latest"), "", "a", "a:latest"),
        (("a:latest",), "", "gone", "a:latest"),
        (("b:7b", "a:latest"), "a", "b:7b", "a:latest"),
    ],
)
def test_a_list_of_what_is_loaded_decides(names: tuple[str, ...], chosen: str, used: str, model: str) -> None:
    """Ollama lists what is loaded: one of those is asked for, with its context, by its full name."""
    assert choose(loaded(*names), chosen, used) == Choice(model, fields={"options": {"num_ctx": 4096}})


@pytest.mark.parametrize(("names", "chosen"), [((), ""), ((), "a"), (("b:7b",), "a")])
def test_what_is_not_on_that_list_is_not_asked_for(names: tuple[str, ...], chosen: str) -> None:
    """None loaded, or not the one that an operator chose: no request."""
    found = choose(loaded(*names), chosen, "a")
    assert not found.model and found.is_unloaded and "loads none" in found.why


def test_the_only_model_of_a_server_that_unloads_it_is_asked_for_once_it_is_used() -> None:
    """An older llama-swap lists its one model whether it is loaded or not."""
    cards = (card("a", owned_by="llama-swap"),)
    assert not choose(body(*cards)).model and choose(body(*cards), used="a") == Choice("a")
