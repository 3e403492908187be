"""Leases of Kubernetes (coordination.k8s.io/v1) over its client library: read, create, replace by the version that was read.

The library takes 2 s and 70 MB to import, so it is imported when a Lease is wanted for the first time, on a thread.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from datetime import UTC, datetime
from typing import Any, Final

LIBRARY: Final = "kubernetes_asyncio"
DURATION: Final = 60  # seconds that a Lease is kept without a sign of its holder
ANSWER: Final = 5.0  # seconds that one call may take


class Leases:
    """The three calls that are needed, over the client library."""

    def __init__(self, client: Any, namespace: str) -> None:
        library = importlib.import_module(f"{LIBRARY}.client")
        self.errors: type[Exception] = library.ApiException
        self._library: Any = library
        self._api = library.CoordinationV1Api(client)
        self._namespace = namespace

    async def read(self, name: str) -> Any | None:
        """A Lease; None where there is none of that name."""
        try:
            return await self._api.read_namespaced_lease(name, self._namespace, _request_timeout=ANSWER)
        except self._library.ApiException as e:
            if e.status == 404:
                return None
            raise

    async def create(self, name: str, holder: str) -> bool:
        """Make a Lease that `holder` holds. False where another was faster."""
        now = stamp(datetime.now(UTC))
        spec = self._library.V1LeaseSpec(
            holder_identity=holder,
            lease_duration_seconds=DURATION,
            acquire_time=now,
            renew_time=now,
            lease_transitions=0,
        )
        body = self._library.V1Lease(metadata=self._library.V1ObjectMeta(name=name), spec=spec)
        return await self._written(self._api.create_namespaced_lease(self._namespace, body, _request_timeout=ANSWER))

    async def replace(self, lease: Any, holder: str | None) -> bool:
        """Write a Lease as held by `holder` (None: by nobody), as it was read. False where it has changed since."""
        spec, now = lease.spec or self._library.V1LeaseSpec(), stamp(datetime.now(UTC))
        if holder != (spec.holder_identity or None):
            spec.acquire_time, spec.lease_transitions = now, (spec.lease_transitions or 0) + (holder is not None)
        elif spec.acquire_time is not None:
            spec.acquire_time = stamp(spec.acquire_time)
        spec.holder_identity, spec.renew_time, spec.lease_duration_seconds = holder, now, DURATION
        lease.spec = spec
        name = lease.metadata.name
        return await self._written(
            self._api.replace_namespaced_lease(name, self._namespace, lease, _request_timeout=ANSWER)
        )

    async def _written(self, call: Any) -> bool:
        try:
            await call
        except self._library.ApiException as e:
            if e.status == 409:
                return False
            raise
        return True


def facts_of(lease: Any) -> tuple[str, str, int | None]:
    """(holder, version, duration in seconds) of a Lease."""
    spec = lease.spec
    return (
        (spec.holder_identity if spec else None) or "",
        lease.metadata.resource_version or "",
        spec.lease_duration_seconds if spec else None,
    )


def stamp(at: datetime) -> datetime:
    """A time that the API server takes: it wants six digits after the point, and Python leaves them out where they are 0."""
    return at if at.microsecond else at.replace(microsecond=1)


def told(e: BaseException, namespace: str) -> str:
    """An error in one line, with what to do where that is known."""
    status = getattr(e, "status", None)
    if status in (401, 403):
        return f"{status}: the pod's service account may not get, create and update leases in {namespace}; see `sidecar manifests`"
    return f"{status} {getattr(e, 'reason', '')}".strip() if status else f"{type(e).__name__}: {e}"[:200]


async def connect() -> Any:
    """A client by the pod's service account, or by KUBECONFIG outside a cluster. An async context manager."""
    client, config = await asyncio.to_thread(_library)
    settings = client.Configuration()
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(client_configuration=settings)
    else:
        await config.load_kube_config(client_configuration=settings)
    return client.ApiClient(settings)


def _library() -> tuple[Any, Any]:
    return importlib.import_module(f"{LIBRARY}.client"), importlib.import_module(f"{LIBRARY}.config")
