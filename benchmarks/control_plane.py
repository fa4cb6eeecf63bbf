"""How fast, how chatty and how large the operator is: N jobs on a real API server, with pods played by a stand-in.

    python -m benchmarks.control_plane --jobs 1000

Prints one table. Everything (API server, etcd, operator, stand-in, this program) shares the machine's processors.
"""

import argparse
import asyncio
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster import facts
from tests.support.builders import a_job
from tests.support.control import NAME, Api, Operator, control_plane, eventually, operator
from tests.support.kubelet import Kubelet
from tunewright_crds.names import Role

CLIENTS = 32  # jobs applied at once
WAIT_SECONDS = 600.0


def main() -> None:
    """Reads the command line, measures, and prints the table."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--jobs", type=int, default=1000)
    jobs = asked.parse_args().jobs
    rows = asyncio.run(measure(jobs))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))


async def measure(jobs: int) -> list[tuple[str, str]]:
    """The rows of the table."""
    async with control_plane() as api:
        namespace = await api.make_namespace()
        with tempfile.TemporaryDirectory() as folder:
            try:
                async with (
                    operator(facts(NAME).kubeconfig, namespace, Path(folder), LEASE_SECONDS="30") as one,
                    Kubelet(api, namespace, roles=frozenset({Role.PREPARE})) as kubelet,
                ):
                    return await _measure(api, one, kubelet, namespace, jobs)
            finally:
                await api.empty(namespace)


async def _measure(api: Api, one: Operator, kubelet: Kubelet, namespace: str, jobs: int) -> list[tuple[str, str]]:
    await _until("the operator leads", one, lambda page: _value(page, "tunewright_leader") == 1)
    idle = _memory(one)
    served, played = await _api_server_seconds(api), time.process_time()
    began = time.monotonic()
    await _apply(api, namespace, jobs)
    applied = time.monotonic() - began

    async def all_there() -> bool:
        return len(kubelet.made(Role.TRAIN)) >= jobs

    await eventually("every job trains", all_there, seconds=WAIT_SECONDS, context=one.tail)
    trained = time.monotonic() - began
    busy = await _until("every status says so", one, lambda page: _settled(page, namespace, jobs))
    memory, spent = _memory(one), _processor_seconds(one)
    served, played = await _api_server_seconds(api) - served, time.process_time() - played
    twins = len(kubelet.made(Role.TRAIN)) - jobs
    one.kill()
    await one.running.wait()
    restarted = time.monotonic()
    await one.start()
    again = await _until(
        "every job was looked at again",
        one,
        lambda page: _settled(page, namespace, jobs) and _value(page, "tunewright_reconcile_seconds_count") >= jobs,
    )
    restart = time.monotonic() - restarted
    return [
        ("jobs", str(jobs)),
        ("applied within", f"{applied:.1f} s"),
        (f"from the first apply to {jobs} training Jobs", f"{trained:.1f} s"),
        ("training Jobs too many", str(twins)),
        ("API writes a job (events included)", f"{_value(busy, 'tunewright_api_writes') / jobs:.2f}"),
        ("processor time: operator, API server, this program", f"{spent:.1f}, {served:.1f}, {played:.1f} s"),
        ("memory idle, now, at most", f"{idle['VmRSS']:.0f}, {memory['VmRSS']:.0f}, {memory['VmHWM']:.0f} MB"),
        ("from a restart to every job looked at", f"{restart:.1f} s"),
        ("writes after the restart", f"{_value(again, 'tunewright_api_writes'):.0f}"),
    ]


async def _apply(api: Api, namespace: str, jobs: int) -> None:
    names = iter(range(jobs))

    async def client() -> None:
        for number in names:
            await api.create(a_job(f"job-{number}", namespace).manifest)

    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client())


async def _until(what: str, one: Operator, holds: Callable[[str], bool]) -> str:
    async def look() -> str:
        code, page = await one.probe("/metrics")
        return page if code == 200 and holds(page) else ""

    return await eventually(what, look, seconds=WAIT_SECONDS, context=one.tail)


def _settled(page: str, namespace: str, jobs: int) -> bool:
    """Every job trains on record, and nothing waits."""
    trains = _value(page, f'tunewright_jobs{{namespace="{namespace}",phase="Training"}}') == jobs
    return trains and _value(page, 'tunewright_reconcile_queue_depth{queue="jobs"}') == 0


def _value(page: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found.group(1)) if found else -1.0


def _memory(one: Operator) -> dict[str, float]:
    """VmRSS and VmHWM of the process, in MB of 1,000,000 bytes."""
    text = Path(f"/proc/{one.running.pid}/status").read_text(encoding="utf-8")
    return {name: int(value) * 1024 / 1e6 for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", text, re.MULTILINE)}


def _processor_seconds(one: Operator) -> float:
    """User and system time of the process."""
    fields = Path(f"/proc/{one.running.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _api_server_seconds(api: Api) -> float:
    """Processor time of the API server so far."""
    async with api.session.get("/metrics") as answer:
        return _value(await answer.text(), "process_cpu_seconds_total")


if __name__ == "__main__":
    main()
