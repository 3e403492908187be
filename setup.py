"""What pyproject.toml cannot express: with COMPILE=1, mypyc compiles the path of each request (decision 0040).

The same sources serve both ways. Without it, or in an editable installation, Python interprets them.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from setuptools import setup

# What runs for every request. Records stay msgspec's, which are compiled already; what other modules inherit from stays
# as it is.
COMPILED = {
    "sidecar/relay": "admin_paths admission canary_gate client_io concurrency control_link engine_io handler headers "
    "open_requests outcomes replay_log response sse",
    "sidecar/relay/http": "body client connection engine head",
    "sidecar/relay/pricing": "charge",
    "sidecar/runtime": "channel codec limited_log",
    "sidecar/load": "answer_scan api_routes body_scan client_labels coefficient_monitor cost_model estimator "
    "event_tokens latency_prediction least_squares ledger output_length prefill_queue request_keys request_shape "
    "sequences tenant_means usage_forms work_windows",
    "sidecar/control": "relay_pool state",
    "sidecar/report": "fan_out metrics usage_rows",
    "sidecar/health": "partial_hangs",
}


def modules() -> list[str]:
    return [f"{folder}/{name}.py" for folder, names in COMPILED.items() for name in names.split()]


options: dict[str, Any] = {}
if os.environ.get("COMPILE"):
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    try:
        from mypyc.build import mypycify
    except ImportError:  # it is asked for first, with all that the types of these modules come from
        options["setup_requires"] = ["mypy[mypyc]>=1.14", "types-psutil", *project["dependencies"]]
    else:
        options["ext_modules"] = mypycify(modules(), opt_level="3")

setup(**options)
