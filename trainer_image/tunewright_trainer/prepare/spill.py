"""Encoded examples on local disk between reading and packing: memory does not grow with their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tunewright_crds.job import Dataset, Split
from tunewright_trainer.prepare.encode import IGNORED, Example, Ints
from tunewright_trainer.prepare.pack import best_fit_decreasing

WINDOW_EXAMPLES: Final = 10_000  # packed together: large enough that rows fill to over 99 %, small enough for memory
WINDOW_TOKENS: Final = 16_000_000  # the same bound for long examples
MAX_BATCH_ROWS: Final = 1000
MAX_FILE_BYTES: Final = 512 * 2**20

_TOKENS: Final = pa.list_(pa.int32())
_SPILLED: Final = pa.schema([("input_ids", _TOKENS), ("labels", _TOKENS), ("key", pa.uint64()), ("split", pa.string())])
_WRITTEN: Final = pa.schema([("input_ids", _TOKENS), ("labels", _TOKENS)])
_PACKED: Final = _WRITTEN.append(pa.field("lengths", _TOKENS))

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Spill:
    """Writes examples as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = pa.ipc.new_stream(str(path), _SPILLED)

    def add(self, examples: Sequence[Example], keys: Sequence[int], split: Split) -> None:
        """Add examples; a key is what an example's place in the random split depends on, from 0 to 2^64 - 1."""
        columns = [
            pa.array([example.input_ids for example in examples], _TOKENS),
            pa.array([example.labels for example in examples], _TOKENS),
            pa.array(np.array(keys, dtype=np.uint64)),
            pa.array([split.value] * len(examples)),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_SPILLED))

    def close(self) -> "Spilled":
        self._writer.close()
        return Spilled(pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all())


@dataclass(frozen=True)
class Spilled:
    """Examples read back by their number, in the order in which they were added."""

    table: Any

    def members(self, options: Dataset) -> dict[Split, Indices]:
        """The examples of each split, in order. Shares of the train rows go by their keys, so re-ordering the sources changes nothing;
        a share above 0 gets at least one example where there are enough."""
        given = self.table["split"].to_numpy(zero_copy_only=False).astype(str)
        found = {split: np.flatnonzero(given == split.value) for split in Split}
        rows = found[Split.TRAIN]
        by_key = rows[np.argsort(self.table["key"].to_numpy()[rows], kind="stable")]
        has_validation = any(source.split is Split.VALIDATION for source in options.sources)
        for split, share in (
            (Split.TEST, options.test_fraction),
            (Split.VALIDATION, 0.0 if has_validation else options.validation_fraction),
        ):
            count = min(max(round(share * len(rows)), 1), len(by_key) - 1) if share > 0 and len(by_key) > 1 else 0
            found[split] = np.sort(np.concatenate([found[split], by_key[:count]]))
            by_key = by_key[count:]
        found[Split.TRAIN] = np.sort(by_key)
        return found

    def windows(self, indices: Indices) -> Iterator["Window"]:
        """The examples of a split in pieces that fit into memory."""
        start = 0
        while start < len(indices):
            piece = self.table.take(pa.array(indices[start : start + WINDOW_EXAMPLES])).combine_chunks()
            window = Window.of(piece)
            count = max(1, int(np.searchsorted(window.offsets, WINDOW_TOKENS, side="right")) - 1)
            yield window if count >= len(window.lengths) else Window.of(piece.slice(0, count).combine_chunks())
            start += min(count, len(window.lengths))


@dataclass(frozen=True)
class Window:
    """Examples end to end: ids and labels [tokens], and where each begins [examples + 1]."""

    ids: Ints
    labels: Ints
    offsets: Indices

    @classmethod
    def of(cls, table: Any) -> "Window":
        lengths = np.asarray(pa.compute.list_value_length(table["input_ids"]).to_numpy(), dtype=np.int64)
        flat = [table[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels")]
        return cls(flat[0], flat[1], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @property
    def lengths(self) -> Indices:
        return np.diff(self.offsets)


@dataclass
class Written:
    """What a split came to."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    trainable_tokens: int = 0


def write_split(spilled: Spilled, indices: Indices, folder: Path, options: Dataset) -> Written:
    """Write a split's rows as Arrow files that `datasets.Dataset.from_file` opens; nothing where it has no examples."""
    total = Written()
    files = _Files(folder, _PACKED if options.packing else _WRITTEN)
    for window in spilled.windows(indices):
        lengths = window.lengths
        bins = best_fit_decreasing(lengths.tolist(), options.max_length) if options.packing else [[at] for at in range(len(lengths))]
        files.write(_table(window, bins, packed=options.packing))
        total.examples += len(lengths)
        total.rows += len(bins)
        total.tokens += len(window.ids)
        total.trainable_tokens += int((window.labels != IGNORED).sum())
    files.close()
    return total


def _table(window: Window, bins: Sequence[Sequence[int]], *, packed: bool) -> Any:
    """Rows of whole examples. Columns input_ids and labels [tokens of the row], and if packed lengths [examples of the row]."""
    order = [at for examples in bins for at in examples]
    starts, lengths = window.offsets, window.lengths
    take = np.concatenate([np.arange(starts[at], starts[at + 1]) for at in order])
    per_bin = [int(sum(lengths[at] for at in examples)) for examples in bins]
    offsets = pa.array(np.concatenate([[0], np.cumsum(per_bin)]).astype(np.int32))
    columns = [pa.ListArray.from_arrays(offsets, pa.array(flat[take])) for flat in (window.ids, window.labels)]
    if not packed:
        return pa.table(columns, schema=_WRITTEN)
    counts = pa.array(np.concatenate([[0], np.cumsum([len(examples) for examples in bins])]).astype(np.int32))
    return pa.table([*columns, pa.ListArray.from_arrays(counts, pa.array(lengths[order].astype(np.int32)))], schema=_PACKED)


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
