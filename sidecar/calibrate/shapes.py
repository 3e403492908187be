"""Pure: which request shapes are measured, and which of them are held out.

Rules: sizes are shares of the engine's context length, so that the same plan fits a model of 4k and one of 128k; held-out shapes lie
between those that are fitted, never at a corner; the order is shuffled by a seed, so that a machine that slows down over the minutes
does not look like a shape that costs more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

MOST: Final = 16_384  # tokens; longer prompts take minutes to measure, and the square term shows well before
LEAST: Final = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of one request: new prompt tokens, tokens that an earlier request left in the prefix cache, output tokens."""

    uncached: int
    cached: int
    output: int
    held_out: bool = False

    @property
    def name(self) -> str:
        """As people read it: 512+1024c/64."""
        return f"{self.uncached}{f'+{self.cached}c' if self.cached else ''}/{self.output}"


# (uncached, cached, output) as shares of the context, and whether the shape is held out.
GRID: Final[tuple[tuple[float, float, float, bool], ...]] = (
    (1 / 128, 0, 1 / 1024, False),
    (1 / 8, 0, 1 / 1024, False),
    (1 / 2, 0, 1 / 1024, False),
    (7 / 8, 0, 1 / 1024, False),
    (1 / 128, 0, 1 / 32, False),
    (1 / 128, 0, 1 / 8, False),
    (1 / 4, 0, 1 / 32, False),
    (1 / 4, 0, 1 / 8, False),
    (1 / 2, 0, 1 / 16, False),
    (3 / 4, 0, 1 / 8, False),
    (1 / 32, 1 / 2, 1 / 1024, False),
    (1 / 8, 1 / 2, 1 / 32, False),
    (1 / 16, 0, 1 / 64, True),
    (3 / 16, 0, 1 / 16, True),
    (3 / 8, 0, 1 / 64, True),
    (5 / 8, 0, 1 / 32, True),
    (1 / 3, 0, 3 / 32, True),
    (1 / 16, 3 / 8, 1 / 64, True),
)


def plan(context: int, *, cached: bool, seed: int = 0) -> list[Shape]:
    """The shapes for an engine of `context` tokens. `cached`: whether it says how much of a prompt it had cached."""
    length = min(context, MOST)
    if length < LEAST:
        raise ValueError(f"a context of {context} tokens is too short to tell prompt from output; {LEAST} are needed")
    shapes = [
        Shape(max(8, int(u * length)), int(c * length), max(1, int(o * length)), held_out)
        for u, c, o, held_out in GRID
        if cached or not c
    ]
    random.Random(seed).shuffle(shapes)
    return shapes


def reference(context: int) -> Shape:
    """The shape that one model unit stands for, 3500 in and 300 out, cut down to what the engine takes."""
    scale = min(1.0, 0.9 * context / 3800)
    return Shape(int(3500 * scale), 0, int(300 * scale))
