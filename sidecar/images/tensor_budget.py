"""Pure: how many bytes of tensors one relay process holds, from a worker's answer until they are with their client.

Why: a picture of one colour is a file of kilobytes and tensors of hundreds of megabytes, and a client may read as slowly as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sidecar.errors import BadImage, ImagesBusy

MAX_TENSOR_BYTES: Final = (
    1 << 30
)  # bytes: fp32 patches of the largest image that Qwen3-VL's own limit lets through are 0.8 GB

Reserve = Callable[[int], None]


class TensorBudget:
    """The tensors of all requests under way."""

    def __init__(self, max_bytes: int = MAX_TENSOR_BYTES) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    @contextmanager
    def for_request(self) -> Iterator[Reserve]:
        """A block that holds the tensors of one request: to be called with the bytes of each before they are read.

        That raises BadImage where this request alone has too many, and ImagesBusy where all together have.
        """
        own_bytes = 0

        def reserve(size: int) -> None:
            nonlocal own_bytes
            if own_bytes + size > self._max_bytes:
                text = f"the tensors of one request may have {self._max_bytes} bytes here; send fewer or smaller images, or values=uint8"
                raise BadImage(text, "tensors_too_large")
            if self.held_bytes + size > self._max_bytes:
                raise ImagesBusy("too many tensors are on their way to other clients; try again shortly")
            own_bytes += size
            self.held_bytes += size

        try:
            yield reserve
        finally:
            self.held_bytes -= own_bytes
