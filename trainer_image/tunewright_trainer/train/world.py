"""The processes that train one model together: each computes its share of every batch, and all make the same step.

Started by `tunewright_trainer.launch` or by torchrun, which both say by environment variables who is who. One process by itself is a world too, in which
nothing is exchanged.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer import launch
from tunewright_trainer.train.data import Row

# How long one process waits for another: longer than a checkpoint or an evaluation takes. One that died is noticed at once.
PATIENCE: Final = timedelta(hours=1)
# How long the first ones wait for the others: pods of one job start when each finds a node, which then may have to pull the image.
MEETING_SECONDS: Final = 1800.0
_TELL_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.1
_HERE: Final = "tunewright/here"

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes; ``local_rank`` counts those of one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    in_step: bool = False
    """Whether all compute each layer together, and so have to go through the model equally often."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that reports, saves and publishes for all."""
        return self.rank == 0

    def shares(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows of each process, of about equally many tokens; within a share in the batch's order."""
        loads, owners = [0] * self.size, [0] * len(rows)
        for index in sorted(range(len(rows)), key=lambda index: -rows[index].tokens):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += rows[index].tokens
        return [[row for row, owner in zip(rows, owners, strict=True) if owner == rank] for rank in range(self.size)]

    def seed(self, base: int) -> int:
        """A seed of this process's own, and of one process by itself the base."""
        return (base + self.rank * 0x9E3779B97F4A7C15) % 2**63

    def of_each(self, value: T) -> list[T]:
        """The values of all processes, by rank; everywhere."""
        if self.size == 1:
            return [value]
        told = [value] * self.size
        dist.all_gather_object(told, value)
        return told

    def together(self, items: Sequence[S], found: Callable[[Sequence[S]], Sequence[T]]) -> list[T]:
        """What ``found`` gives of each item, everywhere; each process computes a part of them. Tensors among it are to be on the processor."""
        own = items[self.rank :: self.size]
        if self.in_step and len(own) * self.size < len(items):
            own = [*own, items[0]]  # again, for the others to go on; what comes of it is not asked for
        parts = self.of_each(found(own) if own else [])
        return [parts[at % self.size][at // self.size] for at in range(len(items))]

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return any(self.of_each(flag))

    def of_leader(self, value: T) -> T:
        """The leader's value, everywhere."""
        if self.size == 1:
            return value
        told: list[T] = [value]
        dist.broadcast_object_list(told)
        return told[0]

    def of_node(self, value: T) -> T:
        """The value of the first process of this machine, everywhere on it."""
        return self.of_each(value)[self.rank - self.local_rank]

    def wait(self) -> None:
        """Return when all have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(*, gpu: bool) -> Iterator[World]:
    """The world that this process was started into."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    world = World(rank=int(os.environ["RANK"]), size=size, local_rank=launch.local_rank())
    if gpu:
        torch.cuda.set_device(world.local_rank)
    store = None if "TORCHELASTIC_RUN_ID" in os.environ else _meet(world)  # torchrun has had them meet
    if not world.leads:
        logging.getLogger("tunewright_trainer").setLevel(logging.WARNING)  # the leader tells for all
    # Small things, such as metrics, go between processors; tensors of a GPU between GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE, store=store, rank=world.rank, world_size=world.size)
    yield world
    dist.destroy_process_group()  # not after a failure: the others may never come


def _meet(world: World) -> Any:
    """Return, when all have come, the store through which they find one another. Waits in Python's own time, so that a request to stop ends it."""
    host, port = os.environ[names.MASTER_ADDR], int(os.environ[names.MASTER_PORT])
    waiting = _Waiting(told=world.local_rank == 0)
    if world.leads:
        store = _store("localhost", port, leads=True)
    else:
        while why := _unreachable(host, port):
            waiting.go_on(f"the process that leads, at {host}:{port}: {why}")
        store = _store(host, port, leads=False)
    store.add(_HERE, 1)
    while (here := store.add(_HERE, 0)) < world.size:
        waiting.go_on(f"{world.size - here} of {world.size} processes")
    if waiting.told:
        log.info("process %d of %d, %s", world.rank, world.size, "which leads" if world.leads else "whose log is that of process 0")
    return store


def _store(host: str, port: int, *, leads: bool) -> Any:
    return dist.TCPStore(host, port, is_master=leads, wait_for_workers=False, timeout=PATIENCE)  # type: ignore[attr-defined]


def _unreachable(host: str, port: int) -> str:
    """Why nobody answers there yet: its name is not known, or it is not up; empty where somebody does."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class _Waiting:
    """A wait for others, told of in the log now and then. Raises `Refusal` when it has been too long."""

    def __init__(self, *, told: bool) -> None:
        self.told = told
        self._since = self._last = time.monotonic()

    def go_on(self, what: str) -> None:
        """Wait a moment more for ``what``."""
        now = time.monotonic()
        if now - self._since >= MEETING_SECONDS:
            raise Refusal(FailureCode.PEER_LOST, f"waited {MEETING_SECONDS / 60:.0f} minutes in vain for {what}")
        if self.told and now - self._last >= _TELL_SECONDS:
            self._last = now
            log.info("waiting for %s", what)
        time.sleep(_LOOK_SECONDS)
