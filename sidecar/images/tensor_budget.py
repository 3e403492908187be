"""A budget for the tensors that one relay process holds, from a worker's reply until the client has read them.

An image of one colour is a file of kilobytes and tensors of hundreds of megabytes, and a client may read slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sidecar.errors import BadImage, ImagesBusy

MAX_TENSOR_BYTES: Final = 1 << 30  # the fp32 patches of the largest image that Qwen3-VL's own limit allows take 0.8 GB

Reserve = Callable[[int], None]


class TensorBudget:
    """The tensors of all requests in progress."""

    def __init__(self, max_bytes: int = MAX_TENSOR_BYTES) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    @contextmanager
    def for_request(self) -> Iterator[Reserve]:
        """Context of one request. Call the yielded function with the bytes of each tensor before reading it.

        It raises BadImage if this request alone exceeds the budget, ImagesBusy if all requests together do.
        """
        own_bytes = 0

        def reserve(size: int) -> None:
            nonlocal own_bytes
            if own_bytes + size > self._max_bytes:
                limit = f"the tensors of one request may have {self._max_bytes} bytes"
                raise BadImage(f"{limit}; send fewer or smaller images, or values=uint8", "tensors_too_large")
            if self.held_bytes + size > self._max_bytes:
                raise ImagesBusy("too many tensors are being sent to other clients; try again shortly")
            own_bytes += size
            self.held_bytes += size

        try:
            yield reserve
        finally:
            self.held_bytes -= own_bytes
