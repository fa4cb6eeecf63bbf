"""Leadership: a Lease that one replica holds. Only its holder writes.

A holder that could not renew stops writing well before anybody else may take over, and goes on when it renews in time; one that finds
another holder's name ends the process. Age is measured by our own monotonic clock from when we saw the Lease change, so clocks of several
machines need not agree.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any, Final

from tunewright_operator.cluster import Cluster, ClusterError, Conflict

log = logging.getLogger(__name__)

# Share of the Lease's duration after the last renewal in which writes are still sent. The rest is for a request on its way.
_WRITING_SHARE: Final = 0.5
_RENEWALS: Final = 6  # tries within a Lease's duration


class LeaseLost(Exception):
    """Another replica leads now."""


class Leadership:
    """Takes, keeps and gives back the Lease ``name`` of ``namespace`` for ``identity``."""

    def __init__(self, cluster: Cluster, *, namespace: str, name: str, identity: str, seconds: int) -> None:
        self._cluster = cluster
        self._namespace, self._name, self._identity, self._seconds = namespace, name, identity, seconds
        self._renewed_at = -1e9
        self._seen_version = ""
        self._seen_at = 0.0
        self._was_leader = False

    @property
    def pause(self) -> float:
        """Seconds between two tries."""
        return self._seconds / _RENEWALS

    def may_write(self) -> bool:
        """Whether a write that is sent now arrives before anybody else may lead."""
        return time.monotonic() - self._renewed_at < self._seconds * _WRITING_SHARE

    async def acquire(self) -> None:
        """Returns once we lead."""
        while not await self._try():  # noqa: ASYNC110 - the event is in the API server
            await asyncio.sleep(self.pause)
        self._was_leader = True
        log.info("%s leads", self._identity)

    async def keep(self) -> None:
        """Renews for ever; raises ``LeaseLost`` once another replica leads."""
        while True:
            await asyncio.sleep(self.pause)
            await self._try()

    async def release(self) -> None:
        """Gives the Lease back, so that the next leader need not wait."""
        if not self._was_leader:
            return
        self._renewed_at = -1e9
        try:
            lease = await self._cluster.get("Lease", self._namespace, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._cluster.replace(lease)
        except ClusterError as error:
            log.info("the lease was not given back: %s", error)

    async def _try(self) -> bool:
        """One attempt to take or renew; False where another holds it or nobody answers."""
        asked_at = time.monotonic()
        try:
            lease = await self._cluster.get("Lease", self._namespace, self._name)
            if lease is None:
                await self._cluster.create_ungated(self._manifest({}))
            else:
                holder = lease["spec"].get("holderIdentity") or ""
                if holder and holder != self._identity:
                    if self._was_leader:
                        raise LeaseLost(f"{holder} leads now")
                    if not self._has_expired(lease):
                        return False
                await self._cluster.replace(self._manifest(lease))
        except Conflict:
            return False
        except ClusterError as error:
            log.warning("the lease could not be renewed: %s", error)
            return False
        self._renewed_at = asked_at
        return True

    def _has_expired(self, lease: dict[str, Any]) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen_version:
            self._seen_version, self._seen_at = version, time.monotonic()
        return time.monotonic() - self._seen_at > float(lease["spec"].get("leaseDurationSeconds") or self._seconds)

    def _manifest(self, before: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = before.get("spec") or {}
        same = spec.get("holderIdentity") == self._identity
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": before.get("metadata") or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": self._seconds,
                "renewTime": now,
                "acquireTime": spec.get("acquireTime", now) if same else now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if same else 1),
            },
        }
