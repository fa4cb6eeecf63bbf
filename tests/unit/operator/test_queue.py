"""The queue's promises: one run a key at a time, many pokes one run, and a key that fails holds up nobody."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from tunewright_operator.queue import KeyedQueue

SECONDS = 60  # until a wait counts as hanging


@contextlib.asynccontextmanager
async def running(work: Callable[[str], Awaitable[None]], *, width: int = 4) -> AsyncIterator[KeyedQueue[str]]:
    queue: KeyedQueue[str] = KeyedQueue(work, width=width)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_key_never_runs_twice_at_once_and_pokes_during_a_run_make_one_more() -> None:
    runs, active, most, go = Counter[str](), Counter[str](), Counter[str](), asyncio.Event()
    twice = asyncio.Event()

    async def work(key: str) -> None:
        runs[key] += 1
        active[key] += 1
        most[key] = max(most[key], active[key])
        await go.wait()
        active[key] -= 1
        if runs[key] == 2:
            twice.set()

    async with running(work) as queue:
        queue.poke("a")
        while not runs["a"]:
            await asyncio.sleep(0)
        for _ in range(5):
            queue.poke("a")
        go.set()
        await asyncio.wait_for(twice.wait(), SECONDS)
        for _ in range(20):
            await asyncio.sleep(0)
    assert (runs["a"], most["a"]) == (2, 1)


async def test_a_key_that_fails_is_tried_again_and_holds_up_nobody() -> None:
    runs, done, recovered = Counter[str](), asyncio.Event(), asyncio.Event()

    async def work(key: str) -> None:
        runs[key] += 1
        if key == "poison" and runs[key] == 1:
            raise ValueError("no")
        if key == "poison":
            recovered.set()
        if sum(runs.values()) - runs["poison"] == 20:
            done.set()

    async with running(work, width=1) as queue:
        queue.poke("poison")
        for number in range(20):
            queue.poke(str(number))
        await asyncio.wait_for(done.wait(), SECONDS)
        await asyncio.wait_for(recovered.wait(), SECONDS)


async def test_of_several_wishes_for_later_the_earliest_holds() -> None:
    rung = asyncio.Event()

    async def work(_: str) -> None:
        rung.set()

    async with running(work) as queue:
        queue.poke_in("a", 3600)
        queue.poke_in("a", 0.01)
        queue.poke_in("a", 7200)
        await asyncio.wait_for(rung.wait(), SECONDS)
