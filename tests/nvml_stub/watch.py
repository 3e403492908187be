"""Runs GpuSignal and prints each reading that differs from the one before as one line of JSON; ends when stdin does.

Arguments: period and timeout in seconds. The last line is `{"stopped": ...}`. It looks closely while a file `closely`
lies next to the driver's script; how the sidecar uses the GPU is read from there, too. Warnings of the XID thread are
printed as `{"log": ...}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path

from sidecar.readings import Reading, Value
from sidecar.runtime import own_gpu_use
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
        return asdict(field.value) if is_dataclass(field.value) else field.value  # type: ignore[arg-type]
    if type(field).__name__ in ("Absent", "Failed"):
        return {type(field).__name__: next(iter(asdict(field).values()))}  # type: ignore[call-overload]
    return field


def write(record: object) -> None:
    """One line of JSON, in one step: threads write, too."""
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


class Printer(logging.Handler):
    """Prints what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        write({"log": record.getMessage()})


async def main() -> None:
    logging.getLogger("sidecar.signals.gpu.xid").addHandler(Printer())
    script = Path(os.environ["NVML_STUB_SCRIPT"])
    use = own_gpu_use.next_to(str(script))
    signal = GpuSignal(period=float(sys.argv[1]), timeout_s=float(sys.argv[2]), own=lambda: own_gpu_use.read(use))
    signal.start()
    loop = asyncio.get_running_loop()
    closed = loop.run_in_executor(None, sys.stdin.read)
    last: object = None
    while not closed.done():
        signal.closely = script.with_name("closely").exists()
        now = plain(signal.read())
        if now != last:
            write(now)
            last = now
        await asyncio.sleep(0.01)
    write({"stopped": await signal.stop()})
    write({"bindings": "pynvml" in sys.modules})


asyncio.run(main())
