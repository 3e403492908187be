"""Pure: which request shapes are measured, and which of them are held out.

Sizes are shares of a length, so that one plan fits models of 4k and of 128k. Held-out shapes are between the fitted
ones, never at a corner. Each turn has its own order, so that a machine that slows down does not make a shape look
expensive.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sidecar.errors import UsageError

# Longer prompts take minutes to measure, and the square term is visible well before.
MAX_LENGTH_TOKENS: Final = 16_384
MIN_LENGTH_TOKENS: Final = 256
# Longer sides of photos, 4:3: three show what a photo costs, its tokens, and their square.
PHOTO_SIDES_PX: Final = (448, 672, 896)
# Approximate text of a request with photos.
PHOTO_TEXT_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class GridShape:
    """Tokens of one request: new prompt tokens, those in the prefix cache from an earlier request, output tokens.

    `images` photos have a longer side of `side` pixels; `uncached` then counts only the text.
    """

    uncached: int
    cached: int
    output: int
    held_out: bool = False
    images: int = 0
    side: int = 0

    @property
    def name(self) -> str:
        """A short form: 512+1024c/64, 32+2x448px/8."""
        cached = f"+{self.cached}c" if self.cached else ""
        images = f"+{self.images}x{self.side}px" if self.images else ""
        return f"{self.uncached}{cached}{images}/{self.output}"


# (uncached, cached, output) as shares of the length, and whether the shape is held out.
GRID: Final[tuple[tuple[float, float, float, bool], ...]] = (
    *((uncached, 0, 1 / 1024, False) for uncached in (1 / 128, 1 / 8, 1 / 2, 7 / 8)),
    *((uncached, 0, output, False) for uncached in (1 / 128, 1 / 4) for output in (1 / 32, 1 / 8)),
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
# Mostly generation, with almost no prompt.
GENERATING: Final = (1 / 128, 0, 1 / 16)
# The slowest of the grid.
LARGEST: Final = (3 / 4, 0, 1 / 8)

# (images, side, output as a share of the length), and whether the shape is held out.
PHOTO_GRID: Final[tuple[tuple[int, int, float, bool], ...]] = (
    *((1, side, 1 / 1024, False) for side in PHOTO_SIDES_PX),
    *((4, side, 1 / 1024, False) for side in PHOTO_SIDES_PX[::2]),
    (1, PHOTO_SIDES_PX[0], 1 / 32, False),
    *((2, side, 1 / 1024, True) for side in PHOTO_SIDES_PX),
    (2, PHOTO_SIDES_PX[0], 1 / 64, True),
)


def plan_shapes(
    length: int, *, cached: bool, tokens: Mapping[int, int] | None = None, max_images: int = 4
) -> list[GridShape]:
    """The shapes of up to `length` tokens.

    `cached`: the engine reports cached tokens. `tokens`: of one photo, by its side, if the engine accepts photos.
    """
    shapes = [shape_of(length, *row) for row in GRID if cached or not row[1]]
    for images, side, output, held_out in PHOTO_GRID if tokens else ():
        shape = GridShape(PHOTO_TEXT_TOKENS, 0, max(1, int(output * length)), held_out, images, side)
        used = images * (tokens or {}).get(side, length) + 4 * PHOTO_TEXT_TOKENS + shape.output
        if images <= max_images and used <= length:
            shapes.append(shape)
    return shapes


def shape_of(length: int, uncached: float, cached: float, output: float, held_out: bool = False) -> GridShape:
    """A row of GRID in tokens."""
    return GridShape(max(8, int(uncached * length)), int(cached * length), max(1, int(output * length)), held_out)


def min_length(context: int, tokens: Mapping[int, int]) -> int:
    """The minimum length: with photos, one of each size and two of the smallest must fit. Raises UsageError."""
    if context < MIN_LENGTH_TOKENS:
        why = f"a context of {context} tokens is too short to measure; at least {MIN_LENGTH_TOKENS} are needed"
        raise UsageError(f"--context: {why}")
    photos = max(2 * tokens[PHOTO_SIDES_PX[0]], *tokens.values()) + 5 * PHOTO_TEXT_TOKENS if tokens else 0
    return min(context, max(MIN_LENGTH_TOKENS, photos))


def shuffle_turn(shapes: list[GridShape], turn: int) -> list[GridShape]:
    """The shapes in the order of this turn."""
    return random.Random(turn).sample(shapes, len(shapes))


def reference_shape(context: int, part: float = 1.0) -> GridShape:
    """The reference shape of one model unit, 3500 in and 300 out, or a part of it, limited to the context."""
    scale = part * min(1.0, 0.9 * context / 3800)
    return GridShape(max(1, int(3500 * scale)), 0, max(1, int(300 * scale)))
