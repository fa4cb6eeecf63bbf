"""Prepared rows, their order, and the micro-batches made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from tunewright_trainer.train.attention import Segments
from tunewright_trainer.train.layout import Document, Place, lay_out

IGNORED: Final = -100  # a label that nothing is learned from, as everywhere in the field
AUTO_MICRO_TOKENS: Final = 4096  # tokens of an automatic micro-batch: enough to keep the hardware busy, few enough to fit

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Row:
    """One row: token ids and labels of one length, and the lengths of the documents that it is made of."""

    input_ids: Ints
    labels: Ints
    lengths: Sequence[int]

    @property
    def documents(self) -> "Iterator[Row]":
        """Each by itself, and without a label for its first token, which nothing predicts."""
        labels = _without_first(self.labels, self.lengths)
        end = 0
        for length in self.lengths:
            start, end = end, end + length
            yield Row(self.input_ids[start:end], labels[start:end], [length])

    @property
    def targets(self) -> int:
        """Tokens that are learned: labels that have a token of the same document before them."""
        return int((_without_first(self.labels, self.lengths) != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids)


@dataclass(frozen=True)
class SourceTarget(Row):
    """A row for an encoder-decoder: ``input_ids`` are what the encoder reads, ``labels`` what the decoder shall write, each of a length of its own.

    For a hypernetwork there is an ``instruction``, which is no part of ``input_ids``.
    """

    instruction: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def targets(self) -> int:
        """Tokens that are learned: the decoder's first one is predicted, too."""
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Tokens that encoder and decoder read."""
        return len(self.input_ids) + len(self.labels) + len(self.instruction)

    def shortened(self, longest: int) -> "SourceTarget":
        """With each part cut to so many tokens."""
        source = self.input_ids[:longest]
        return SourceTarget(source, self.labels[:longest], [len(source)], self.instruction[:longest])


@dataclass(frozen=True)
class Judged(Row):
    """A row of one answer that is marked as good or bad."""

    desirable: bool


class Rows:
    """The rows of one split, memory-mapped from its Arrow files: memory does not grow with their number. ``seq2seq``: they are for an encoder-decoder."""

    def __init__(self, folder: Path, *, seq2seq: bool = False) -> None:
        self._seq2seq = seq2seq
        tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in sorted(folder.glob("*.arrow"))]
        self._table = pa.concat_tables(tables) if tables else None

    def __len__(self) -> int:
        return 0 if self._table is None else int(self._table.num_rows)

    def __getitem__(self, index: int) -> Row:
        if self._table is None:
            raise IndexError(index)
        ids = self._numbers("input_ids", index)
        if self._seq2seq:
            told = [self._numbers("instruction", index)] if "instruction" in self._table.column_names else []
            return SourceTarget(ids, self._numbers("labels", index), [len(ids)], *told)
        lengths = self._numbers("lengths", index).tolist() if "lengths" in self._table.column_names else [len(ids)]
        if 0 in lengths:  # of a pair of a good and a bad answer only one is there
            return Judged(ids, self._numbers("labels", index), [len(ids)], desirable=lengths[0] > 0)
        return Row(ids, self._numbers("labels", index), lengths)

    def _numbers(self, column: str, index: int) -> Ints:
        assert self._table is not None
        return np.from_dlpack(self._table[column][index].values).astype(np.int64)  # pyarrow's own way imports pandas


class Order:
    """The order of samples, a pure function of the seed, the pass and the number of rows: position ``p`` is row ``order[p]``.

    Rows are sorted by a hash of (seed, pass, row), which no library's random numbers take part in: the order outlives their releases.
    """

    def __init__(self, rows: int, *, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._epoch = -1
        self._permutation: Ints = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._rows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self._rows, seed=self._seed, epoch=epoch)
        return int(self._permutation[index])


def permutation(rows: int, *, seed: int, epoch: int) -> Ints:
    """Every row once, in the order of pass ``epoch``."""
    start = splitmix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch)
    keys = splitmix(splitmix(start) + np.arange(rows, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def splitmix(state: Any) -> Any:
    """The mixing function of SplitMix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    with np.errstate(over="ignore"):
        z = state + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class MicroBatch:
    """Rows end to end as one sequence.

    ``input_ids`` and ``position_ids`` are [1, tokens], of which ``segments`` tells the documents, and ``places`` where each is; ``keep`` [targets] are the
    positions whose next token is learned, document by document (one that is shared may be there twice), ``targets`` [targets] those tokens;
    ``rows`` the rows themselves, and ``documents`` theirs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    keep: torch.Tensor
    targets: torch.Tensor
    rows: Sequence[Row] = ()
    documents: Sequence[Row] = ()
    places: Sequence[Place] = ()

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


@dataclass(frozen=True, kw_only=True)
class Padded(MicroBatch):
    """Sources and targets beside one another, each filled up to the longest.

    ``input_ids`` and ``position_ids`` are [rows, source tokens], ``segments`` the sources; ``labels`` are [rows, target tokens], `IGNORED` where they
    are filled up. ``keep`` counts the positions of the decoder [rows × target tokens] row by row; ``targets`` [targets] are the labels there.
    """

    labels: torch.Tensor
    instructions: torch.Tensor | None = None
    """[instructions, tokens], each once, filled up with -1; None where rows have none."""
    of_instruction: torch.Tensor | None = None
    """[rows]: which of them is the row's."""

    @property
    def tokens(self) -> int:
        return self.input_ids.numel() + self.labels.numel()

    @property
    def attention_mask(self) -> torch.Tensor:
        """[rows, source tokens]: 1 where a source has a token."""
        return (self.position_ids < torch.tensor(self.segments.lengths, device=self.position_ids.device)[:, None]).long()


def micro_batch(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    """Rows as one sequence without padding, on ``device``; those of an encoder-decoder beside one another (`Padded`)."""
    if isinstance(rows[0], SourceTarget):
        return _beside([row for row in rows if isinstance(row, SourceTarget)], device)
    documents = [document for row in rows for document in row.documents]
    learned = [np.flatnonzero(document.labels != IGNORED) for document in documents]
    layout = lay_out([Document(document.input_ids, _prompt(document, found)) for document, found in zip(documents, learned, strict=True)])
    keep = [place.of(found - 1) for place, found in zip(layout.places, learned, strict=True)]
    targets = [document.labels[found] for document, found in zip(documents, learned, strict=True)]
    return MicroBatch(
        input_ids=torch.from_numpy(layout.input_ids).to(device)[None],
        position_ids=torch.from_numpy(layout.positions).to(device)[None],
        segments=layout.segments,
        keep=torch.from_numpy(np.concatenate(keep)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        rows=rows,
        documents=documents,
        places=layout.places,
    )


def _prompt(document: Row, learned: Ints) -> int:
    """Tokens before the first that is learned; of a document without any all but the last."""
    return int(learned[0]) if len(learned) else document.tokens - 1


def _beside(rows: Sequence[SourceTarget], device: torch.device) -> Padded:
    sources, labels = filled([row.input_ids for row in rows], 0), filled([row.labels for row in rows], IGNORED)
    flat = labels.ravel()
    keep = np.flatnonzero(flat != IGNORED)
    told = {row.instruction.tobytes(): row.instruction for row in rows if len(row.instruction)}
    numbers = {key: number for number, key in enumerate(told)}
    which = [numbers[row.instruction.tobytes()] for row in rows] if told else None
    positions = np.broadcast_to(np.arange(sources.shape[1]), sources.shape)
    return Padded(
        input_ids=torch.from_numpy(sources).to(device),
        position_ids=torch.from_numpy(positions.copy()).to(device),
        segments=Segments([len(row.input_ids) for row in rows]),
        keep=torch.from_numpy(keep).to(device),
        targets=torch.from_numpy(flat[keep]).to(device),
        labels=torch.from_numpy(labels).to(device),
        instructions=None if which is None else torch.from_numpy(filled(list(told.values()), -1)).to(device),
        of_instruction=None if which is None else torch.tensor(which, device=device),
        rows=rows,
    )


def filled(parts: Sequence[Ints], value: int) -> Ints:
    """[parts, longest], the shorter parts filled up with ``value``."""
    whole = np.full((len(parts), max(map(len, parts))), value, dtype=np.int64)
    for number, part in enumerate(parts):
        whole[number, : len(part)] = part
    return whole


Parts = Sequence[Sequence[Sequence[Row]]]
"""The micro-batches of a batch, by the process that computes them."""


def rows_of(parts: Parts) -> list[Row]:
    """All rows of a batch."""
    return [row for own in parts for group in own for row in group]


def grouped(rows: Sequence[Row], micro_batch_size: int | str, *, halvings: int = 0) -> Iterator[Sequence[Row]]:
    """Rows in the groups that go through the model at once: so many, or for ``auto`` as many as keep within `AUTO_MICRO_TOKENS`.

    Each halving halves that; a group never has less than one row. Rows of an encoder-decoder are sorted by length, so that little of a group is padding, which counts.
    """
    most_rows = max(1, micro_batch_size >> halvings) if isinstance(micro_batch_size, int) else len(rows)
    most_tokens = AUTO_MICRO_TOKENS >> halvings if micro_batch_size == "auto" else None
    if rows and isinstance(rows[0], SourceTarget):
        rows = sorted(rows, key=lambda row: (len(row.input_ids), len(row.labels)))
    group: list[Row] = []
    for row in rows:
        if group and (len(group) == most_rows or (most_tokens is not None and _tokens_together([*group, row]) > most_tokens)):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _tokens_together(rows: Sequence[Row]) -> int:
    """What these rows cost as one micro-batch."""
    if isinstance(rows[0], SourceTarget):
        return len(rows) * (max(len(row.input_ids) for row in rows) + max(len(row.labels) for row in rows))
    return sum(len(row.input_ids) for row in rows)


def _without_first(labels: Ints, lengths: Sequence[int]) -> Ints:
    """Labels without that of each document's first token, which nothing predicts."""
    labels = labels.copy()
    starts = np.cumsum([0, *lengths[:-1]])
    labels[starts] = IGNORED
    return labels
