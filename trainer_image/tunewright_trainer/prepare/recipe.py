"""The steps of preparing, in order."""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from tunewright_crds.dataset import Dataset, DatasetStatus, Overlong, Split
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import REPORT, REPORT_DATA, dataset_key
from tunewright_trainer.prepare.cleaning import Cleaner
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.drops import Drops
from tunewright_trainer.prepare.encode import OVERLONG, Encoded
from tunewright_trainer.prepare.encoding import Recipe, encoded
from tunewright_trainer.prepare.keys import DROPPED, KEY, SPLITS, KeyFile, Keys, copies, fates
from tunewright_trainer.prepare.model import BaseModel, check_causal, fetch_base_model
from tunewright_trainer.prepare.near import SignatureFile
from tunewright_trainer.prepare.report import Findings, page
from tunewright_trainer.prepare.sources import OpenSource, Read, in_reading_order, open_held_out, open_sources
from tunewright_trainer.prepare.spill import Spill, SplitWriter
from tunewright_trainer.prepare.template import chat_template, check_template, load_tokenizer
from tunewright_trainer.process import raise_if_stopped, telling, thread_count
from tunewright_trainer.storage import Store, publish_folder, read_manifest
from tunewright_trainer.storage.folders import join

log = logging.getLogger(__name__)

DATA_VERSION: Final = 2  # raised whenever the same input would be prepared differently
BATCH: Final = 500  # conversations encoded at once
DROPS: Final = "drops.jsonl"
# Options of the data set that the data depends on; where the sources lie and with which keys they are read changes nothing.
_OPTIONS: Final = (
    "validationFraction",
    "testFraction",
    "cleaning",
    "maxLength",
    "overlong",
    "packing",
    "trainOn",
    "maxInvalidFraction",
)


def prepare(config: PodConfig, *, work: Path, store: Store, key: str | None) -> Outcome:
    """See `tunewright_trainer.prepare.run`."""
    outcome = Outcome(dataset=DatasetStatus())
    with telling(outcome):
        model = fetch_base_model(config, work / "base")
        template = chat_template(model.folder, config.spec.model.chat_template)
        sources = open_sources(config)
        held_out = open_held_out(config)
        digest = address(config, sources, model, template, held_out=held_out)
        key = dataset_key(config.job.namespace, digest) if key is None else key
        found = read_manifest(store, key)
        if found is not None and found.get("digest") == digest:
            log.info("the data was prepared before: %s", store.uri(key))
            return Outcome(
                dataset=DatasetStatus.model_validate(found["dataset"] | {"reused": True, "report_uri": store.uri(join(key, REPORT))})
            )
        if found is not None:
            store.delete(join(key, entry["name"]) for entry in found["files"])
        check_causal(model)
        work_on = _Preparation(
            config, sources=sources, held_out=held_out, model=model, template=template, digest=digest, folder=work / "prepared"
        )
        outcome.dataset = work_on.status
        try:
            work_on.run()
        finally:
            # The report also tells why data was refused; without a manifest it makes no prepared data of its folder.
            facts = work_on.findings.facts()
            store.put_bytes(join(key, REPORT_DATA), orjson.dumps(facts, option=orjson.OPT_INDENT_2))
            store.put_bytes(join(key, REPORT), page(facts))
            work_on.drops.close()
            if work_on.drops.counts:
                store.upload(work_on.drops.path, join(key, DROPS))
            work_on.status.report_uri = store.uri(join(key, REPORT))
        publish_folder(store, work_on.folder, key, manifest=work_on.manifest())
        log.info("prepared %s: %s", store.uri(key), work_on.summary())
    return outcome


def address(config: PodConfig, sources: list[OpenSource], model: BaseModel, template: str, *, held_out: Sequence[OpenSource] = ()) -> str:
    """The SHA-256 of everything that the prepared data depends on."""
    options = config.spec.dataset.model_dump(mode="json", by_alias=True)
    depends: dict[str, Any] = {
        "version": DATA_VERSION,
        "sources": [source.identity() for source in sources],
        "options": {name: options[name] for name in _OPTIONS},
        "seed": config.spec.hyperparameters.seed,
        "template": template,
        "model": model.hashes,
    }
    if held_out:
        depends["heldOut"] = [source.identity() for source in held_out]
    if model.commit:
        depends["modelCommit"] = model.commit
    return hashlib.sha256(orjson.dumps(depends, option=orjson.OPT_SORT_KEYS)).hexdigest()


class _Preparation:
    """One preparation."""

    def __init__(
        self,
        config: PodConfig,
        *,
        sources: list[OpenSource],
        held_out: list[OpenSource],
        model: BaseModel,
        template: str,
        digest: str,
        folder: Path,
    ) -> None:
        self.config = config
        self.options = config.spec.dataset
        self.sources = sources
        self.held_out = held_out
        self.model = model
        self.template = template
        self.folder = folder
        self.status = DatasetStatus(digest=digest, licenses=sorted({source.license for source in sources if source.license}))
        # Positions begin anew with each example, so a packed row may be longer than the model reads; an example may not.
        self.longest = min(self.options.max_length, model.context or self.options.max_length)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.drops = Drops(folder.with_name(DROPS), sources)
        self.cleaner = Cleaner(self.options.cleaning)
        self.findings = Findings(self.status, self.options, sources, self.drops, self.cleaner, longest=self.longest)
        self._near = self.options.cleaning.near_duplicates.enabled or tests(self.options)
        self._seed = config.spec.hyperparameters.seed.to_bytes(8, "little")

    def run(self) -> None:
        """Read, clean, encode, split, pack and write into `folder`; raises `Refusal` where the data is not fit to train on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        scratch = self.folder.with_name("reading")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self.tokenizer = load_tokenizer(self.model.folder)
        check_template(self.tokenizer, self.template, own=bool(self.config.spec.model.chat_template))
        self.spill, self.keys, self.signatures = (
            Spill(scratch / "examples.arrow"),
            KeyFile(scratch / "keys"),
            SignatureFile(scratch / "near"),
        )
        try:
            self._encode(scratch)
        finally:
            self.spill.close()
            self.keys.close()
            self.signatures.close()
        self._check_rows()
        self._write()
        shutil.rmtree(scratch)
        self._check_splits()

    def _encode(self, scratch: Path) -> None:
        recipe = Recipe(self.model.folder, self.template, self.options.train_on, self.longest, self.options.overlong, self._near)
        processes = thread_count(self.config.spec.resources.cpu)
        for (reads, keys), found in encoded(self._batches(scratch), recipe, recipe.encoder(), processes=processes):
            raise_if_stopped()
            self._take(reads, keys, found)

    def _batches(self, scratch: Path) -> Iterator[tuple[tuple[list[Read], Keys], list[Conversation]]]:
        """Conversations that pass the cleaning rules, with where they are from and their keys."""
        for source in self.held_out:
            raise_if_stopped()
            self.cleaner.hold_out(source.read_all(scratch))
        for source in in_reading_order(self.sources):
            reads: list[Read] = []
            batch: list[Conversation] = []
            for read in source.read(scratch):
                found = read.found if isinstance(read.found, Drop) else self.cleaner.clean(read.found, source.spec.split)
                if isinstance(found, Drop):
                    self.drops.add(found.reason, read)
                    continue
                reads.append(read)
                batch.append(found)
                if len(batch) == BATCH:
                    yield (reads, self._keys(source, reads, batch)), batch
                    reads, batch = [], []
            if batch:
                yield (reads, self._keys(source, reads, batch)), batch
            log.info("read %s: %d rows, %d unusable", source.place.uri, source.rows, source.invalid)

    def _keys(self, source: OpenSource, reads: list[Read], batch: list[Conversation]) -> Keys:
        keys = np.empty(len(batch), dtype=KEY)
        keys["content"] = np.frombuffer(b"".join(_hash(one.content(), 16) for one in batch), dtype="<u8").reshape(-1, 2)
        groups = (_hash(one.group.encode() if one.group else orjson.dumps(one.prompt or one.text), 8, self._seed) for one in batch)
        keys["group"] = np.frombuffer(b"".join(groups), dtype="<u8")
        keys["line"] = [read.line for read in reads]
        keys["file"] = [read.file for read in reads]
        keys["source"] = source.index
        keys["split"] = SPLITS.index(source.spec.split)
        return keys

    def _take(self, reads: list[Read], keys: Keys, found: Encoded) -> None:
        """Keep the examples of a batch."""
        for number, reason in found.drops.items():
            if reason == OVERLONG and self.options.overlong is Overlong.FAIL:
                message = f"{self._place(reads[number])}: is longer than the {self.longest} tokens allowed"
                raise Refusal(FailureCode.DATA_INVALID, message, param="spec.dataset.maxLength")
            self.drops.add(reason, reads[number])
        if not len(found.kept):
            return
        self._check_ids(int(found.ids.max()))
        self.spill.add(found)
        self.keys.add(keys[found.kept])
        if found.signatures is not None:
            self.signatures.add(found.signatures)
        self.findings.take(found, self.tokenizer, self.sources[reads[0].source])

    def _place(self, read: Read) -> str:
        source = self.sources[read.source]
        return f"{source.name(source.files[read.file])}:{read.line}"

    def _check_ids(self, highest: int) -> None:
        size = self.model.vocabulary
        if size is not None and highest >= size:
            raise Refusal(
                FailureCode.MODEL_UNSUPPORTED,
                f"the tokenizer makes token id {highest}, and the model has only {size} token ids; they do not belong together",
                param="spec.model.uri",
            )

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

    def _write(self) -> None:
        """Decide what becomes of each example, and write the splits."""
        near = self.signatures.pairs(self.options.cleaning.near_duplicates.threshold) if self._near else None
        found = fates(self.keys, self.options, self._drop_all, near=near)
        writers = [SplitWriter(self.folder / split.value, self.options) for split in SPLITS]
        times = copies(self.keys, found, [source.spec.weight for source in self.sources], self._drop_all)
        for before in range(times.max(initial=1)):
            # Copies of an example come far apart, so that they are seldom packed into one row.
            for number, examples in self.spill.pieces(np.where(times > before, found, np.uint8(DROPPED))):
                raise_if_stopped()
                writers[number].add(examples)
        for split, writer in zip(SPLITS, writers, strict=True):
            writer.close()
            self.findings.splits[split.value] = writer.written
        self._tell_counts()

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
        elif self.config.spec.hyperparameters.early_stopping.enabled and not self.status.validation_examples:
            missing = "to validate with, which early stopping needs"
        if missing:
            why = ", ".join(f"{count} {reason}" for reason, count in self.drops.counts.most_common()) or "none was dropped"
            raise Refusal(FailureCode.DATA_EMPTY, f"no example is left {missing} ({why})", param="spec.dataset.sources")

    def summary(self) -> str:
        """One line for the log."""
        status = self.status
        return (
            f"{status.train_examples} examples to train on, {status.validation_examples} to validate, {status.test_examples} to test; "
            f"{status.tokens} tokens, {status.trainable_tokens} learned; {status.rejected} rows rejected"
        )

    def manifest(self) -> dict[str, Any]:
        """What the manifest says besides its files."""
        options = self.options.model_dump(mode="json", by_alias=True)
        return {
            "digest": self.status.digest,
            "dataVersion": DATA_VERSION,
            "dataset": self.status.model_dump(mode="json", by_alias=True, exclude={"reused", "report_uri"}),
            "options": {name: options[name] for name in _OPTIONS},
            "seed": self.config.spec.hyperparameters.seed,
            "chatTemplate": self.template,
            "splits": self.findings.told_splits(),
            "sources": [source.identity() for source in self.sources],
            "heldOut": [source.identity() for source in self.held_out],
            "licenses": self.status.licenses,
            "modelCommit": self.model.commit,
        }


def tests(options: Dataset) -> bool:
    """Whether there will be rows to test with."""
    return options.test_fraction > 0 or any(source.split is Split.TEST for source in options.sources)


def _hash(content: bytes, size: int, seed: bytes = b"") -> bytes:
    return hashlib.blake2b(content, digest_size=size, key=seed).digest()
