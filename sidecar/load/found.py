"""Records of what a scan finds in a body: numbers and positions, no content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Span = tuple[int, int]  # start and end in the body, in bytes
MAX_PARTS = 64  # image parts whose positions are kept
MAX_TEXTS = 4096  # texts whose positions are kept
BYTES_PER_ID = 4
PART_LISTS = ("messages", "input", "images")


@dataclass(frozen=True, slots=True)
class FoundPart:
    """An image: a part of `list[item].content[part]`, or an item of `images`. `url` lies between its quotes."""

    list: int  # of PART_LISTS
    item: int
    part: int
    start: int  # the brace of its part
    url: Span
    escaped: bool  # the URL has escapes
    is_link: bool
    is_named: bool  # it has a `uuid`

    @property
    def where(self) -> str:
        name = f"{PART_LISTS[self.list]}[{self.item}]"
        return name if PART_LISTS[self.list] == "images" else f"{name}.content[{self.part}]"


class Items(NamedTuple):
    """Content of a member of the body. Weights are bytes of text; a token id weighs BYTES_PER_ID of them.

    `number`: of the items of a list, or of an object with questions; 0: it is something else. `ids`: some of them are
    token ids; `lists`: of those that are lists themselves; `squares`: the sum of the squares of the items' weights.
    """

    number: int
    ids: bool
    lists: int
    weight: int
    squares: int


@dataclass(slots=True)
class PromptTexts:
    """Where a prompt's texts stand in `source`: (start, end, 0 or 1) of each, flat. 1: a value that engines print."""

    source: bytes | memoryview | bytearray = field(repr=False)
    places: Sequence[int]


@dataclass(slots=True)  # not frozen, which would cost a microsecond of each request
class Found:
    """What the prompt of a body amounts to, and where things stand in it."""

    text_bytes: int
    characters: int
    token_ids: int
    images: int
    audios: int
    videos: int
    fetches: bool  # the engine gets media from links
    messages: int
    offers_tools: bool
    is_strict: bool  # the arguments of a tool are checked
    image_parts: int  # those that hold a data URL
    link_parts: int
    members: Mapping[str, Span]  # of those that are read, the last of each
    items: Mapping[str, Items]  # of members that are not empty
    parts: tuple[FoundPart, ...]  # the first MAX_PARTS
    source_count: int  # items of `images`
    sources: tuple[FoundPart, ...] | None  # the first of them, if all are strings
    texts: PromptTexts | None = field(compare=False)  # None: they are too many
