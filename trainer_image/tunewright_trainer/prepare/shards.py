"""Reading by several pods: each reads its share of the files and leaves what it made of it in storage, where the pod that writes the data finds it.

The shares follow one another in the order in which one pod would read, so what is written does not depend on how many there are.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import dataset_key
from tunewright_trainer.prepare.drops import DROPS, Drops
from tunewright_trainer.prepare.reading import Reader
from tunewright_trainer.prepare.report import Findings
from tunewright_trainer.prepare.sources import shares
from tunewright_trainer.prepare.task import Task
from tunewright_trainer.storage import Store, fetch_folder, publish_folder, read_manifest
from tunewright_trainer.storage.folders import join

log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """One share of the files: its number from 0, and how many there are."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"shard {self.number + 1} of {self.of}"

    def key(self, dataset: str) -> str:
        """Where it lies, by the place of the data set."""
        return f"{shards_key(dataset)}/{self.number:02d}-of-{self.of:02d}"


def shards_key(dataset: str) -> str:
    """The folder of a data set's shards."""
    return join(dataset, "shards")


def prepare_shard(config: PodConfig, number: int, *, work: Path, store: Store) -> Outcome:
    """See `tunewright_trainer.prepare.run_shard`."""
    task = Task.open(config, work / "base")
    dataset = dataset_key(config.job.namespace, task.digest)
    shard = Shard(number, task.options.shards)
    key = shard.key(dataset)
    if read_manifest(store, dataset) is not None or read_manifest(store, key) is not None:
        log.info("%s was read before", shard)
        return Outcome()
    task.check()
    folder = work / "shard"
    work.mkdir(parents=True, exist_ok=True)
    drops = Drops(work / DROPS, task.sources)
    findings = Findings(task, drops)
    try:
        Reader(task, folder, findings).read(shares(task.sources, shard.of)[number])
    finally:
        drops.close()
    drops.path.rename(folder / DROPS)
    publish_folder(store, folder, key, manifest={"tally": findings.tally()})
    log.info("%s is read: %s", shard, store.uri(key))
    return Outcome()


def take_shards(task: Task, store: Store, dataset: str, folder: Path, findings: Findings) -> list[Path]:
    """Bring every shard here, in order; none where none was read. One that is missing between others is read now."""
    shards = [Shard(number, task.options.shards) for number in range(task.options.shards)]
    if len(shards) == 1 or not any(read_manifest(store, shard.key(dataset)) for shard in shards):
        return []
    parts = []
    for shard, pieces in zip(shards, shares(task.sources, len(shards)), strict=True):
        part = folder / str(shard.number)
        manifest = fetch_folder(store, shard.key(dataset), part)
        if manifest is None:
            log.info("%s is not there; it is read now", shard)
            Reader(task, part, findings).read(pieces)
        else:
            findings.add(manifest["tally"])
            findings.drops.take(part / DROPS)
        parts.append(part)
    return parts
