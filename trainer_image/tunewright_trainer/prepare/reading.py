"""Reading data, or a part of it: from rows to encoded examples on this machine, with what was found on the way."""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import orjson

from tunewright_crds.dataset import Overlong, Split, TrainOn
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.encode import OVERLONG, Encoded
from tunewright_trainer.prepare.encoding import Recipe, encoded
from tunewright_trainer.prepare.keys import KEY, SPLITS, KeyFile, Keys
from tunewright_trainer.prepare.near import SignatureFile
from tunewright_trainer.prepare.progress import Progress
from tunewright_trainer.prepare.report import Findings
from tunewright_trainer.prepare.sources import OpenSource, Piece, Read
from tunewright_trainer.prepare.spill import Spill
from tunewright_trainer.prepare.task import Task
from tunewright_trainer.prepare.template import check_template, load_tokenizer
from tunewright_trainer.process import raise_if_stopped, thread_count

log = logging.getLogger(__name__)

BATCH: Final = 500  # conversations encoded at once
EXAMPLES: Final = "examples.arrow"
KEYS: Final = "keys"
SIGNATURES: Final = "signatures"


class Reader:
    """Reads pieces of the sources into `folder`: the files `EXAMPLES`, `KEYS` and, where near duplicates are looked for, `SIGNATURES`.

    What it finds on the way is told to the findings and the sources.
    """

    def __init__(self, task: Task, folder: Path, findings: Findings) -> None:
        self._task = task
        self._folder = folder
        self._findings = findings
        self._drops = findings.drops
        self._options = task.options
        self._cleaner = findings.cleaner
        self._seed = task.seed.to_bytes(8, "little")

    def read(self, pieces: Sequence[Piece]) -> None:
        """Read, clean and encode; raises `Refusal` where a file or the model is not fit."""
        task = self._task
        self.tokenizer = load_tokenizer(task.model.folder)
        check_template(self.tokenizer, task.template, own=bool(task.config.spec.model.chat_template))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.spill, self.keys = Spill(self._folder / EXAMPLES, pairs=task.pairs or task.unpaired), KeyFile(self._folder / KEYS)
        self.signatures = SignatureFile(self._folder / SIGNATURES) if task.compares else None
        try:
            self._encode(pieces)
        finally:
            self.spill.close()
            self.keys.close()
            if self.signatures:
                self.signatures.close()

    def _encode(self, pieces: Sequence[Piece]) -> None:
        task = self._task
        recipe = Recipe(
            task.model.folder,
            task.template,
            self._options.train_on,
            task.longest,
            self._options.overlong,
            near=task.compares,
            seq2seq=task.seq2seq,
            instructed=task.instructed,
        )
        processes = thread_count(task.config.spec.resources.cpu)
        size = sum(task.sources[piece.source].files[file].size for piece in pieces for file in piece.files)
        with Progress("reading", size) as progress:
            for (reads, keys), found in encoded(self._batches(pieces), recipe, recipe.encoder(), processes=processes):
                raise_if_stopped()
                self._take(reads, keys, found)
                progress.at(sum(source.bytes_read for source in task.sources), sum(source.rows for source in task.sources))

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[tuple[tuple[list[Read], Keys], list[Conversation]]]:
        """Conversations that pass the cleaning rules, with where they are from and their keys."""
        self._hold_out(pieces)
        for piece in pieces:
            source = self._task.sources[piece.source]
            reads: list[Read] = []
            batch: list[Conversation] = []
            for read in source.read(piece.files, self._folder / "incoming"):
                found = read.found if isinstance(read.found, Drop) else self._cleaner.clean(read.found, source.spec.split)
                if isinstance(found, Drop):
                    self._drops.add(found.reason, read)
                    continue
                for one in found.exchanges(last=self._options.train_on is TrainOn.LAST_RESPONSE) if self._task.seq2seq else (found,):
                    reads.append(read)
                    batch.append(one)
                if len(batch) >= BATCH:
                    yield (reads, self._keys_of(source, reads, batch)), batch
                    reads, batch = [], []
            if batch:
                yield (reads, self._keys_of(source, reads, batch)), batch
            log.info("read %s: %d rows, %d unusable", source.place.uri, source.rows, source.invalid)

    def _hold_out(self, pieces: Sequence[Piece]) -> None:
        """Let the cleaning rules know what rows to train on must not share, where that is not among the pieces."""
        if not self._options.cleaning.decontaminate.enabled:
            return
        scratch = self._folder / "incoming"
        for source in self._task.held_out:
            raise_if_stopped()
            self._cleaner.hold_out(source.read_all(scratch))
        read_here = {(piece.source, file) for piece in pieces for file in piece.files}
        aside = self._cleaner.aside()
        for source in self._task.sources:
            if source.spec.split is not Split.TRAIN:
                others = [file for file in range(len(source.files)) if (source.index, file) not in read_here]
                for read in source.again().read(others, scratch):
                    if isinstance(read.found, Conversation):
                        aside.clean(read.found, source.spec.split)

    def _keys_of(self, source: OpenSource, reads: list[Read], batch: list[Conversation]) -> Keys:
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
            if reason == OVERLONG and self._options.overlong is Overlong.FAIL:
                message = f"{self._place(reads[number])}: is longer than the {self._task.longest} tokens allowed"
                raise Refusal(FailureCode.DATA_INVALID, message, param="spec.dataset.maxLength")
            self._drops.add(reason, reads[number])
        if not len(found.kept):
            return
        self._check_ids(int(found.ids.max()))
        self.spill.add(found)
        self.keys.add(keys[found.kept])
        if self.signatures and found.signatures is not None:
            self.signatures.add(found.signatures)
        self._findings.take(found, self.tokenizer, self._task.sources[reads[0].source])

    def _place(self, read: Read) -> str:
        source = self._task.sources[read.source]
        return f"{source.name(source.files[read.file])}:{read.line}"

    def _check_ids(self, highest: int) -> None:
        size = self._task.model.vocabulary
        if size is not None and highest >= size:
            raise Refusal(
                FailureCode.MODEL_UNSUPPORTED,
                f"the tokenizer makes token id {highest}, and the model has only {size} token ids; they do not belong together",
                param="spec.model.uri",
            )


def _hash(content: bytes, size: int, seed: bytes = b"") -> bytes:
    return hashlib.blake2b(content, digest_size=size, key=seed).digest()
