"""The protobuf messages of ORCA, from a table of fields: `xds.data.orca.v3.OrcaLoadReport` and its request.

Rules: they have their own pool, so that generated classes of the same names may exist in the process. Field numbers are
those of cncf/xds (`xds/data/orca/v3/orca_load_report.proto`, `xds/service/orca/v3/orca.proto`). Only the fields in use
are defined. The package xds-protos has all of them, but claims the module name `envoy`.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

SERVICE: Final = "xds.service.orca.v3.OpenRcaService"
METHOD: Final = "StreamCoreMetrics"
# Name -> number; all are doubles.
FIELDS = {"cpu_utilization": 1, "mem_utilization": 2, "rps_fractional": 6, "eps": 7, "application_utilization": 9}
NAMED_METRICS: Final = 8  # the number of a map<string, double>
REPORT_INTERVAL: Final = 1  # of a google.protobuf.Duration

_REPORT: Final = "xds.data.orca.v3.OrcaLoadReport"
_REQUEST: Final = "xds.service.orca.v3.OrcaLoadReportRequest"
_Field = descriptor_pb2.FieldDescriptorProto


def _file(message: str) -> tuple[descriptor_pb2.FileDescriptorProto, descriptor_pb2.DescriptorProto]:
    package, _, name = message.rpartition(".")
    file = descriptor_pb2.FileDescriptorProto(name=message.lower() + ".proto", package=package, syntax="proto3")
    return file, file.message_type.add(name=name)


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    file, report = _file(_REPORT)
    for name, number in FIELDS.items():
        report.field.add(name=name, number=number, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
    entry = report.nested_type.add(name="NamedMetricsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
    named = {"type": _Field.TYPE_MESSAGE, "type_name": f".{_REPORT}.NamedMetricsEntry"}
    report.field.add(name="named_metrics", number=NAMED_METRICS, label=_Field.LABEL_REPEATED, **named)
    pool.Add(file)
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    file, request = _file(_REQUEST)
    file.dependency.append(duration_pb2.DESCRIPTOR.name)
    interval = {"type": _Field.TYPE_MESSAGE, "type_name": ".google.protobuf.Duration"}
    request.field.add(name="report_interval", number=REPORT_INTERVAL, label=_Field.LABEL_OPTIONAL, **interval)
    pool.Add(file)
    return pool


_POOL: Final = _pool()
Report: Final[Any] = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(_REPORT))
Request: Final[Any] = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(_REQUEST))


def encode(fields: dict[str, float], named: dict[str, float]) -> bytes:
    return bytes(Report(**fields, named_metrics=named).SerializeToString(deterministic=True))


def interval(request: bytes) -> float:
    """The `report_interval` of a request in seconds, 0 if absent. Raises ValueError if the bytes are not a request."""
    try:
        asked = Request.FromString(request).report_interval
    except Exception as error:  # noqa: BLE001  protobuf's DecodeError, whose class depends on how protobuf was built
        raise ValueError(f"not an OrcaLoadReportRequest ({type(error).__name__})") from None
    return float(asked.seconds) + float(asked.nanos) / 1e9
