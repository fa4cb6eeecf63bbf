"""The steps of preparing, in order."""

import hashlib
import itertools
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import DatasetStatus, Overlong, Split
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import REPORT, dataset_key
from tunewright_trainer.prepare.convert import Conversation, without_control_characters
from tunewright_trainer.prepare.encode import IGNORED, Encoder, Example
from tunewright_trainer.prepare.model import BaseModel, check_causal, fetch_base_model
from tunewright_trainer.prepare.sources import MAX_ERRORS_TOLD, OpenSource, in_reading_order, open_sources
from tunewright_trainer.prepare.spill import Spill, Written, write_split
from tunewright_trainer.prepare.template import chat_template, check_template, load_tokenizer
from tunewright_trainer.process import raise_if_stopped, telling
from tunewright_trainer.storage import Store, publish_folder, read_manifest
from tunewright_trainer.storage.folders import join

log = logging.getLogger(__name__)

DATA_VERSION: Final = 1  # raised whenever the same input would be prepared differently
BATCH: Final = 500  # conversations tokenised at once
SAMPLES: Final = 3
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
        digest = address(config, sources, model, template)
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
        work_on = _Preparation(config, sources=sources, model=model, template=template, digest=digest, folder=work / "prepared")
        outcome.dataset = work_on.status
        try:
            work_on.run()
        finally:
            # The report also tells why data was refused; without a manifest it makes no prepared data of its folder.
            store.put_bytes(join(key, REPORT), work_on.report())
            work_on.status.report_uri = store.uri(join(key, REPORT))
        publish_folder(store, work_on.folder, key, manifest=work_on.manifest())
        log.info("prepared %s: %s", store.uri(key), work_on.summary())
    return outcome


def address(config: PodConfig, sources: list[OpenSource], model: BaseModel, template: str) -> str:
    """The SHA-256 of everything that the prepared data depends on."""
    options = config.spec.dataset.model_dump(mode="json", by_alias=True)
    depends = {
        "version": DATA_VERSION,
        "sources": [source.identity() for source in sources],
        "options": {name: options[name] for name in _OPTIONS},
        "seed": config.spec.hyperparameters.seed,
        "template": template,
        "model": model.hashes,
    }
    return hashlib.sha256(orjson.dumps(depends, option=orjson.OPT_SORT_KEYS)).hexdigest()


class _Preparation:
    """One preparation and what is counted in it."""

    def __init__(self, config: PodConfig, *, sources: list[OpenSource], model: BaseModel, template: str, digest: str, folder: Path) -> None:
        self.config = config
        self.options = config.spec.dataset
        self.sources = sources
        self.model = model
        self.template = template
        self.folder = folder
        self.status = DatasetStatus(digest=digest)
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.histogram: Counter[int] = Counter()
        self.splits: dict[str, Written] = {}
        self.samples: list[list[dict[str, Any]]] = []
        self._seen: set[bytes] = set()
        # Positions begin anew with each example, so a packed row may be longer than the model reads; an example may not.
        self.longest = min(self.options.max_length, model.context or self.options.max_length)

    def run(self) -> None:
        """Read, clean, encode, split, pack and write into `folder`; raises `Refusal` where the data is not fit to train on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.tokenizer = load_tokenizer(self.model.folder)
        check_template(self.tokenizer, self.template, own=bool(self.config.spec.model.chat_template))
        self.encoder = Encoder(self.tokenizer, self.template, train_on=self.options.train_on)
        scratch = self.folder.with_name("reading")
        scratch.mkdir(exist_ok=True)
        spill = Spill(scratch / "examples.arrow")
        for source in in_reading_order(self.sources):
            self._read(source, spill, scratch)
        spilled = spill.close()
        self.status.rejected = self.dropped.total() + sum(source.invalid for source in self.sources)
        self._check_rows()
        for split, members in spilled.members(self.options).items():
            self.splits[split.value] = write_split(spilled, members, self.folder / split.value, self.options)
        shutil.rmtree(scratch)
        self._tell_counts()
        self._check_splits()

    def _read(self, source: OpenSource, spill: Spill, scratch: Path) -> None:
        kept = self._clean(source.conversations(scratch))
        while batch := list(itertools.islice(kept, BATCH)):
            raise_if_stopped()
            examples: list[Example] = []
            keys: list[int] = []
            for (_, digest), example in zip(batch, self.encoder.encode([messages for messages, _ in batch]), strict=True):
                fit = self._fitted(source, example)
                if fit is not None:
                    examples.append(fit)
                    keys.append(self._key(digest))
            if examples:
                self._check_ids(examples)
                spill.add(examples, keys, source.spec.split)
        log.info("read %s: %d rows, %d unusable", source.place.uri, source.rows, source.invalid)

    def _clean(self, conversations: Iterator[Conversation]) -> Iterator[tuple[Conversation, bytes]]:
        """The conversations that pass the cleaning rules, each with the hash of its content."""
        rules = self.options.cleaning
        for raw in conversations:
            messages = without_control_characters(raw)
            digest = hashlib.blake2b(orjson.dumps(messages), digest_size=16).digest()
            if sum(len(message["content"]) for message in messages) > rules.max_characters:
                self.dropped["longer than cleaning.maxCharacters"] += 1
            elif (
                min(len(message["content"].strip()) for message in messages if message["role"] == "assistant") < rules.min_output_characters
            ):
                self.dropped["answer shorter than cleaning.minOutputCharacters"] += 1
            elif rules.deduplicate and digest in self._seen:
                self.dropped["duplicate"] += 1
            else:
                if rules.deduplicate:
                    self._seen.add(digest)
                yield messages, digest

    def _fitted(self, source: OpenSource, example: Example | None) -> Example | None:
        """The example cut to the longest length, if it is to be used."""
        if example is None:
            self.dropped["refused by the chat template"] += 1
            return None
        length = len(example.input_ids)
        if length > self.longest:
            if self.options.overlong is Overlong.FAIL:
                raise Refusal(
                    FailureCode.DATA_INVALID,
                    f"{source.place.uri} has an example of {length} tokens; the longest allowed is {self.longest}",
                    param="spec.dataset.maxLength",
                )
            if self.options.overlong is Overlong.DROP:
                self.dropped["longer than maxLength"] += 1
                return None
            example = Example(example.input_ids[: self.longest], example.labels[: self.longest])
        if not (example.labels != IGNORED).any():
            self.dropped["nothing to learn within maxLength" if length > self.longest else "nothing to learn"] += 1
            return None
        self.truncated += length > self.longest
        self.histogram[len(example.input_ids).bit_length()] += 1
        if len(self.samples) < SAMPLES and source.spec.split is Split.TRAIN:
            self.samples.append(self._sample(example))
        return example

    def _key(self, digest: bytes) -> int:
        seed = self.config.spec.hyperparameters.seed.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=seed).digest(), "little")

    def _check_ids(self, examples: list[Example]) -> None:
        size = self.model.vocabulary
        highest = max(int(example.input_ids.max()) for example in examples)
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

    def _tell_counts(self) -> None:
        counts = self.splits[Split.TRAIN.value]
        self.status.train_examples = counts.examples
        self.status.validation_examples = self.splits[Split.VALIDATION.value].examples
        self.status.test_examples = self.splits[Split.TEST.value].examples
        self.status.tokens = counts.tokens
        self.status.trainable_tokens = counts.trainable_tokens

    def _check_splits(self) -> None:
        missing = None
        if not self.status.train_examples:
            missing = "to train on"
        elif self.config.spec.hyperparameters.early_stopping.enabled and not self.status.validation_examples:
            missing = "to validate with, which early stopping needs"
        if missing:
            why = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common()) or "none was dropped"
            raise Refusal(FailureCode.DATA_EMPTY, f"no example is left {missing} ({why})", param="spec.dataset.sources")

    def _sample(self, example: Example) -> list[dict[str, Any]]:
        """An example as text, in pieces that are learned or not."""
        learned = example.labels != IGNORED
        cuts = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(learned)]
        return [
            {"text": self.tokenizer.decode(example.input_ids[start:end].tolist()), "learned": bool(learned[start])}
            for start, end in itertools.pairwise(cuts)
        ]

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
            "splits": {name: asdict(written) for name, written in self.splits.items()},
            "sources": [source.identity() for source in self.sources],
            "licenses": sorted({source.spec.license for source in self.sources if source.spec.license}),
        }

    def report(self) -> bytes:
        """The data report, as JSON. It lies beside the data and is the one place that shows rows: three examples with what is learned of them."""
        train = self.splits.get(Split.TRAIN.value, Written())
        errors = [error for source in self.sources for error in source.errors][:MAX_ERRORS_TOLD]
        report = {
            "dataset": self.status.model_dump(mode="json", by_alias=True, exclude={"reused", "report_uri"}),
            "sources": [
                {
                    "uri": source.place.uri,
                    "files": len(source.files),
                    "skippedFiles": source.skipped[:MAX_ERRORS_TOLD],
                    "rows": source.rows,
                    "invalid": source.invalid,
                    "license": source.spec.license,
                }
                for source in self.sources
            ],
            "invalid": sum(source.invalid for source in self.sources),
            "errors": errors,
            "dropped": dict(self.dropped.most_common()),
            "truncated": self.truncated,
            "longestAllowed": self.longest,
            "splits": {name: asdict(written) for name, written in self.splits.items()},
            "packedShare": round(train.tokens / (train.rows * self.options.max_length), 4) if train.rows and self.options.packing else None,
            "learnedShare": round(train.trainable_tokens / train.tokens, 4) if train.tokens else None,
            "examplesByTokens": {f"{2 ** (bits - 1)}-{2**bits - 1}": self.histogram[bits] for bits in sorted(self.histogram)},
            "samples": self.samples,
        }
        return orjson.dumps(report, option=orjson.OPT_INDENT_2)
