"""The cache: a list, then a watch, whatever happens to either."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.front_end import FakeKube, in_process, thing
from tunewright_api import cache
from tunewright_api.cache import Collection, Follower, Store
from tunewright_api.errors import Unavailable
from tunewright_api.kube import Kube

NAMES = st.sampled_from(["a", "b", "c-d", "c.d"])
EVENTS = st.lists(st.tuples(st.booleans(), NAMES, NAMES, st.integers()), max_size=40)


@given(EVENTS)
def test_a_store_holds_what_was_put_and_not_dropped_in_order(events: list[tuple[bool, str, str, int]]) -> None:
    store, model = Store(), {}
    for put, namespace, name, number in events:
        one = thing(name, namespace, spec={"number": number})
        if put:
            store.put(one)
            model[(namespace, name)] = one
        else:
            store.drop(one)
            model.pop((namespace, name), None)
    assert list(store.after(("", ""))) == [model[key] for key in sorted(model)]
    assert store.namespaces() == sorted({namespace for namespace, _ in model})
    for namespace in ("a", "c-d"):
        assert list(store.after((namespace, "b"), namespace=namespace)) == [
            model[key] for key in sorted(model) if key[0] == namespace and key[1] > "b"
        ]


class Script:
    """An API server that answers one call after the other; after the last, watches stay silent."""

    def __init__(self, *answers: Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def follower(self) -> Follower:
        client = httpx.AsyncClient(base_url="https://kube.test", transport=httpx.MockTransport(self._answer))
        return Follower(Kube(client), "/things")

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        query = request.url.params
        self.asked.append(f"watch {query['resourceVersion']}" if "watch" in query else f"list {query.get('continue', '')}".strip())
        return self.answers.pop(0)(request) if self.answers else httpx.Response(200, content=_events(stay=True))


async def _events(*events: tuple[str, dict[str, Any]], stay: bool = False, breaks: bool = False) -> AsyncIterator[bytes]:
    for kind, one in events:
        line = orjson.dumps({"type": kind, "object": one}) + b"\n"
        yield line[:20]  # a line may come in pieces
        yield line[20:]
    if breaks:
        raise httpx.ReadError("reset by peer")
    if stay:
        await asyncio.Event().wait()


def listed(*things: dict[str, Any], version: str, more: str = "") -> Callable[[httpx.Request], httpx.Response]:
    meta = {"resourceVersion": version} | ({"continue": more} if more else {})
    return lambda _: httpx.Response(200, json={"metadata": meta, "items": list(things)})


def watched(*events: tuple[str, dict[str, Any]], breaks: bool = False) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(200, content=_events(*events, breaks=breaks))


def refused(status: int) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, json={"message": "no"})


def at(version: str, name: str = "x", **spec: Any) -> dict[str, Any]:
    one = thing(name, spec=spec)
    one["metadata"]["resourceVersion"] = version
    return one


GONE = ("ERROR", {"code": 410, "message": "too old resource version"})
LIVES = {
    "pages of a list make one store": (
        [listed(at("1", "a"), version="5", more="p2"), listed(at("2", "b"), version="5")],
        ["list", "list p2", "watch 5"],
        ["a", "b"],
    ),
    "events change it, and a bookmark moves the version on": (
        [
            listed(at("1", "a"), version="5"),
            watched(("ADDED", at("6", "b")), ("DELETED", at("7", "a")), ("BOOKMARK", {"metadata": {"resourceVersion": "9"}})),
        ],
        ["list", "watch 5", "watch 9"],
        ["b"],
    ),
    "a broken watch goes on from the last event": (
        [listed(version="5"), watched(("ADDED", at("6", "b")), breaks=True)],
        ["list", "watch 5", "watch 6"],
        ["b"],
    ),
    "a forgotten version means a new list": (
        [listed(at("1", "a"), version="5"), watched(GONE), listed(at("8", "b"), version="8")],
        ["list", "watch 5", "list", "watch 8"],
        ["b"],
    ),
    "a forgotten page means a new list": (
        [listed(at("1", "a"), version="5", more="p2"), refused(410), listed(at("8", "b"), version="8")],
        ["list", "list p2", "list", "watch 8"],
        ["b"],
    ),
    "a server that fails is asked again": (
        [refused(500), refused(403), listed(at("1", "a"), version="5"), refused(503)],
        ["list", "list", "list", "watch 5", "watch 5"],
        ["a"],
    ),
    "line separators inside a text end no line": (
        [listed(version="5"), watched(("ADDED", at("6", "b", text="one\u0085two\u2028three")))],
        ["list", "watch 5", "watch 6"],
        ["b"],
    ),
}


@pytest.mark.parametrize("life", LIVES)
async def test_a_follower_keeps_up(life: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked, held = LIVES[life]
    monkeypatch.setattr(cache, "BACKOFF_SECONDS", (0.001, 0.01))
    script = Script(*answers)
    follower = script.follower()
    task = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(60):
            while len(script.asked) < len(asked):
                await asyncio.sleep(0.001)
        assert script.asked == asked
        assert [one["metadata"]["name"] for one in follower.store.after(("", ""))] == held
        assert follower.synced
        assert follower.age < 60
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nothing_is_told_before_the_first_list() -> None:
    with pytest.raises(Unavailable) as told:
        Collection(FakeKube().client(), "instructiontuningjobs", ()).get("a", "b")
    assert told.value.retry_after


async def test_pages_of_a_list_join_without_gap_or_repeat() -> None:
    jobs = [thing(f"job-{number:02}", namespace) for namespace in ("team-a", "team-b", "team-c") for number in range(7)]
    kube = FakeKube(users={"t": {"username": "ann"}}, objects={"instructiontuningjobs": jobs, "tunedmodels": []})
    kube.rights = {("ann", "list", "instructiontuningjobs", namespace) for namespace in ("team-a", "team-c")}
    async with in_process(kube) as client:
        found, token = [], ""
        while True:
            answer = (
                await client.get("/apis/v1/jobs", params={"limit": 4, "continue": token}, headers={"Authorization": "Bearer t"})
            ).json()
            found += [(one["metadata"]["namespace"], one["metadata"]["name"]) for one in answer["items"]]
            token = answer["metadata"].get("continue", "")
            if not token:
                break
    assert found == [(namespace, f"job-{number:02}") for namespace in ("team-a", "team-c") for number in range(7)]
