"""A queue of keys: one run a key at a time, many pokes one run, later runs when asked, and backoff for keys that fail.

A key that fails again and again waits longer and longer, and holds up nobody else.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

_FIRST_RETRY_SECONDS: Final = 0.5
_LAST_RETRY_SECONDS: Final = 60.0


class KeyedQueue(Generic[K]):
    """Runs ``work(key)`` for poked keys, ``width`` of them at once."""

    def __init__(self, work: Callable[[K], Awaitable[None]], *, width: int, on_error: Callable[[K], None] = lambda _: None) -> None:
        self._work = work
        self._width = width
        self._on_error = on_error
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._queued: set[K] = set()
        self._running: set[K] = set()
        self._again: set[K] = set()  # poked while running
        self._timers: dict[K, tuple[float, asyncio.TimerHandle]] = {}
        self._failures: dict[K, int] = {}
        self._closed = False

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return self._ready.qsize()

    def poke(self, key: K) -> None:
        """Asks for a run of ``key`` as soon as may be."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def poke_in(self, key: K, seconds: float) -> None:
        """Asks for a run after some seconds; of several wishes the earliest holds."""
        if self._closed:
            return
        due = time.monotonic() + max(0.0, seconds)
        waiting = self._timers.get(key)
        if waiting and waiting[0] <= due:
            return
        if waiting:
            waiting[1].cancel()
        self._timers[key] = (due, asyncio.get_running_loop().call_later(max(0.0, seconds), self._ring, key))

    async def run(self) -> None:
        """Serves until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._width):
                    workers.create_task(self._serve())
        finally:
            self._closed = True
            for _, timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    def _ring(self, key: K) -> None:
        self._timers.pop(key, None)
        self.poke(key)

    async def _serve(self) -> None:
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            self._running.add(key)
            try:
                await self._work(key)
                self._failures.pop(key, None)
            except Exception as error:
                self._retry(key, error)
            finally:
                self._running.discard(key)
            if key in self._again:
                self._again.discard(key)
                if key not in self._failures:  # its retry looks at everything anyway
                    self.poke(key)

    def _retry(self, key: K, error: Exception) -> None:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(_LAST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2.0 ** min(count - 1, 16)) * random.uniform(0.75, 1.25)
        self._on_error(key)
        log.warning("%s: %s: %s; again in %.1f s (failure %d)", key, type(error).__name__, error, delay, count, exc_info=count == 3)
        self.poke_in(key, delay)
