"""Prepared rows, their order, and the micro-batches made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

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
    def targets(self) -> int:
        """Tokens that are learned: labels that have a token of the same document before them."""
        return int((_without_first(self.labels, self.lengths) != IGNORED).sum())


class Rows:
    """The rows of one split, memory-mapped from its Arrow files: memory does not grow with their number."""

    def __init__(self, folder: Path) -> None:
        tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in sorted(folder.glob("*.arrow"))]
        self._table = pa.concat_tables(tables) if tables else None

    def __len__(self) -> int:
        return 0 if self._table is None else int(self._table.num_rows)

    def __getitem__(self, index: int) -> Row:
        if self._table is None:
            raise IndexError(index)
        ids = self._numbers("input_ids", index)
        lengths = self._numbers("lengths", index).tolist() if "lengths" in self._table.column_names else [len(ids)]
        return Row(ids, self._numbers("labels", index), lengths)

    def _numbers(self, column: str, index: int) -> Ints:
        assert self._table is not None
        numbers: Ints = self._table[column][index].values.to_numpy(zero_copy_only=False).astype(np.int64)
        return numbers


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

    ``input_ids`` and ``position_ids`` are [1, tokens]; ``lengths`` the documents'; ``keep`` [targets] the positions whose next token is learned,
    ``targets`` [targets] those tokens; ``rows`` the rows themselves.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: Sequence[int]
    keep: torch.Tensor
    targets: torch.Tensor
    rows: Sequence[Row] = ()

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def micro_batch(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    """Rows as one sequence without padding, on ``device``."""
    lengths = [length for row in rows for length in row.lengths]
    labels = _without_first(np.concatenate([row.labels for row in rows]), lengths)
    learned = np.flatnonzero(labels != IGNORED)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([row.input_ids for row in rows])).to(device)[None],
        position_ids=torch.from_numpy(positions).to(device)[None],
        lengths=lengths,
        keep=torch.from_numpy(learned - 1).to(device),
        targets=torch.from_numpy(labels[learned]).to(device),
        rows=rows,
    )


def grouped(rows: Sequence[Row], micro_batch_size: int | str, *, halvings: int = 0) -> Iterator[Sequence[Row]]:
    """Rows in the groups that go through the model at once: so many, or for ``auto`` as many as keep within `AUTO_MICRO_TOKENS`.

    Each halving halves that; a group never has less than one row.
    """
    most_rows = max(1, micro_batch_size >> halvings) if isinstance(micro_batch_size, int) else len(rows)
    most_tokens = AUTO_MICRO_TOKENS >> halvings if micro_batch_size == "auto" else sum(len(row.input_ids) for row in rows)
    group: list[Row] = []
    tokens = 0
    for row in rows:
        if group and (len(group) == most_rows or tokens + len(row.input_ids) > most_tokens):
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += len(row.input_ids)
    if group:
        yield group


def _without_first(labels: Ints, lengths: Sequence[int]) -> Ints:
    """Labels without that of each document's first token, which nothing predicts."""
    labels = labels.copy()
    starts = np.cumsum([0, *lengths[:-1]])
    labels[starts] = IGNORED
    return labels
