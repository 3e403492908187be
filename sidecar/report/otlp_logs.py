"""Verdict changes and warnings of the control process as log records by OTLP: with OTEL_LOGS_EXPORTER=otlp only.

Rules:
- A handler of the root logger: what it takes stands on stderr, too. It never waits.
- A line with `extra={"otlp_event": (name, attributes)}` is a record of an event; every other one is taken from WARNING
  on. Lines have no prompt, no answer and no secret, whoever collects them.
- What the export itself logs is not exported: it would feed itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import ReadWriteLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from sidecar.report.otlp import LOGS, ExportQueue

SEVERITIES: Final = (
    (logging.CRITICAL, SeverityNumber.FATAL),
    (logging.ERROR, SeverityNumber.ERROR),
    (logging.WARNING, SeverityNumber.WARN),
    (logging.INFO, SeverityNumber.INFO),
    (logging.NOTSET, SeverityNumber.DEBUG),
)
_NOT_EXPORTED: Final = ("opentelemetry", "sidecar.report.otlp", "urllib3", "requests", "grpc")


class OtlpLogHandler(logging.Handler):
    """Queues records for a collector."""

    def __init__(self, endpoint: str, version: str) -> None:
        super().__init__()
        self._queue = ExportQueue(
            LOGS,
            endpoint,
            version,
            BatchLogRecordProcessor,
            "OTEL_BLRP_MAX_QUEUE_SIZE",
            LogRecordExportResult.FAILURE,
        )
        self._scope = InstrumentationScope("sidecar", version)

    @property
    def dropped(self) -> int:
        """Records that no collector got."""
        return self._queue.dropped

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is exported."""
        if record.name.startswith(_NOT_EXPORTED):
            return False
        return hasattr(record, "otlp_event") or record.levelno >= logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        try:
            made = self._record(record)  # first: a line that cannot be formatted must not hold a place in the queue
            if self._queue.has_room():
                self._queue.processor.on_emit(made)
        except Exception:  # noqa: BLE001  # as in every handler: a line must not end what logs it
            self.handleError(record)

    def _record(self, record: logging.LogRecord) -> ReadWriteLogRecord:
        name, details = getattr(record, "otlp_event", ("", {}))
        log_record = LogRecord(
            timestamp=int(record.created * 1e9),
            observed_timestamp=int(record.created * 1e9),
            severity_number=next(number for level, number in SEVERITIES if record.levelno >= level),
            severity_text=record.levelname,
            body=record.getMessage(),
            attributes=_attributes(record, details),
            event_name=name or None,
        )
        return ReadWriteLogRecord(log_record, self._queue.resource, self._scope)

    async def stop(self, seconds: float = 3.0) -> bool:
        """Export what is queued. False if the collector did not accept it in time."""
        return await self._queue.close(seconds)


def _attributes(record: logging.LogRecord, details: Mapping[str, Any]) -> dict[str, Any]:
    """Where a line is from, and what an event says; an attribute has no null."""
    found = {"code.function.name": f"{record.name}.{record.funcName}"} | dict(details)
    if record.exc_info and record.exc_info[0] is not None:
        found["exception.type"] = record.exc_info[0].__name__
    return {name: value for name, value in found.items() if value is not None}
