"""Runs GpuSignal and prints each reading that differs from the one before as one line of JSON; ends when stdin does.

Arguments: period and timeout in seconds. The last line is `{"stopped": ...}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from sidecar.readings import Reading, Value
from sidecar.signals.gpu.poller import GpuSignal


def plain(reading: Reading[object]) -> object:
    """Fields by name, without times."""
    if isinstance(reading, Value):
        assert isinstance(reading.value, tuple)
        return [
            {key: shown(value) for key, value in ((k, getattr(gpu, k)) for k in gpu.__slots__)} for gpu in reading.value
        ]
    return {type(reading).__name__: next(iter(asdict(reading).values()))}


def shown(field: object) -> object:
    """A reading of a field as its value, or as {"Absent" or "Failed": why}."""
    if isinstance(field, Value):
        return field.value
    if type(field).__name__ in ("Absent", "Failed"):
        return {type(field).__name__: next(iter(asdict(field).values()))}  # type: ignore[call-overload]
    return field


async def main() -> None:
    signal = GpuSignal(period=float(sys.argv[1]), timeout_s=float(sys.argv[2]))
    signal.start()
    loop = asyncio.get_running_loop()
    closed = loop.run_in_executor(None, sys.stdin.read)
    last: object = None
    while not closed.done():
        now = plain(signal.read())
        if now != last:
            print(json.dumps(now), flush=True)
            last = now
        await asyncio.sleep(0.01)
    print(json.dumps({"stopped": await signal.stop()}), flush=True)
    print(json.dumps({"bindings": "pynvml" in sys.modules}), flush=True)


asyncio.run(main())
