"""Who a caller is and what they may do: asked once, kept briefly, and refused where the API server cannot say."""

import asyncio
import functools

import pytest

from tests.support.front_end import FakeKube
from tunewright_api.auth import KEEP_SECONDS, Action, Auth, Remembered, bearer
from tunewright_api.errors import Unauthenticated, Unavailable


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_fifty_callers_with_one_token_cost_one_review() -> None:
    kube = FakeKube(users={"t": {"username": "ann"}})
    auth = Auth(kube.client())
    who = await asyncio.gather(*(auth.identity("t") for _ in range(50)))
    assert {one.username for one in who} == {"ann"}
    assert len(kube.calls) == 1


@pytest.mark.parametrize("token", ["", "unknown", "x" * 20_000])
async def test_a_token_that_the_api_server_does_not_know_is_refused(token: str) -> None:
    with pytest.raises(Unauthenticated):
        await Auth(FakeKube(users={"t": {"username": "ann"}}).client()).identity(token)


async def test_a_token_for_another_audience_is_refused() -> None:
    kube = FakeKube(users={"pod": {"username": "pod", "audience": "tunewright-progress"}})
    auth = Auth(kube.client())
    with pytest.raises(Unauthenticated):
        await auth.identity("pod")
    assert (await auth.identity("pod", audience="tunewright-progress")).username == "pod"


async def test_nobody_gets_in_while_the_api_server_cannot_be_asked_and_everybody_after() -> None:
    kube = FakeKube(users={"t": {"username": "ann"}}, rights={("ann", "get", "tunedmodels", "a")}, down=True)
    auth = Auth(kube.client())
    with pytest.raises(Unavailable):
        await auth.identity("t")
    kube.down = False
    who = await auth.identity("t")
    kube.down = True
    with pytest.raises(Unavailable):
        await auth.allowed(who, Action("get", "tunedmodels", "a"))
    kube.down = False
    assert await auth.allowed(who, Action("get", "tunedmodels", "a"))


async def test_rights_are_asked_for_each_namespace_and_verb() -> None:
    kube = FakeKube(rights={("ann", "list", "instructiontuningjobs", "a"), ("bob", "list", "instructiontuningjobs", "")})
    kube.users = {"ann": {"username": "ann"}, "bob": {"username": "bob"}}
    auth = Auth(kube.client())
    ann, bob = await auth.identity("ann"), await auth.identity("bob")
    assert await auth.namespaces(ann, "list", "instructiontuningjobs", ["a", "b"]) == {"a"}
    assert await auth.namespaces(bob, "list", "instructiontuningjobs", ["a", "b"]) == {"a", "b"}
    assert not await auth.allowed(ann, Action("get", "instructiontuningjobs", "a"))


async def test_an_answer_is_kept_for_ten_seconds_and_no_longer() -> None:
    clock, answers = Clock(), iter(range(10))

    async def ask() -> int:
        return next(answers)

    kept: Remembered[int] = Remembered(clock=clock)
    assert await kept.get("key", ask) == 0
    clock.now += KEEP_SECONDS - 0.1
    assert await kept.get("key", ask) == 0
    clock.now += 0.1
    assert await kept.get("key", ask) == 1


async def test_memory_is_bounded_and_the_oldest_answer_goes_first() -> None:
    asked: list[int] = []

    async def ask(number: int) -> int:
        asked.append(number)
        return number

    kept: Remembered[int] = Remembered(size=3)
    for number in (1, 2, 3, 4, 4, 1):
        await kept.get(number, functools.partial(ask, number))
    assert asked == [1, 2, 3, 4, 1]


async def test_a_caller_who_hangs_up_does_not_take_the_answer_from_the_others() -> None:
    go = asyncio.Event()

    async def ask() -> str:
        await go.wait()
        return "yes"

    kept: Remembered[str] = Remembered()
    first, second = (asyncio.create_task(kept.get("key", ask)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    go.set()
    assert await second == "yes"


@pytest.mark.parametrize(
    ("header", "token"), [(None, ""), ("", ""), ("Basic abc", ""), ("Bearer", ""), ("Bearer abc", "abc"), ("bearer  abc ", "abc")]
)
def test_only_bearer_headers_hold_a_token(header: str | None, token: str) -> None:
    assert bearer(header) == token
