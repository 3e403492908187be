"""Pure: how many sequences the prompts of a body are, and how unequal in length.

Rules: each item of a list in the prompt is a prompt of its own, unless some items are token ids: those are one. A
message is none; a conversation in a list of several is. Pairs (a query and each document) repeat what they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Final

from sidecar.load.api_routes import Api
from sidecar.load.found import Items


@dataclass(frozen=True, slots=True)
class Sequences:
    """`skew` is that of RequestSize. `repeated`: bytes of text that occur once in the body but are computed again."""

    prompts: int = 1
    skew: float = 1.0
    repeated: int = 0


ONE: Final = Sequences()


def sequences_of(items: Mapping[str, Items], api: Api) -> Sequences:
    """The prompts of a body. `items` are those of its members."""
    found = (_list(name, items[name]) for name in api.items if name in items)
    each = max(found, key=lambda texts: texts[0], default=None)
    if each is None:
        return ONE
    lists = [each, *(_list(name, items[name]) for name in api.shared if name in items)]
    count, total, squares = reduce(_pairs, lists)
    if count == 1:
        return ONE
    return Sequences(count, _skew(count, total, squares), round(total - sum(texts[1] for texts in lists)))


Texts = tuple[int, float, float]  # their number, the sum of their weights, that of the squares of these


def _list(name: str, items: Items) -> Texts:
    count = items.lists if name == "messages" else 0 if items.ids else items.number
    return (count, items.weight, items.squares) if count else (1, items.weight, float(items.weight) ** 2)


def _pairs(one: Texts, other: Texts) -> Texts:
    """The texts of both lists in pairs; all pairs if one list is a single text."""
    (m, left, left_squares), (n, right, right_squares) = one, other
    count = max(m, n)
    squares = left_squares / m + right_squares / n + 2 * (left / m) * (right / n)
    return count, count * (left / m + right / n), count * squares


def _skew(count: int, total: float, squares: float) -> float:
    """Within what is possible: 1 for equal lengths, `count` where one is all."""
    return min(float(count), max(1.0, count * squares / total**2)) if total else 1.0
