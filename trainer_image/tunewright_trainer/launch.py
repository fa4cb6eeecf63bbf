"""Several processes of one verb on this machine, one for each GPU, as torchrun would start them.

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
from pathlib import Path
from typing import Final

from tunewright_crds.errors import ExitCode, FailureCode
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


@contextmanager
def work_folder() -> Iterator[Path]:
    """The folder that all processes of this machine work in: given by the one that started them, else a temporary one."""
    if given := os.environ.get(_WORK):
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
        yield Path(folder)


def run(count: int, *, work: Path) -> int:
    """Run this program's own command line in ``count`` processes that know of one another and share ``work``; returns the exit code for all.

    That is the leader's, unless another process failed first: then it is that one's, with its termination message.
    """
    with tempfile.TemporaryDirectory(prefix="tunewright-processes-") as folder:
        messages = [Path(folder) / f"process-{rank}.json" for rank in range(count)]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count), _WORK: str(work)}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "tunewright_trainer", *sys.argv[1:]],
                env=os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank), TERMINATION_MESSAGE_VARIABLE: str(message)},
            )
            for rank, message in enumerate(messages)
        ]
        signal.signal(signal.SIGTERM, lambda *_: _tell_all(children, signal.SIGTERM))
        try:
            failed = _wait(children)
        finally:
            _tell_all(children, signal.SIGKILL)
        told = [_outcome(message) for message in messages]
        heard = cause(failed, told)
        code = children[heard].returncode
        write_termination_message(_with_progress(told[heard], told[0]))
        return code if code >= 0 else 128 - code


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for all; returns the ranks that failed of themselves, in turn, with their return codes. Those left when one failed get some seconds to notice."""
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
    """The rank to hear, of those that failed with their return codes: the first that has a reason to tell, else one that was killed, else the first, which
    will not have lost the others but been lost by them; the leader if none failed."""

    def how(rank: int) -> int:
        error = told[rank].error
        if error is not None and error.code is not FailureCode.INTERNAL:
            return 0
        return 1 if failed[rank] < 0 else 2

    return min(failed, key=how, default=0)


def _with_progress(outcome: Outcome, leader: Outcome) -> Outcome:
    """Only the leader knows of checkpoints; whoever failed, they are told."""
    return leader.model_copy(update={"error": outcome.error})


def _outcome(message: Path) -> Outcome:
    """What a process left; one that was killed left nothing."""
    if not message.exists():
        return Outcome(error=Failed(code=FailureCode.INTERNAL, message="a training process ended without a word"))
    return Outcome.model_validate_json(message.read_bytes())


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
