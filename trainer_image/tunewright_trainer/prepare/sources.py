"""The job's sources: what they are, and their rows with every unusable one told."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from tunewright_crds.dataset import Source, Split
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer.prepare import licences
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.convert import AnyShape, Converter
from tunewright_trainer.prepare.rows import BadFile, Numbered, Problem, is_readable, read_rows
from tunewright_trainer.storage import ObjectInfo, Place, arriving, open_source

MAX_ERRORS_TOLD: Final = 100
# Held-out rows first: of two equal rows the one that was read first stays, so nothing is trained on that is tested with.
_READ_ORDER: Final = (Split.TEST, Split.VALIDATION, Split.TRAIN)


@dataclass(frozen=True, slots=True)
class Read:
    """What was found at a place: number of the source, number of the file in it, line of that."""

    source: int
    file: int
    line: int
    found: Conversation | Drop


@dataclass
class OpenSource:
    """One source with its files and what was found in them."""

    index: int
    spec: Source
    place: Place
    files: list[ObjectInfo]
    skipped: list[str]
    license: str
    converter: Converter
    param: str
    rows: int = 0
    bytes_read: float = 0
    invalid: int = 0
    errors: list[str] = field(default_factory=list)

    def name(self, info: ObjectInfo) -> str:
        """A file's name as messages tell it: below the source's folder, or its own."""
        top = self.place.key.rstrip("/")
        return info.key.rpartition("/")[2] if info.key == top else info.key.removeprefix(f"{top}/")

    def identity(self) -> dict[str, Any]:
        """What changes when the source's data or its reading changes."""
        files = [[self.name(info), info.size, self.place.store.fingerprint(info)] for info in self.files]
        commit = {"commit": self.place.store.commit} if self.place.store.commit else {}
        return {"files": files, **commit, "foundLicense": self.license, **self.spec.model_dump(mode="json", by_alias=True)}

    def _tell(self, name: str, line: int, problem: Problem) -> None:
        self.invalid += 1
        if len(self.errors) < MAX_ERRORS_TOLD:
            self.errors.append(": ".join(part for part in (f"{name}:{line}", problem.field, problem.what) if part))

    def read(self, files: Sequence[int], scratch: Path) -> Iterator[Read]:
        """The usable rows of files, by their numbers. Unusable ones are counted and told; a file that cannot be read to its end is refused.

        `bytes_read` says how far that is.
        """
        with closing(arriving(self.place, [self.files[number] for number in files], scratch)) as paths:
            for number, path in zip(files, paths, strict=True):
                name, hear = self.name(self.files[number]), self._hearing(self.files[number].size)
                try:
                    for line, found in self.converter.conversations(self._counted(read_rows(path, name, hear))):
                        if isinstance(found, Problem):
                            self._tell(name, line, found)
                        else:
                            yield Read(self.index, number, line, found)
                except BadFile as error:
                    where = f"{name}:{error.line}" if error.line else name
                    raise Refusal(FailureCode.DATA_INVALID, f"{where}: {error.what}", param=self.param) from error
                hear(1)
                if self.rows == self.spec.max_examples:
                    return

    def _hearing(self, size: int) -> Callable[[float], None]:
        before = self.bytes_read

        def hear(share: float) -> None:
            self.bytes_read = before + share * size

        return hear

    def again(self) -> "OpenSource":
        """The same source, of which nothing was read yet."""
        return replace(self, rows=0, bytes_read=0, invalid=0, errors=[])

    def read_all(self, scratch: Path) -> Iterator[Conversation]:
        """The conversations, of which none may be lost: raises `Refusal` for an unusable row."""
        for read in self.read(range(len(self.files)), scratch):
            if isinstance(read.found, Conversation):
                yield read.found
        if self.invalid or not self.rows:
            told = f"{self.errors[0]}; all rows to compare with must be readable" if self.errors else f"{self.place.uri} holds no rows"
            raise Refusal(FailureCode.DATA_INVALID if self.errors else FailureCode.DATA_EMPTY, told, param=self.param)

    def _counted(self, rows: Iterator[Numbered]) -> Iterator[Numbered]:
        for numbered in rows:
            if self.rows == self.spec.max_examples:
                return
            self.rows += 1
            yield numbered


class Piece(NamedTuple):
    """Files of one source, by number, in order."""

    source: int
    files: tuple[int, ...]


def shares(sources: Sequence[OpenSource], count: int) -> list[list[Piece]]:
    """All files in the order of reading, in so many shares of about as many bytes; a share may be empty.

    A file is read by one pod, and so is a source of which only the first rows are taken.
    """
    units = [unit for source in in_reading_order(sources) for unit in _units(source)]
    sizes = np.array([1 + sum(sources[unit.source].files[file].size for file in unit.files) for unit in units])
    middles = np.cumsum(sizes) - sizes / 2
    share_of = (middles * count / sizes.sum()).astype(int).tolist()
    found: list[list[Piece]] = [[] for _ in range(count)]
    for (share, source), members in groupby(zip(share_of, units, strict=True), key=lambda member: (member[0], member[1].source)):
        found[share].append(Piece(source, tuple(file for _, unit in members for file in unit.files)))
    return found


def _units(source: OpenSource) -> list[Piece]:
    files = range(len(source.files))
    return [Piece(source.index, tuple(files))] if source.spec.max_examples is not None else [Piece(source.index, (file,)) for file in files]


def open_sources(config: PodConfig) -> list[OpenSource]:
    """Every source of the job, with its data files; raises `Refusal` where one has none."""
    found = []
    for index, spec in enumerate(config.spec.dataset.sources):
        field = f"spec.dataset.sources[{index}]"
        found.append(
            _open(
                config,
                spec,
                Converter(
                    spec, param=f"{field}.template", examples=config.spec.method.examples, answered=config.spec.method.compares_answers
                ),
                index=index,
                param=f"{field}.uri",
            )
        )
        uri, forbidden = found[-1].place.uri, config.spec.dataset.forbidden_licenses
        licences.check(found[-1].license, forbidden, uri=uri, param=f"{field}.license")
    return found


def open_held_out(config: PodConfig) -> list[OpenSource]:
    """What rows to train on are compared with besides the sources, of whatever shape and licence; raises as `open_sources`."""
    found = []
    for index, uri in enumerate(config.spec.dataset.cleaning.decontaminate.against):
        spec = Source.model_construct(uri=uri, split=Split.TEST)  # the address was checked as that of a source is
        param = f"spec.dataset.cleaning.decontaminate.against[{index}]"
        found.append(_open(config, spec, AnyShape(spec, param=param), index=index, param=param))
    return found


def in_reading_order(sources: Sequence[OpenSource]) -> list[OpenSource]:
    """Test rows first, then validation rows, then those to train on."""
    return sorted(sources, key=lambda source: _READ_ORDER.index(source.spec.split))


def _open(config: PodConfig, spec: Source, converter: Converter, *, index: int, param: str) -> OpenSource:
    place = open_source(config, spec.uri, param=param)
    found = place.files()
    single = len(found) == 1 and found[0].key == place.key.rstrip("/")
    files = [info for info in found if single or is_readable(info.key)]
    card = None if single else place.find(licences.CARD)
    license = spec.license or licences.of_card(place, card)
    source = OpenSource(index, spec, place, files, [], license, converter, param)
    read = {info.key for info in files}
    source.skipped = [source.name(info) for info in found if info.key not in read]
    if not files:
        raise Refusal(
            FailureCode.DATA_NOT_FOUND,
            f"{place.uri} holds no .jsonl, .json, .csv, .tsv or .parquet file (nor one with .gz or .zst)",
            param=param,
        )
    return source
