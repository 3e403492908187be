"""The tokens of a prompt's text, counted by the model's own tokenizer, off the event loop and within a deadline.

Rules: a count that is late is not waited for, and the caller uses its learned ratio. At most MAX_COUNTED_CHARS are
tokenized per request. Of a longer text, windows spread evenly over it stand for the whole, which is within some 3 %
(benchmarks/tokens.py) and bounds both the wait and the CPU time. Texts are dropped once counted, and never logged.

`encode` of the package tokenizers holds the GIL while it runs; `encode_batch_fast` releases it, so a thread is enough.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from sidecar.load.request_shape import leaves, prompts

TOKENIZER_FILE: Final = "tokenizer.json"
COUNT_TIMEOUT_S: Final = 0.005
MAX_WAITING_COUNTS: Final = 8  # texts that wait for the thread; further ones are not counted
MAX_COUNTED_CHARS: Final = 4096  # these take 1 to 2 ms of a core
WINDOW_COUNT: Final = 8

_log = logging.getLogger(__name__)

Encode = Callable[[list[str]], Sequence[Sized]]  # texts -> the tokens of each


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of a text; `exact` if all of it was counted."""

    tokens: int
    exact: bool


class TokenCounter:
    """One per relay process."""

    def __init__(self, encode: Encode, deadline: float = COUNT_TIMEOUT_S) -> None:
        self._encode = encode
        self._deadline = deadline
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._waiting = 0

    async def count(self, payload: dict[str, Any], read: Callable[[str], str] = str) -> TokenCount | None:
        """The tokens of a body's prompt text; None after the deadline. `read` as for `request_shape.describe`."""
        if self._waiting >= MAX_WAITING_COUNTS:
            return None
        texts = [leaf for leaf in leaves(prompts(payload), read) if isinstance(leaf, str)]
        if not texts:
            return TokenCount(0, True)
        self._waiting += 1
        job = asyncio.get_running_loop().run_in_executor(self._thread, _count, self._encode, texts)
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
        return TokenCounter(partial(tokenizer.encode_batch_fast, add_special_tokens=False))
    except ImportError:
        _log.info("tokens are estimated: for exact ones, pip install 'inference-sidecar[tokenizer]'")
    except Exception as e:  # noqa: BLE001  the package raises nothing more specific
        _log.warning("tokens are estimated: cannot use %s (%s)", TOKENIZER_FILE, type(e).__name__)
    return None


def windows(
    texts: Sequence[str], max_chars: int = MAX_COUNTED_CHARS, count: int = WINDOW_COUNT
) -> tuple[list[str], float]:
    """(texts to tokenize, factor for their tokens): all of short texts, windows of long ones."""
    length = sum(map(len, texts))
    if length <= max_chars:
        return list(texts), 1.0
    text, width = "".join(texts), max_chars // count
    step = (length - width) / (count - 1)
    starts = [round(n * step) for n in range(count)]
    return [text[start : start + width] for start in starts], length / (width * count)


def _count(encode: Encode, texts: list[str]) -> TokenCount:
    parts, factor = windows(texts)
    sound = [part if part.isascii() else part.encode(errors="replace").decode() for part in parts]  # no lone surrogates
    tokens = sum(map(len, encode(sound)))
    return TokenCount(round(tokens * factor), factor == 1.0)
