"""The steps of preparing, in order: read, decide what becomes of each example, write."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from tunewright_crds.dataset import DatasetStatus, Split
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import REPORT, REPORT_DATA, dataset_key
from tunewright_trainer.prepare.conversation import Drop
from tunewright_trainer.prepare.drops import DROPS, Drops
from tunewright_trainer.prepare.keys import DROPPED, SPLITS, KeyFile, Keys, copies, fates
from tunewright_trainer.prepare.model import check_causal
from tunewright_trainer.prepare.near import SignatureFile
from tunewright_trainer.prepare.progress import Progress
from tunewright_trainer.prepare.reading import EXAMPLES, KEYS, SIGNATURES, Reader
from tunewright_trainer.prepare.records import joined
from tunewright_trainer.prepare.report import Findings, page
from tunewright_trainer.prepare.shards import shards_key, take_shards
from tunewright_trainer.prepare.sources import Read, shares
from tunewright_trainer.prepare.spill import SplitWriter, pieces
from tunewright_trainer.prepare.task import DATA_VERSION, Task
from tunewright_trainer.process import raise_if_stopped, telling
from tunewright_trainer.storage import Store, publish_folder, read_manifest
from tunewright_trainer.storage.folders import join

log = logging.getLogger(__name__)

SOURCES: Final = "sources.json"


def prepare(config: PodConfig, *, work: Path, store: Store, key: str | None) -> Outcome:
    """See `tunewright_trainer.prepare.run`."""
    outcome = Outcome(dataset=DatasetStatus())
    with telling(outcome):
        _check_options(config)
        task = Task.open(config, work / "base")
        key = dataset_key(config.job.namespace, task.digest) if key is None else key
        found = read_manifest(store, key)
        if found is not None and found.get("digest") == task.digest:
            log.info("the data was prepared before: %s", store.uri(key))
            return Outcome(
                dataset=DatasetStatus.model_validate(found["dataset"] | {"reused": True, "report_uri": store.uri(join(key, REPORT))})
            )
        if found is not None:
            store.delete(join(key, entry["name"]) for entry in found["files"])
        check_causal(task.model)
        work_on = _Preparation(task, work=work, store=store, key=key)
        outcome.dataset = work_on.status
        try:
            work_on.run()
        finally:
            work_on.tell()
        publish_folder(store, work_on.folder, key, manifest=work_on.manifest())
        store.delete([info.key for info in store.list(f"{shards_key(key)}/")])
        log.info("prepared %s: %s", store.uri(key), work_on.summary())
    return outcome


def _check_options(config: PodConfig) -> None:
    """A mistake in them ends the job here, before a pod with a GPU is asked for."""
    if config.spec.method.options:
        from tunewright_trainer.train.options import checked

        checked(config.spec.method)


class _Preparation:
    """One preparation."""

    def __init__(self, task: Task, *, work: Path, store: Store, key: str) -> None:
        self.task = task
        self.options = task.options
        self.sources = task.sources
        self.folder = work / "prepared"
        self._work = work
        self._store = store
        self._key = key
        work.mkdir(parents=True, exist_ok=True)
        self.drops = Drops(work / DROPS, task.sources)
        self.findings = Findings(task, self.drops)
        self.status = self.findings.status

    def run(self) -> None:
        """Read, clean, encode, split, pack and write into `folder`; raises `Refusal` where the data is not fit to train on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        parts = self._read()
        self._check_rows()
        self._write(parts)
        for part in parts:
            shutil.rmtree(part)
        self._check_splits()

    def _read(self) -> list[Path]:
        """Folders as a `Reader` leaves them, one after the other the whole data: what the shards have read, or else read now."""
        parts = take_shards(self.task, self._store, self._key, self._work / "shards", self.findings)
        if not parts:
            parts = [self._work / "reading"]
            Reader(self.task, parts[0], self.findings).read(shares(self.sources, 1)[0])
        return parts

    def _check_rows(self) -> None:
        rows = sum(source.rows for source in self.sources)
        invalid = sum(source.invalid for source in self.sources)
        allowed = self.options.max_invalid_fraction
        self.status.rejected = self.drops.counts.total() + invalid
        if invalid > allowed * rows:
            first = next(source for source in self.sources if source.errors)
            raise Refusal(
                FailureCode.DATA_INVALID,
                f"{first.errors[0]}; {invalid} of {rows} rows cannot be used, and maxInvalidFraction allows {allowed:g}",
                param=first.param,
            )
        for source in self.sources:
            if source.rows == 0:
                raise Refusal(FailureCode.DATA_EMPTY, f"{source.place.uri} holds no rows", param=source.param)

    def _write(self, parts: Sequence[Path]) -> None:
        """Decide what becomes of each example, and write the splits."""
        keys = joined([KeyFile(part / KEYS) for part in parts])
        near = None
        if self.task.compares:
            signatures = joined([SignatureFile(part / SIGNATURES) for part in parts])
            near = signatures.pairs(self.options.cleaning.near_duplicates.threshold)
        found = fates(keys, self.options, self._drop_all, near=near)
        taken = 0
        writers = [SplitWriter(self.folder / split.value, self.options, pairs=self.task.pairs) for split in SPLITS]
        times = copies(keys, found, [source.spec.weight for source in self.sources], self._drop_all)
        with Progress("writing", int(times[found != DROPPED].sum())) as progress:
            for before in range(times.max(initial=1)):
                # Copies of an example come far apart, so that they are seldom packed into one row.
                for number, examples in pieces([part / EXAMPLES for part in parts], np.where(times > before, found, np.uint8(DROPPED))):
                    raise_if_stopped()
                    writers[number].add(examples)
                    taken += len(examples.lengths)
                    progress.at(taken, taken)
        for split, writer in zip(SPLITS, writers, strict=True):
            writer.close()
            self.findings.splits[split.value] = writer.written
        self._tell_counts()
        sources = {"sources": self.task.depends["sources"], "heldOut": self.task.depends.get("heldOut", [])}
        (self.folder / SOURCES).write_bytes(orjson.dumps(sources, option=orjson.OPT_INDENT_2))

    def _drop_all(self, reason: str, keys: Keys) -> None:
        for key in keys:
            self.drops.add(reason, Read(int(key["source"]), int(key["file"]), int(key["line"]), Drop(reason)))

    def _tell_counts(self) -> None:
        splits = self.findings.splits
        train = splits[Split.TRAIN.value]
        self.status.train_examples, self.status.tokens, self.status.trainable_tokens = train.examples, train.tokens, train.trainable_tokens
        self.status.validation_examples = splits[Split.VALIDATION.value].examples
        self.status.test_examples = splits[Split.TEST.value].examples
        self.status.rejected = self.drops.counts.total() + sum(source.invalid for source in self.sources)

    def _check_splits(self) -> None:
        missing = None
        if not self.status.train_examples:
            missing = "to train on"
        elif self.task.config.spec.hyperparameters.early_stopping.enabled and not self.status.validation_examples:
            missing = "to validate with, which early stopping needs"
        if missing:
            why = ", ".join(f"{count} {reason}" for reason, count in self.drops.counts.most_common()) or "none was dropped"
            raise Refusal(FailureCode.DATA_EMPTY, f"no example is left {missing} ({why})", param="spec.dataset.sources")

    def tell(self) -> None:
        """Write the report, which also tells why data was refused; without a manifest it makes no prepared data of its folder."""
        facts = self.findings.facts()
        self._store.put_bytes(join(self._key, REPORT_DATA), orjson.dumps(facts, option=orjson.OPT_INDENT_2))
        self._store.put_bytes(join(self._key, REPORT), page(facts))
        self.drops.close()
        if self.drops.counts:
            self._store.upload(self.drops.path, join(self._key, DROPS))
        self.status.report_uri = self._store.uri(join(self._key, REPORT))

    def summary(self) -> str:
        """One line for the log."""
        status = self.status
        return (
            f"{status.train_examples} examples to train on, {status.validation_examples} to validate, {status.test_examples} to test; "
            f"{status.tokens} tokens, {status.trainable_tokens} learned; {status.rejected} rows rejected"
        )

    def manifest(self) -> dict[str, Any]:
        """What the manifest says besides its files."""
        depends = self.task.depends
        return {
            "digest": self.task.digest,
            "dataVersion": DATA_VERSION,
            "dataset": self.status.model_dump(mode="json", by_alias=True, exclude={"reused", "report_uri"}),
            "options": depends["options"],
            "seed": self.task.seed,
            "chatTemplate": self.task.template,
            "objective": self.task.config.spec.method.objective.value,
            "splits": self.findings.told_splits(),
            "licenses": self.status.licenses,
            "longest": self.task.longest,
            "model": {"uri": self.task.config.spec.model.uri, "commit": self.task.model.commit, "files": self.task.model.hashes},
        }
