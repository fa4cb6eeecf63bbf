"""Jobs and models as the API server last told: a list, then a watch, kept up to date for ever.

What holds: a read is answered from memory, and is as old as ``age`` says. Before the first list is complete, reads raise ``Unavailable``.
A watch that ends goes on from its last version (bookmarks keep that young); a version that the server forgot (410) means a new list,
and the old content stays readable until that is complete.
"""

import asyncio
import bisect
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tunewright_api.errors import Unavailable
from tunewright_api.kube import Kube, KubeError
from tunewright_crds import names

log = logging.getLogger(__name__)

PAGE: Final = 500  # objects a list call, as kubectl does
WATCH_SECONDS: Final = (
    40,
    60,
)  # short, so that a connection that died silently is noticed soon; spread, so that replicas do not reconnect at once
BACKOFF_SECONDS: Final = (0.5, 15.0)

Key = tuple[str, str]  # namespace, name
Object = dict[str, Any]


@dataclass
class Store:
    """Objects of one kind, sorted by namespace and name."""

    objects: dict[Key, Object] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)

    def put(self, thing: Object) -> None:
        """Adds or replaces an object, whichever came last."""
        thing["metadata"].pop("managedFields", None)  # half of an object's size, and of use to nobody here
        key = _key(thing)
        if key not in self.objects:
            bisect.insort(self.keys, key)
        self.objects[key] = thing

    def drop(self, thing: Object) -> None:
        """Removes an object, if it is there."""
        key = _key(thing)
        if self.objects.pop(key, None) is not None:
            del self.keys[bisect.bisect_left(self.keys, key)]

    def get(self, namespace: str, name: str) -> Object | None:
        """The object, or None."""
        return self.objects.get((namespace, name))

    def after(self, start: Key, *, namespace: str = "") -> Iterator[Object]:
        """Objects whose key is greater than ``start``, in order; of one namespace only where given."""
        first = max(start, (namespace, ""))
        for index in range(bisect.bisect_right(self.keys, first), len(self.keys)):
            key = self.keys[index]
            if namespace and key[0] != namespace:
                return
            yield self.objects[key]

    def namespaces(self) -> list[str]:
        """Namespaces with at least one object, sorted."""
        found: list[str] = []
        index = 0
        while index < len(self.keys):
            found.append(self.keys[index][0])
            index = bisect.bisect_left(self.keys, (found[-1] + "\0", ""))
        return found


def _key(thing: Object) -> Key:
    return thing["metadata"]["namespace"], thing["metadata"]["name"]


class Follower:
    """Keeps one collection (a path) in a store of its own, while ``run`` runs."""

    def __init__(self, kube: Kube, path: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._path = path
        self._clock = clock
        self._version = ""
        self._contact = float("-inf")
        self.store = Store()
        self.synced = False

    @property
    def age(self) -> float:
        """Seconds since the API server last told anything about this collection; infinite before the first list."""
        return self._clock() - self._contact

    async def run(self) -> None:
        """List, watch, and again; waits longer after each failure in a row. Ends by a fault of ours only."""
        try:
            await self._follow()
        except Exception:
            log.exception("%s is no longer followed", self._path)
            raise

    async def _follow(self) -> None:
        failures = 0
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                failures = 0
            except KubeError as error:
                failures = 0 if error.status == 410 and self.synced else failures + 1
                if error.status == 410:
                    self._version = ""
                log.warning("%s: %s", self._path, error)
                low, high = BACKOFF_SECONDS
                await asyncio.sleep(min(high, low * 2 ** min(failures, 10)) * random.uniform(0.5, 1))

    async def _list(self) -> None:
        fresh, token, version = Store(), "", ""
        while True:
            page = await self._kube.get(self._path, limit=PAGE, **({"continue": token} if token else {}))
            for thing in page["items"]:
                fresh.put(thing)
            version = page["metadata"]["resourceVersion"]
            token = page["metadata"].get("continue", "")
            if not token:
                break
        self.store, self._version, self.synced, self._contact = fresh, version, True, self._clock()

    async def _watch(self) -> None:
        async for event in self._kube.watch(self._path, version=self._version, seconds=random.randint(*WATCH_SECONDS)):
            thing = event["object"]
            if event["type"] in ("ADDED", "MODIFIED"):
                self.store.put(thing)
            elif event["type"] == "DELETED":
                self.store.drop(thing)
            self._version = thing["metadata"]["resourceVersion"]
            self._contact = self._clock()
        self._contact = self._clock()


class Collection:
    """One kind over all followed namespaces, each with a follower of its own."""

    def __init__(self, kube: Kube, plural: str, namespaces: tuple[str, ...]) -> None:
        self.plural = plural
        base = f"/apis/{names.API_VERSION}"
        paths = {"": f"{base}/{plural}"} if not namespaces else {ns: f"{base}/namespaces/{ns}/{plural}" for ns in sorted(set(namespaces))}
        self.followers = {namespace: Follower(kube, path) for namespace, path in paths.items()}

    @property
    def synced(self) -> bool:
        """Whether every first list is complete."""
        return all(follower.synced for follower in self.followers.values())

    @property
    def age(self) -> float:
        """Age of the oldest part, in seconds."""
        return max(follower.age for follower in self.followers.values())

    def get(self, namespace: str, name: str) -> Object | None:
        """The object, or None; raises Unavailable before the first list."""
        self._check()
        follower = self.followers.get(namespace) or self.followers.get("")
        return follower.store.get(namespace, name) if follower else None

    def after(self, start: Key = ("", ""), *, namespace: str = "") -> Iterator[Object]:
        """Objects after ``start`` in the order of namespace and name; raises Unavailable before the first list."""
        self._check()
        for follower in self.followers.values():
            yield from follower.store.after(start, namespace=namespace)

    def namespaces(self) -> list[str]:
        """Namespaces that hold at least one object."""
        self._check()
        return [namespace for follower in self.followers.values() for namespace in follower.store.namespaces()]

    def _check(self) -> None:
        if not self.synced:
            raise Unavailable("The list of objects is still being read from the API server.", code="starting", retry_after=2)


class Cache:
    """Jobs and models. Enter it (``async with``) to start following."""

    def __init__(self, kube: Kube, namespaces: tuple[str, ...]) -> None:
        self.jobs = Collection(kube, names.JOBS, namespaces)
        self.models = Collection(kube, names.MODELS, namespaces)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Cache":
        followers = [follower for kind in (self.jobs, self.models) for follower in kind.followers.values()]
        self._tasks = [asyncio.create_task(follower.run()) for follower in followers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def synced(self) -> bool:
        """Whether reads are answered."""
        return self.jobs.synced and self.models.synced

    @property
    def alive(self) -> bool:
        """Whether every follower still runs; one that ended is a fault of ours, and only a restart mends it."""
        return all(not task.done() for task in self._tasks)
