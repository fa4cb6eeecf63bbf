"""SIGKILL before and after every single write of a job's life: one training Job an attempt, and the same end as if nothing had happened."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import a_job
from tests.support.control import Api, Operator, Proxy, control_plane, eventually, operator
from tests.support.kubelet import Ended, Kubelet, trains_well
from tunewright_crds.names import Role

# Names, times and addresses that differ from run to run.
PASSING = frozenset({"startTime", "endTime", "completionTime", "lastTransitionTime", "notBefore", "version", "message"})

# Of that life: a config, a preparation, two attempts, a model, four statuses and three events at least; two more statuses and events if all is seen.
FEWEST_WRITES, MOST_WRITES = 12, 30


@pytest.fixture(scope="module")
def plane() -> Api:
    return control_plane()


def preempted_once(role: Role, attempt: int, name: str) -> Ended | None:
    """A life with something in it: the first attempt loses its node."""
    if role is Role.TRAIN and attempt == 1:
        return Ended(exit_code=137, reason="Error", disruption="DeletionByTaintManager")
    return trains_well(role, attempt, name)


def lasting(value: Any) -> Any:
    """A status without what passes."""
    if isinstance(value, dict):
        return {name: lasting(part) for name, part in value.items() if name not in PASSING}
    return [lasting(part) for part in value] if isinstance(value, list) else value


class Lane:
    """One operator behind a proxy of its own, in a namespace of its own."""

    def __init__(self, api: Api, proxy: Proxy, kubelet: Kubelet, one: Operator, namespace: str) -> None:
        self.api, self.proxy, self.kubelet, self.one, self.namespace = api, proxy, kubelet, one, namespace

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, api: Api, folder: Path, name: str) -> AsyncIterator["Lane"]:
        namespace = await api.make_namespace()
        async with (
            Proxy(api) as proxy,
            Kubelet(api, namespace, preempted_once) as kubelet,
            operator(proxy.kubeconfig(folder), namespace, folder, IDENTITY=name) as one,
        ):
            yield cls(api, proxy, kubelet, one, namespace)
        await api.empty(namespace)

    async def live(self, name: str) -> Any:
        """A job's life from its application to its end; its lasting status."""
        job = a_job(name, self.namespace).with_spec(output={"modelName": "m"})
        await self.api.create(job.manifest)

        async def ended() -> Any:
            if self.one.running.returncode is not None:
                await self.one.start()
            found = await self.api.find("InstructionTuningJob", self.namespace, name)
            status = (found or {}).get("status") or {}
            return status if status.get("phase") in ("Succeeded", "Failed", "Cancelled") else None

        return lasting(await eventually(f"{name} ends", ended, context=self.one.tail))

    async def quiet(self) -> None:
        """Waits until the events after the last status are written too."""
        written = -1
        while written != len(self.proxy.writes):
            written = len(self.proxy.writes)
            await asyncio.sleep(0.3)

    async def sweep(self, undisturbed: Any) -> list[int]:
        """Lives with a kill at their first, second, … write, until a life has no such write; returns where it struck."""
        struck: list[int] = []
        for number in range(1, MOST_WRITES + 1):
            await self.quiet()
            self.proxy.writes.clear()
            self.proxy.strike_at = number

            def strike(number: int = number) -> None:
                self.proxy.strike_at = 0
                struck.append(number)
                self.one.kill()

            self.proxy.strike = strike
            name = f"{'after' if self.proxy.deliver_before else 'before'}-{number}"
            assert await self.live(name) == undisturbed, f"{name}\n{self.one.tail()}"
            made = Counter(self.kubelet.made(Role.TRAIN))
            assert [made[f"{name}-train-{attempt}"] for attempt in (1, 2, 3)] == [1, 1, 0], f"{name}: {made}"
            assert Counter(self.kubelet.made(Role.PREPARE))[f"{name}-prepare"] == 1
            await self.quiet()
            if number not in struck:
                return struck
        raise AssertionError(f"a life of more than {MOST_WRITES} writes: {self.proxy.writes}")


async def test_killed_before_and_after_every_write(plane: Api, tmp_path: Path) -> None:
    async with plane as api, Lane.opened(api, tmp_path, "before") as before, Lane.opened(api, tmp_path, "after") as after:
        undisturbed = await before.live("undisturbed")
        assert [attempt["reason"] for attempt in undisturbed["attempts"]] == ["NodeLost", "Succeeded"]
        after.proxy.deliver_before = True
        async with asyncio.TaskGroup() as lanes:  # one that fails ends the other, before their operators are ended
            sweeps = [lanes.create_task(lane.sweep(undisturbed)) for lane in (before, after)]
        struck = [sweep.result() for sweep in sweeps]
        assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in struck)
        assert min(len(numbers) for numbers in struck) >= FEWEST_WRITES, struck
