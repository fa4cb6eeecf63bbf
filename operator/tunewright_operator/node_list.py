"""The nodes as they were last listed. Not watched: every node tells of itself several times a minute, and few jobs ask."""

import asyncio
import logging
import time
from collections.abc import Callable

from tunewright_operator.cluster import Cluster, ClusterError
from tunewright_operator.nodes import Node

log = logging.getLogger(__name__)


class NodeList:
    """The nodes with devices, listed when a job is to be placed, and no more often than every ``seconds``."""

    def __init__(self, cluster: Cluster, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster, self._seconds, self._clock = cluster, seconds, clock
        self._lock = asyncio.Lock()
        self._known: tuple[Node, ...] = ()
        self._listed_at: float | None = None

    async def look(self) -> tuple[Node, ...]:
        """What is known; nothing where the API server does not tell, which is no reason for a job to wait."""
        async with self._lock:
            if self._listed_at is None or self._clock() - self._listed_at > self._seconds:
                self._known = await self._list()
                self._listed_at = self._clock()
            return self._known

    async def _list(self) -> tuple[Node, ...]:
        try:
            return tuple([node async for body in self._cluster.list_all("Node") if (node := Node.of(body)).devices])
        except ClusterError as error:
            log.warning("the memory of GPUs is not known: %s", error)
            return ()
