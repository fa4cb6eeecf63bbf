"""What a killed job goes on from: safetensors and JSON in storage, never a pickle.

A checkpoint is a folder `step-XXXXXXXX` with the trained weights, the optimizer's state, the best weights so far if early stopping needs them,
and `state.json`. Its manifest is written last, so a half-written one does not exist. Random numbers and the order of samples are functions of
(seed, step) and need no state.
"""

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from tunewright_crds.status import LastCheckpoint
from tunewright_crds.storage import MANIFEST, step_name
from tunewright_trainer.storage import Damaged, Store, fetch_folder, publish_folder, read_manifest

log = logging.getLogger(__name__)

WEIGHTS: Final = "weights.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
BEST: Final = "best.safetensors"
STATE: Final = "state.json"
FORMAT: Final = 1  # of what is written; another one is not resumed from

Tensors = dict[str, torch.Tensor]


@dataclass
class Counters:
    """Everything of a run that is not a tensor."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    best_step: int = 0
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    ended_early: bool = False
    planned_halvings: int = 0  # of the micro-batch, by the memory plan of the first attempt
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, float] = field(default_factory=dict)
    """What the objective keeps from step to step."""
    answered: str = ""  # the last request for a checkpoint that there is one for
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps that were made; see `tunewright_trainer.train.divergence` for this and what follows."""
    left_out: list[int] = field(default_factory=list)
    """Steps that nothing is learned from, ascending."""
    rollbacks: int = 0
    rollbacks_in_a_row: int = 0
    astray_at: int = 0  # the step of the last of them

    def with_detours_of(self, other: "Counters") -> "Counters":
        """These counters with what the other run left out."""
        told = ("left_out", "rollbacks", "rollbacks_in_a_row", "astray_at")
        return replace(self, **{name: getattr(other, name) for name in told})


@dataclass
class Snapshot:
    """A run at one step. The tensors are copies: training may go on."""

    counters: Counters
    weights: Tensors
    optimizer: Tensors
    best: Tensors | None = None


class Checkpoints:
    """The checkpoints of one job, under ``key`` of ``store``. ``lineage`` must agree before one is resumed from
    (which data, which format). ``after_each`` is called, in the writer's thread, once a checkpoint is complete."""

    def __init__(
        self, store: Store, key: str, work: Path, *, keep: int, lineage: dict[str, Any], after_each: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._key = key
        self._work = work
        self._keep = keep
        self._lineage = lineage | {"format": FORMAT}
        self._after_each = after_each
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self.last: LastCheckpoint | None = None

    def discard_after(self, step: int) -> None:
        """Remove what a run that goes back to ``step`` has no use for any more."""
        self._store.delete([f"{self._at(later)}/{MANIFEST}" for later in list(self._complete()) if later > step])

    def newest(self) -> Snapshot | None:
        """The newest whole checkpoint, each file verified; a damaged one is discarded and the one before is taken. None: begin at step 0."""
        damaged = False
        for step in sorted(self._complete(), reverse=True):
            folder = self._work / step_name(step)
            try:
                manifest = fetch_folder(self._store, self._at(step), folder)
                if manifest is None or any(manifest.get(name) != value for name, value in self._lineage.items()):
                    log.warning("checkpoint of step %d belongs to other data; it is not resumed from", step)
                    continue
                snapshot = _read(folder)
            except Damaged as error:
                log.warning("checkpoint of step %d is passed over: %s", step, error.message)
                damaged = True
                # Without its manifest the folder is absent, and is written whole when the run comes by again.
                self._store.delete([f"{self._at(step)}/{MANIFEST}"])
                continue
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.last = self._status(snapshot)
            return snapshot
        if damaged:
            log.warning("no whole checkpoint is left: training begins anew")
        return None

    def ready(self) -> bool:
        """Whether a snapshot can be begun now: not while the one before is on its way. Raises what that one failed with."""
        self._raise_error()
        return self._writer is None or not self._writer.is_alive()

    def save(self, snapshot: Snapshot) -> None:
        """Save a snapshot, and return when it lies complete in storage."""
        self.wait()
        self.begin(snapshot)
        self.wait()

    def wait(self) -> None:
        """Wait for the snapshot on its way; raises what it failed with."""
        if self._writer is not None:
            self._writer.join()
        self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def begin(self, snapshot: Snapshot) -> None:
        """Save a snapshot in the background; only when `ready`."""
        # A daemon: a run that fails does not wait for storage that is away.
        self._writer = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._writer.start()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.counters.step
        folder = self._work / step_name(step)
        try:
            _write(folder, snapshot)
            publish_folder(self._store, folder, self._at(step), manifest={"step": step, **self._lineage})
            self.last = self._status(snapshot)
            self._prune(step)
            self._after_each()
        except Exception as error:
            self._error = error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        """Remove all but the newest complete checkpoints up to ``newest``, manifests first; also what was left half-written before them."""
        steps = sorted((step for step in self._complete() if step <= newest), reverse=True)[: self._keep]
        doomed = [info.key for info in self._store.list(f"{self._key}/") if 0 <= _step_of(info.key) < steps[-1]]
        self._store.delete(sorted(doomed, key=lambda key: not key.endswith(MANIFEST)))

    def _complete(self) -> Iterator[int]:
        for info in self._store.list(f"{self._key}/"):
            if info.key.endswith(f"/{MANIFEST}") and _step_of(info.key) >= 0:
                yield _step_of(info.key)

    def _at(self, step: int) -> str:
        return f"{self._key}/{step_name(step)}"

    def _status(self, snapshot: Snapshot) -> LastCheckpoint:
        step = snapshot.counters.step
        return LastCheckpoint(step=step, uri=self._store.uri(self._at(step)), request=snapshot.counters.answered)

    def uri(self, step: int) -> str:
        """Address of the checkpoint of ``step``, or nothing where it is not kept."""
        return self._store.uri(self._at(step)) if read_manifest(self._store, self._at(step)) else ""


def copied(tensors: Tensors) -> Tensors:
    """Copies in the processor's memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write(folder: Path, snapshot: Snapshot) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(snapshot.weights, folder / WEIGHTS)
    save_file(snapshot.optimizer, folder / OPTIMIZER)
    if snapshot.best is not None:
        save_file(snapshot.best, folder / BEST)
    (folder / STATE).write_text(json.dumps(asdict(snapshot.counters)), encoding="utf-8")


def _read(folder: Path) -> Snapshot:
    from safetensors.torch import load_file

    counters = Counters(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    best = load_file(folder / BEST) if (folder / BEST).exists() else None
    return Snapshot(counters, load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), best)


def _step_of(key: str) -> int:
    """The step of a checkpoint's file; -1 for another key."""
    found = re.search(r"/step-(\d+)/[^/]+$", key)
    return int(found.group(1)) if found else -1
