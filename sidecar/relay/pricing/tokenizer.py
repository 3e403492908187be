"""The tokens of a prompt's text, counted by the model's own tokenizer, off the event loop and within a deadline.

Rules: a count that is late is not waited for, and the caller uses its learned ratio. At most MAX_COUNTED_CHARS are
tokenized per request. Of a longer text, windows spread evenly over it stand for the whole, which is within some 3 %
(benchmarks/tokens.py) and bounds both the wait and the CPU time. Texts are dropped once counted, and never logged.

The texts are read from the body only here, and only what is tokenized is read.

`encode` of the package tokenizers holds the GIL while it runs; `encode_batch_fast` releases it, so a thread is enough.
"""

from __future__ import annotations

import asyncio
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final

from sidecar.load.body_scan import lenient, prompt_text
from sidecar.load.found import Found, PromptTexts

TOKENIZER_FILE: Final = "tokenizer.json"
COUNT_TIMEOUT_S: Final = 0.005
MAX_WAITING_COUNTS: Final = 8  # texts that wait for the thread; further ones are not counted
MAX_COUNTED_CHARS: Final = 4096  # these take 1 to 2 ms of a core
WINDOW_COUNT: Final = 8
MAX_BYTES_OF_CHAR: Final = 12  # two escapes
TIME_TOKENS: Final = 4  # three signs and a word, in Qwen's tokenizer

_log = logging.getLogger(__name__)

Encode = Callable[[list[str]], Sequence[Sized]]  # texts -> the tokens of each


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of a text; `exact` if all of it was counted."""

    tokens: int
    exact: bool


class TokenCounter:
    """One per relay process."""

    def __init__(self, encode: Encode, deadline: float = COUNT_TIMEOUT_S, time_tokens: int = TIME_TOKENS) -> None:
        """`time_tokens`: those of a time in a video's prompt, besides its digits."""
        self._encode = encode
        self._deadline = deadline
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._waiting = 0
        self.time_tokens = time_tokens

    async def count(self, found: Found) -> TokenCount | None:
        """The tokens of a body's prompt text; None after the deadline, or if there are too many texts."""
        if self._waiting >= MAX_WAITING_COUNTS or found.texts is None:
            return None
        if not found.characters:
            return TokenCount(0, True)
        self._waiting += 1
        work = partial(_count, self._encode, found.texts, found.characters)
        job = asyncio.get_running_loop().run_in_executor(self._thread, work)
        job.add_done_callback(self._counted)
        await asyncio.wait((job,), timeout=self._deadline)
        return job.result() if job.done() and job.exception() is None else None

    def close(self) -> None:
        """Stop the worker thread after the current text."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _counted(self, job: asyncio.Future[TokenCount]) -> None:
        self._waiting -= 1
        if not job.cancelled() and (error := job.exception()) is not None:
            _log.warning("cannot count the tokens of a text (%s); they are estimated", type(error).__name__)


def load_counter(folder: str) -> TokenCounter | None:
    """The counter of a model's directory; None without a tokenizer or the extra. Takes up to a second."""
    file = Path(folder) / TOKENIZER_FILE
    if not folder or not file.is_file():
        return None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: a thread pool would only cost
    try:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        encode = partial(tokenizer.encode_batch_fast, add_special_tokens=False)
        time = "<0.0 seconds>"  # as Qwen3-VL's prompts have it before each step of a video
        return TokenCounter(encode, time_tokens=len(encode([time])[0]) - sum(map(str.isdigit, time)))
    except ImportError:
        _log.info("tokens are estimated: for exact ones, pip install 'inference-sidecar[tokenizer]'")
    except Exception as e:  # noqa: BLE001  the package raises nothing more specific
        _log.warning("tokens are estimated: cannot use %s (%s)", TOKENIZER_FILE, type(e).__name__)
    return None


def windows(
    texts: PromptTexts, characters: int, max_chars: int = MAX_COUNTED_CHARS, count: int = WINDOW_COUNT
) -> tuple[list[str], float]:
    """(texts to tokenize, factor for their tokens): all of short texts, windows of long ones."""
    places = list(zip(texts.places[::3], texts.places[1::3], texts.places[2::3], strict=True))
    size = sum(end - start for start, end, _ in places)
    if characters <= max_chars and size <= max_chars * MAX_BYTES_OF_CHAR:
        return [prompt_text(texts.source, start, end, bool(printed)) for start, end, printed in places], 1.0
    ends = list(accumulate(end - start for start, end, _ in places))
    width = max_chars // count
    span = min(round(width * size / characters), width * MAX_BYTES_OF_CHAR, size)
    step = (size - span) / (count - 1)
    found = ["".join(_window(texts, places, ends, round(n * step), span))[:width] for n in range(count)]
    taken = sum(map(len, found))
    return found, characters / max(1, taken)


def _window(
    texts: PromptTexts, places: Sequence[tuple[int, int, int]], ends: Sequence[int], at: int, size: int
) -> Iterator[str]:
    """The pieces of texts in `size` bytes from `at`, counted over all texts."""
    for index in range(bisect_right(ends, at), len(places)):
        start, end, _ = places[index]
        first = start + at - (ends[index] - (end - start))
        last = min(end, first + size)
        yield lenient(bytes(memoryview(texts.source)[first:last]))
        at, size = at + last - first, size - (last - first)
        if size <= 0:
            return


def _count(encode: Encode, texts: PromptTexts, characters: int) -> TokenCount:
    parts, factor = windows(texts, characters)
    sound = [part if part.isascii() else part.encode(errors="replace").decode() for part in parts]  # no lone surrogates
    tokens = sum(map(len, encode(sound)))
    return TokenCount(round(tokens * factor), factor == 1.0)
