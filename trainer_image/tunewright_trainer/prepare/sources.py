"""The job's sources: what they are, and their rows with every unusable one told."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import Source, Split
from tunewright_crds.pod import PodConfig
from tunewright_trainer.prepare.convert import Conversation, RowError, conversation
from tunewright_trainer.prepare.rows import BadFile, Problem, is_readable, read_rows
from tunewright_trainer.storage import ObjectInfo, Place, open_source

MAX_ERRORS_TOLD: Final = 100
# Held-out rows first: of two equal rows the one that was read first stays, so nothing is trained on that is tested with.
_READ_ORDER: Final = (Split.TEST, Split.VALIDATION, Split.TRAIN)


@dataclass
class OpenSource:
    """One source with its files and what was found in them."""

    index: int
    spec: Source
    place: Place
    files: list[ObjectInfo]
    skipped: list[str]
    rows: int = 0
    invalid: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def param(self) -> str:
        return f"spec.dataset.sources[{self.index}].uri"

    def name(self, info: ObjectInfo) -> str:
        """A file's name as messages tell it: below the source's folder, or its own."""
        top = self.place.key.rstrip("/")
        return info.key.rpartition("/")[2] if info.key == top else info.key.removeprefix(f"{top}/")

    def identity(self) -> dict[str, Any]:
        """What changes when the source's data or its reading changes."""
        files = [[self.name(info), info.size, self.place.store.fingerprint(info)] for info in self.files]
        return {"files": files, **self.spec.model_dump(mode="json", by_alias=True)}

    def _tell(self, name: str, line: int, problem: Problem) -> None:
        self.invalid += 1
        if len(self.errors) < MAX_ERRORS_TOLD:
            self.errors.append(": ".join(part for part in (f"{name}:{line}", problem.field, problem.what) if part))

    def conversations(self, scratch: Path) -> Iterator[Conversation]:
        """The usable rows. Unusable ones are counted and told; a file that cannot be read to its end is refused."""
        for info in self.files:
            name = self.name(info)
            with _on_this_machine(self.place, info, scratch) as path:
                try:
                    for line, row in read_rows(path, name):
                        if self.spec.max_examples is not None and self.rows >= self.spec.max_examples:
                            return
                        self.rows += 1
                        try:
                            if isinstance(row, Problem):
                                raise RowError(row.field, row.what)
                            yield conversation(row, format=self.spec.format, columns=self.spec.columns)
                        except RowError as error:
                            self._tell(name, line, Problem(error.field, error.what))
                except BadFile as error:
                    where = f"{name}:{error.line}" if error.line else name
                    raise Refusal(FailureCode.DATA_INVALID, f"{where}: {error.what}", param=self.param) from error


@contextmanager
def _on_this_machine(place: Place, info: ObjectInfo, scratch: Path) -> Iterator[Path]:
    """The path of an object's content, which is downloaded and removed again where it does not lie here."""
    if place.local is not None:
        yield place.local.parent / info.key
        return
    copy = scratch / hashlib.sha256(info.key.encode()).hexdigest()[:16]
    try:
        place.store.download(info.key, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def open_sources(config: PodConfig) -> list[OpenSource]:
    """Every source of the job, with its data files; raises `Refusal` where one has none."""
    return [_open(config, index) for index in range(len(config.spec.dataset.sources))]


def in_reading_order(sources: list[OpenSource]) -> list[OpenSource]:
    """Test rows first, then validation rows, then those to train on."""
    return sorted(sources, key=lambda source: _READ_ORDER.index(source.spec.split))


def _open(config: PodConfig, index: int) -> OpenSource:
    spec = config.spec.dataset.sources[index]
    place = open_source(config, index)
    found = place.files()
    single = len(found) == 1 and found[0].key == place.key.rstrip("/")
    files = [info for info in found if single or is_readable(info.key)]
    source = OpenSource(index, spec, place, files, skipped=[])
    source.skipped = [source.name(info) for info in found if info not in files]
    if not files:
        raise Refusal(
            FailureCode.DATA_NOT_FOUND,
            f"{place.uri} holds no .jsonl, .json, .csv or .parquet file (nor one with .gz or .zst)",
            param=source.param,
        )
    return source
