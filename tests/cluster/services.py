"""Start, watch and end the programs of a cluster.

Each runs in its own process group and outlives us; its pid file holds the process's start time too, so that a pid that the
kernel gave to somebody else meanwhile is never mistaken for ours.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .build import find
from .places import ClusterError, Places

STOP_SECONDS = 10.0  # between asking a program to end and ending it
READY_SECONDS = 120.0  # a start takes seconds; a loaded machine gets more


@dataclass(frozen=True)
class Service:
    """A program of the cluster and how to see that it works."""

    name: str
    command: list[str]
    ready: Callable[[], bool]
    on_node: bool = False  # runs in the node's network namespace
    environment: dict[str, str] = field(default_factory=dict)
    after_start: Callable[[], None] = lambda: None


def start(service: Service, at: Places) -> None:
    """Start the service unless it runs; its output goes to `logs/<name>.log`."""
    if running(service.name, at):
        return
    command = [find(service.command[0]) or service.command[0], *service.command[1:]]
    if service.on_node:
        command = ["nsenter", f"--net=/run/netns/{at.namespace}", "--", *command]
    at.pids.mkdir(parents=True, exist_ok=True)
    at.logs.mkdir(parents=True, exist_ok=True)
    with (at.logs / f"{service.name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=at.state,
            env={**os.environ, **service.environment, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"},
        )
    born = started(process.pid)
    (at.pids / f"{service.name}.json").write_text(json.dumps({"pid": process.pid, "started": born}))


def wait_ready(service: Service, at: Places, *, seconds: float = READY_SECONDS) -> None:
    """Wait until the service works.

    Raises ClusterError with the end of its log when it ends or does not get ready in time.
    """
    deadline = time.monotonic() + seconds
    while not works(service):
        if not running(service.name, at):
            raise ClusterError(f"{service.name} ended right after its start:\n{log_tail(service.name, at)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"{service.name} was not ready after {seconds:.0f} s:\n{log_tail(service.name, at)}")
        time.sleep(0.1)
    service.after_start()


def works(service: Service) -> bool:
    """Whether the service does its job; a question that fails is answered no."""
    try:
        return service.ready()
    except ClusterError:
        return False


def running(name: str, at: Places) -> bool:
    """Whether the process that we started for `name` is alive."""
    return own_pid(name, at) is not None


def own_pid(name: str, at: Places) -> int | None:
    """The service's pid, if that process is still the one that we started."""
    try:
        noted = json.loads((at.pids / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    pid = int(noted["pid"])
    return pid if noted["started"] is not None and started(pid) == noted["started"] else None


def started(pid: int) -> int | None:
    """When the process began, in the kernel's ticks since boot; None if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state, *rest = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(rest[18])


def stop(name: str, at: Places) -> None:
    """Ask the service's process group to end, and end it if it does not."""
    pid = own_pid(name, at)
    if pid is not None:
        signal_group(pid, signal.SIGTERM)
        wait_gone(name, at)
    kill(name, at)


def kill(name: str, at: Places) -> None:
    """End the service's process group at once."""
    pid = own_pid(name, at)
    if pid is not None:
        signal_group(pid, signal.SIGKILL)
        wait_gone(name, at)
    (at.pids / f"{name}.json").unlink(missing_ok=True)


def wait_gone(name: str, at: Places) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while running(name, at) and time.monotonic() < deadline:
        time.sleep(0.05)


def signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def known(at: Places) -> list[str]:
    """Names of the services with a pid file, the last started first."""
    files = sorted(at.pids.glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return [file.stem for file in files]


def log_tail(name: str, at: Places, *, lines: int = 30) -> str:
    """The end of a service's log and where the rest is."""
    log = at.logs / f"{name}.log"
    if not log.exists():
        return f"(no log at {log})"
    return "\n".join([*log.read_text(errors="replace").splitlines()[-lines:], f"(all of it: {log})"])
