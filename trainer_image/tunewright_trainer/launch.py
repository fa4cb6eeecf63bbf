"""Several processes of one verb, one for each GPU, as torchrun would start them: those of this machine, which may be one of several that train together.

Not torchrun itself: the exit code and the termination message have to be those of the process that failed, and a request to stop has to leave each
process the time that it needs for a checkpoint.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tunewright_crds import names
from tunewright_crds.errors import ExitCode, FailureCode, Refusal
from tunewright_crds.pod import Failed, Outcome
from tunewright_trainer.process import TERMINATION_MESSAGE_VARIABLE, write_termination_message

FAREWELL_SECONDS: Final = 20.0  # for processes whose peer failed: to notice, and to tell; then they are killed
_POLL_SECONDS: Final = 0.1
_WORK: Final = "TUNEWRIGHT_WORK"


def local_rank() -> int:
    """Which of this machine's processes this is; 0 for one by itself."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def wanted(processes: int | None, gpus: int) -> int:
    """How many processes are to be started from here: none but this one, where it has been started as one of several already."""
    return 1 if "RANK" in os.environ else processes or max(1, gpus)


@dataclass(frozen=True)
class Node:
    """One machine of those that train together: number ``rank`` of ``nodes``, which have ``processes`` each and meet at ``leader``."""

    processes: int
    nodes: int = 1
    rank: int = 0
    leader: tuple[str, int] | None = None  # host and port; None: nobody but this machine is there, and any port will do

    @property
    def size(self) -> int:
        """Processes of all machines."""
        return self.nodes * self.processes

    def environment(self, local: int, leader: tuple[str, int]) -> dict[str, str]:
        """What a process is told, in torch's own names, of where it stands: the one with number ``local`` on this machine."""
        return {
            names.MASTER_ADDR: leader[0],
            names.MASTER_PORT: str(leader[1]),
            "WORLD_SIZE": str(self.size),
            "RANK": str(self.rank * self.processes + local),
            "LOCAL_RANK": str(local),
        }


def this_node(processes: int | None, gpus: int) -> Node:
    """Where this machine stands, as the operator tells the pods of a job of several nodes. Raises `Refusal` where that makes no sense."""
    nodes = _told(names.NODES, 1, least=1)
    if nodes == 1 or "RANK" in os.environ:
        return Node(wanted(processes, gpus))
    rank, host = _told(names.NODE_RANK, nodes), os.environ.get(names.MASTER_ADDR, "")
    if rank >= nodes or not host:
        what = f"one of {nodes} nodes needs {names.MASTER_ADDR}, and a {names.NODE_RANK} below {nodes}"
        raise Refusal(FailureCode.CONFIG_INVALID, what, param=names.NODE_RANK if host else names.MASTER_ADDR)
    processes = processes or _told(names.PROCESSES_PER_NODE, max(1, gpus), least=1)
    return Node(processes, nodes, rank, (host, _told(names.MASTER_PORT, names.RENDEZVOUS_PORT, least=1)))


def _told(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{name} is {text!r}, and has to be a whole number from {least} on", param=name)
    return int(text)


def scratch() -> Path:
    """The folder that all processes of a pod work in."""
    return Path(os.environ.get(_WORK) or names.SCRATCH)


@contextmanager
def work_folder() -> Iterator[Path]:
    """The folder that all processes of this machine work in: given by the one that started them, else a temporary one."""
    if given := os.environ.get(_WORK):
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
        yield Path(folder)


def run(node: Node, *, work: Path) -> int:
    """Run this program's own command line in the processes of ``node``, which know of one another and share ``work``; returns the exit code for all.

    That is the first one's, unless another process failed first: then it is that one's, with its termination message.
    """
    with tempfile.TemporaryDirectory(prefix="tunewright-processes-") as folder:
        messages = [Path(folder) / f"process-{local}.json" for local in range(node.processes)]
        leader = node.leader or ("127.0.0.1", _free_port())
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "tunewright_trainer", *sys.argv[1:]],
                env=os.environ | node.environment(local, leader) | {_WORK: str(work), TERMINATION_MESSAGE_VARIABLE: str(message)},
            )
            for local, message in enumerate(messages)
        ]
        signal.signal(signal.SIGTERM, lambda *_: _tell_all(children, signal.SIGTERM))
        try:
            failed = _wait(children)
        finally:
            _tell_all(children, signal.SIGKILL)
        told = [_outcome(message, child.returncode) for message, child in zip(messages, children, strict=True)]
        heard = cause(failed, told)
        code = children[heard].returncode
        write_termination_message(_with_progress(told[heard], told[0]))
        return code if code >= 0 else 128 - code


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for all; returns the local ranks that failed of themselves, in turn, with their return codes. Those left when one failed get some seconds to notice."""
    failed: dict[int, int] = {}
    deadline = float("inf")
    while True:
        ended = {rank: child.poll() for rank, child in enumerate(children)}
        failed |= {rank: code for rank, code in ended.items() if rank not in failed and code not in (None, 0, ExitCode.STOPPED)}
        if None not in ended.values() or time.monotonic() >= deadline:
            return failed
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + FAREWELL_SECONDS
        time.sleep(_POLL_SECONDS)


def cause(failed: Mapping[int, int], told: Sequence[Outcome]) -> int:
    """The local rank to hear, of those that failed with their return codes: the first that has a reason to tell, else one that was killed, else the first
    that broke, and last those that lost others; the first of all if none failed."""

    def how(rank: int) -> int:
        error = told[rank].error
        if error is not None and error.code is FailureCode.PEER_LOST:
            return 3
        if error is not None and error.code is not FailureCode.INTERNAL:
            return 0
        return 1 if failed[rank] < 0 else 2

    return min(failed, key=how, default=0)


def _with_progress(outcome: Outcome, leader: Outcome) -> Outcome:
    """Only the leader knows of checkpoints; whoever failed, they are told."""
    return leader.model_copy(update={"error": outcome.error})


def _outcome(message: Path, code: int) -> Outcome:
    """What a process left that ended with ``code``; one that was killed left nothing."""
    if message.exists():
        return Outcome.model_validate_json(message.read_bytes())
    if code == -signal.SIGABRT:
        return Outcome(
            error=Failed(code=FailureCode.PEER_LOST, message="a training process was aborted, as NCCL does with one that lost others")
        )
    return Outcome(error=Failed(code=FailureCode.INTERNAL, message="a training process ended without a word"))


def _tell_all(children: Sequence[subprocess.Popen[bytes]], sign: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(sign)
    if sign is signal.SIGKILL:
        for child in children:
            child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
