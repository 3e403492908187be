"""Tensors that stay in the GPU's memory: `x-sidecar-handoff: cuda-ipc` on /v1/preprocess.

The answer is one line of JSON, and then stays open as long as the memory is lent: whoever closes it, or dies, gives the memory back. So does
`DELETE /v1/preprocess/NAME` with the loan's name, through any relay process, and so does time. When the engine dies, all of it goes
back at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from aiohttp import web

from sidecar.errors import Internal, RequestError
from sidecar.images.gpu_loan import Loan
from sidecar.images.service import Images, Tensors
from sidecar.relay import client_io as downstream

NAME: Final = re.compile(r"[0-9a-f]{32}")


class NoLoan(RequestError):
    """Nothing is lent under this name any more."""

    code = "loan_not_found"
    status: ClassVar[int] = 404


def lines(
    layout: dict[str, Any], done: Sequence[Tensors], shapes: Sequence[tuple[str, list[int]]], loan: Loan
) -> bytes:
    """The answer: the layout, the loan's name, and for each image's `pixel_values` (`shapes`) where they lie. Raises Internal."""
    memory = []
    for image, (dtype, shape) in zip(done, shapes, strict=True):
        try:
            said: dict[str, Any] = json.loads(bytes(image.values))
        except ValueError:
            raise Internal("the GPU's process and this one are not of one version") from None
        memory.append({"tensor": "pixel_values", "dtype": dtype, "shape": shape, **said})
    return json.dumps(layout | {"loan": loan.name, "memory": memory}).encode() + b"\n"


async def hold(request: web.BaseRequest, loan: Loan, line: bytes) -> web.StreamResponse:
    """Answer, and keep the answer open until the loan is over."""
    response = web.StreamResponse(headers={"content-type": "application/json", "x-sidecar-loan": loan.name})
    await downstream.start(response, request)
    await downstream.write(response, line)
    await loan.over()
    await downstream.end(response)
    return response


async def give_back(images: Images, name: str) -> web.Response:
    """End a loan by its name. Raises NoLoan, NoGpu or ImagesBusy."""
    if not NAME.fullmatch(name) or not await images.give_back(name):
        raise NoLoan("nothing is lent under this name; it was given back already, or its time is over")
    return web.Response(status=204)
