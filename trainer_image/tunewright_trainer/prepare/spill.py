"""Encoded examples on local disk between reading and packing: memory does not grow with their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tunewright_crds.dataset import Dataset
from tunewright_trainer.prepare.encode import IGNORED, INSTRUCTION, Encoded, Ints, Longs
from tunewright_trainer.prepare.keys import SPLITS, Fates
from tunewright_trainer.prepare.pack import best_fit_decreasing

WINDOW_EXAMPLES: Final = 10_000  # packed together: large enough that rows fill to over 99 %, small enough for memory
WINDOW_TOKENS: Final = 16_000_000  # the same bound for long examples
MAX_BATCH_ROWS: Final = 1000
MAX_FILE_BYTES: Final = 512 * 2**20

_TOKENS: Final = pa.list_(pa.int32())
_WRITTEN: Final = pa.schema([("input_ids", _TOKENS), ("labels", _TOKENS)])
_PACKED: Final = _WRITTEN.append(pa.field("lengths", _TOKENS))
_INSTRUCTED: Final = _WRITTEN.append(pa.field("instruction", _TOKENS))
_PAIRS: Final = _WRITTEN.append(pa.field("chosen", pa.int32()))


class Spill:
    """Writes examples as they come; `pairs` says that each is a pair of two documents."""

    def __init__(self, path: Path, *, pairs: bool) -> None:
        self._schema = _PAIRS if pairs else _WRITTEN
        self._writer = pa.ipc.new_stream(str(path), self._schema)

    def add(self, encoded: Encoded) -> None:
        columns = _lists(encoded.lengths, encoded.ids, encoded.labels)
        if self._schema is _PAIRS:
            columns.append(pa.array(encoded.chosen.astype(np.int32)))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def pieces(paths: Sequence[Path], fates: Fates) -> Iterator[tuple[int, "Examples"]]:
    """The examples of files that a `Spill` wrote, for each of `SPLITS` by its number, in order and piece by piece."""
    start = 0
    for path in paths:
        # Read, not mapped: pages of a mapped file count as memory of this process.
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                fate = fates[start : start + batch.num_rows]
                start += batch.num_rows
                for split in range(len(SPLITS)):
                    mask = fate == split
                    if mask.any():
                        yield split, Examples.of(batch if mask.all() else batch.filter(pa.array(mask)))


@dataclass(frozen=True)
class Examples:
    """Examples end to end: ids and labels [tokens], lengths [examples]; of pairs also how long the first document of each is [examples], else empty."""

    ids: Ints
    labels: Ints
    lengths: Longs
    chosen: Longs

    @classmethod
    def of(cls, batch: Any) -> "Examples":
        lengths = np.asarray(pa.compute.list_value_length(batch["input_ids"]), dtype=np.int64)
        chosen = np.asarray(batch["chosen"] if "chosen" in batch.schema.names else [], dtype=np.int64)
        return cls(batch["input_ids"].flatten().to_numpy(), batch["labels"].flatten().to_numpy(), lengths, chosen)

    def parted(self, count: int) -> tuple["Examples", "Examples"]:
        """The first so many, and the rest."""
        cut = int(self.lengths[:count].sum())
        return Examples(self.ids[:cut], self.labels[:cut], self.lengths[:count], self.chosen[:count]), Examples(
            self.ids[cut:], self.labels[cut:], self.lengths[count:], self.chosen[count:]
        )

    @classmethod
    def joined(cls, pieces: Sequence["Examples"]) -> "Examples":
        return cls(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("ids", "labels", "lengths", "chosen")))


@dataclass
class Written:
    """What a split came to."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    longest_row: int = 0  # tokens
    most_learned: int = 0  # tokens of a row


class SplitWriter:
    """Writes a split's rows as Arrow files that `datasets.Dataset.from_file` opens; nothing where it has no examples.

    Pairs are a row each, and so are sources with their targets (`seq2seq`).
    """

    def __init__(self, folder: Path, options: Dataset, *, pairs: bool, seq2seq: bool = False, instructed: bool = False) -> None:
        self.written = Written()
        self._pairs = pairs
        self._seq2seq = seq2seq
        self._instructed = instructed
        self._packing = options.packing and not pairs and not seq2seq
        self._capacity = options.max_length
        self._files = _Files(folder, _PACKED if self._packing or pairs else _INSTRUCTED if instructed else _WRITTEN)
        self._waiting: list[Examples] = []
        self._examples = self._tokens = 0

    def add(self, examples: Examples) -> None:
        """Take examples; they are packed with those that come near them, whatever pieces they come in."""
        while len(examples.lengths):
            tokens = self._tokens + np.cumsum(examples.lengths)
            count = min(WINDOW_EXAMPLES - self._examples, int(np.searchsorted(tokens, WINDOW_TOKENS)) + 1, len(tokens))
            taken, examples = examples.parted(count)
            self._waiting.append(taken)
            self._examples += count
            self._tokens += len(taken.ids)
            if self._examples >= WINDOW_EXAMPLES or self._tokens >= WINDOW_TOKENS:
                self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._files.close()

    def _flush(self) -> None:
        window = Examples.joined(self._waiting)
        lengths = window.lengths
        bins = best_fit_decreasing(lengths.tolist(), self._capacity) if self._packing else None
        if bins is not None:
            table = _packed(window, bins)
        else:
            table = _paired(window) if self._pairs else _sourced(window, instructed=self._instructed) if self._seq2seq else _plain(window)
        self._files.write(table)
        self._measure(window, bins)
        self.written.examples += len(lengths)
        self.written.rows += len(lengths) if bins is None else len(bins)
        self.written.tokens += len(window.ids)
        self.written.trainable_tokens += int((window.labels >= 0).sum())
        self._waiting, self._examples, self._tokens = [], 0, 0

    def _measure(self, window: Examples, bins: Sequence[Sequence[int]] | None) -> None:
        """Note the longest row, and the most that is learned of one: what memory is planned with."""
        learned = np.add.reduceat(window.labels >= 0, np.cumsum([0, *window.lengths[:-1]]), dtype=np.int64)
        lengths = window.lengths
        if bins is not None:
            lengths, learned = (np.array([column[row].sum() for row in bins]) for column in (lengths, learned))
        self.written.longest_row = max(self.written.longest_row, int(lengths.max()))
        self.written.most_learned = max(self.written.most_learned, int(learned.max()))


def _plain(window: Examples) -> Any:
    """A row for each example, with columns input_ids and labels [tokens of the example]."""
    return pa.table(_lists(window.lengths, window.ids, window.labels), schema=_WRITTEN)


def _paired(window: Examples) -> Any:
    """A row for each pair, with columns input_ids and labels [tokens of both documents], and lengths [2]: the chosen one's, the rejected one's."""
    both = np.stack([window.chosen, window.lengths - window.chosen], axis=1).astype(np.int32)
    twice = np.full(len(both), 2, dtype=np.int64)
    return pa.table([*_lists(window.lengths, window.ids, window.labels), *_lists(twice, both.ravel())], schema=_PACKED)


def _sourced(window: Examples, *, instructed: bool) -> Any:
    """A row for each example of an encoder-decoder, with columns input_ids [tokens of the source] and labels [tokens of the target], and where instructions
    stand apart also instruction [its tokens]."""
    starts = np.concatenate([[0], np.cumsum(window.lengths)[:-1]])

    def part(mask: Any, values: Ints) -> list[Any]:
        return _lists(np.add.reduceat(mask, starts, dtype=np.int64), values[mask])

    columns = part(window.labels == IGNORED, window.ids) + part(window.labels >= 0, window.labels)
    if instructed:
        columns += part(window.labels == INSTRUCTION, window.ids)
    return pa.table(columns, schema=_INSTRUCTED if instructed else _WRITTEN)


def _packed(window: Examples, bins: Sequence[Sequence[int]]) -> Any:
    """Rows of whole examples. Columns input_ids and labels [tokens of the row], and lengths [examples of the row]."""
    lengths = window.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    order = np.array([at for examples in bins for at in examples], dtype=np.int64)
    counts = np.array([len(examples) for examples in bins], dtype=np.int64)
    # Where each token comes from: its place in the new order, moved by how far its example has moved.
    moved = np.repeat(offsets[order] - np.concatenate([[0], np.cumsum(lengths[order])[:-1]]), lengths[order])
    take = np.arange(len(window.ids)) + moved
    per_row = np.add.reduceat(lengths[order], np.concatenate([[0], np.cumsum(counts)[:-1]]))
    columns = _lists(per_row, window.ids[take], window.labels[take])
    return pa.table([*columns, *_lists(counts, lengths[order].astype(np.int32))], schema=_PACKED)


def _lists(lengths: Longs, *flat: Ints) -> list[Any]:
    """Columns of lists of these lengths from their values end to end."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in flat]


class _Files:
    """Arrow streams of a bounded size, numbered in order."""

    def __init__(self, folder: Path, schema: Any) -> None:
        self._folder = folder
        self._schema = schema
        self._writer: Any = None
        self._number = 0
        self._bytes = 0

    def write(self, table: Any) -> None:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = pa.ipc.new_stream(str(self._folder / f"data-{self._number:05d}.arrow"), self._schema)
        self._writer.write_table(table, max_chunksize=MAX_BATCH_ROWS)
        self._bytes += table.nbytes
        if self._bytes >= MAX_FILE_BYTES:
            self.close()
            self._number, self._bytes = self._number + 1, 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
