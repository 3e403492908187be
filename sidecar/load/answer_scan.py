"""Pure: finds the members of an answer that report usage, by their path, while the answer streams through.

Rules: a path begins at the top of a JSON text, so neither a text that reads like a usage nor a schema with such a
property is mistaken for one, and nothing before or after it can hide it. The bytes are scanned once, by the
compiled scanner (kernels/csrc/member_scan.hpp), and are not kept. Where the module was not built, texts up to
MAX_PYTHON_BYTES are kept and parsed; a longer one yields no usage.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec

try:
    from sidecar.kernels import _fused  # type: ignore[attr-defined]  # compiled, so it has no types
except ImportError:
    _fused = None

Members = dict[str, Any]  # nested by path: {"meta_info": {"prompt_tokens": 3}}
Buffer = bytes | memoryview | bytearray

# Where engines report usage, and how a request ended (usage_forms.py).
PATHS: Final = (
    *("usage", "response.usage", "message.usage", "delta.usage", "meta.tokens", "meta.billed_units"),
    *("meta_info.prompt_tokens", "meta_info.completion_tokens", "meta_info.cached_tokens", "meta_info.finish_reason"),
    *("details.generated_tokens", "details.input_length"),
    *("tokens_evaluated", "tokens_predicted", "timings", "prompt_eval_count", "eval_count", "duration"),
    *("error", "object", "type", "index", "stop", "done", "finish_reason", "delta.finish_reason"),
)
_SPLIT: Final = tuple(tuple(path.split(".")) for path in PATHS)
MAX_PYTHON_BYTES: Final = 256 << 10  # parsed by json.loads within a few milliseconds
MAX_ITEMS: Final = 1 << 12  # of a list of answers

_compiled: Final = _fused is not None and hasattr(_fused, "member_scan")
_PATHS: Final = _fused.member_paths(PATHS) if _compiled else None


class AnswerScan:
    """One JSON text that arrives in pieces."""

    __slots__ = ("_kept", "_scan")

    def __init__(self) -> None:
        self._scan = _fused.member_scan(_PATHS) if _compiled else None
        self._kept = bytearray()  # only without the compiled module

    def feed(self, piece: Buffer) -> None:
        if self._scan is not None:
            _fused.scan_members(self._scan, piece)
        elif len(self._kept) <= MAX_PYTHON_BYTES:
            self._kept += piece

    def items(self) -> list[Members]:
        """The members of the text, or of each object of a list: those items that have any."""
        if self._scan is None:
            return items_in_python(bytes(self._kept))
        found: dict[int, Members] = {}
        for path, item, _, value in _fused.found_members(self._scan):
            if item in found or len(found) < MAX_ITEMS:
                _put(found.setdefault(item, {}), _SPLIT[path], value)
        return [members for members in found.values() if members]


def read(text: Buffer) -> list[Members]:
    """The members of a whole text."""
    scan = AnswerScan()
    scan.feed(text)
    return scan.items()


def start_of(text: bytes, path: str) -> int:
    """Where the value of a member begins, in a text that is no list; -1 if it is not there."""
    if not _compiled:
        return -1
    scan, index = _fused.member_scan(_PATHS), PATHS.index(path)
    _fused.scan_members(scan, text)
    found = (start for at, item, start, _ in _fused.found_members(scan) if (at, item) == (index, 0))
    return int(next(found, -1))


def items_in_python(text: bytes) -> list[Members]:
    """Pure Python equivalent of the compiled scanner."""
    if len(text) > MAX_PYTHON_BYTES:
        return []
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return []
    texts = parsed if isinstance(parsed, list) else [parsed]
    found = (_pick(item) for item in texts[:MAX_ITEMS] if isinstance(item, dict))
    return [members for members in found if members]


def _pick(item: dict[str, Any]) -> Members:
    members: Members = {}
    for names in _SPLIT:
        for value in _at(item, names):
            _set(members, names, value)
    return members


def _at(item: dict[str, Any], names: tuple[str, ...]) -> Iterator[Any]:
    """The value at a path, if it is there."""
    value: Any = item
    for name in names:
        if not isinstance(value, dict) or name not in value:
            return
        value = value[name]
    yield value


def _put(members: Members, names: tuple[str, ...], value: bytes) -> None:
    """Parse a value; invalid JSON counts as absent."""
    with contextlib.suppress(ValueError, RecursionError):
        _set(members, names, msgspec.json.decode(value))


def _set(members: Members, names: tuple[str, ...], value: Any) -> None:
    for name in names[:-1]:
        members = members.setdefault(name, {})
    members[names[-1]] = value
