"""A few numbers about each example, on local disk: what is chosen of them is decided with memory that does not grow with their number."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from tunewright_crds.dataset import Dataset, Split
from tunewright_trainer.prepare.near import clusters
from tunewright_trainer.prepare.records import RecordFile, Records

SPLITS: Final = (Split.TRAIN, Split.VALIDATION, Split.TEST)
DROPPED: Final = len(SPLITS)
"""Numbers of what becomes of an example: one of `SPLITS`, or nothing."""

KEY: Final = np.dtype(
    [
        ("content", "<u8", (2,)),  # hash of the conversation
        ("group", "<u8"),  # the same for all that must not part; uniform, so that a share of the numbers is a share of the groups
        ("line", "<u8"),
        ("file", "<u4"),
        ("source", "<u2"),
        ("split", "u1"),
    ]
)
Keys = Records
Longs = np.ndarray[Any, np.dtype[np.int64]]
Fates = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK: Final = 250_000  # keys in memory at once
_BUCKET: Final = 1_000_000


class KeyFile(RecordFile):
    """A key for each example."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KEY, chunk=CHUNK)

    def places(self, numbers: Longs) -> Records:
        """Where examples are from, and their groups: the same for the exchanges of one conversation."""
        whole = np.memmap(self.path, KEY, mode="r", shape=(self.count,))
        return np.array(whole[["source", "file", "line", "group"]][numbers])

    def join(self, pairs: Longs) -> None:
        """Make one group of the groups of each pair of examples."""
        whole = np.memmap(self.path, KEY, mode="r+", shape=(self.count,))
        groups = np.array(whole["group"])
        order = np.argsort(groups, kind="stable")
        same = np.flatnonzero(groups[order[1:]] == groups[order[:-1]])
        first = clusters(np.concatenate([pairs, np.stack([order[same], order[same + 1]], axis=1)]), self.count)
        whole["group"] = groups[first]
        whole.flush()


def fates(
    keys: KeyFile, options: Dataset, tell: Callable[[str, Keys], None], *, near: Longs | None = None, exchanges: bool = False
) -> Fates:
    """What becomes of each example. `tell` hears of those that are dropped: the reason, and keys of some of them, in order.

    `near` [pairs, 2] are numbers of examples that are nearly the same: the later ones are dropped if the job says so, and else stay with the earlier ones.
    `exchanges`: the examples are exchanges of conversations, and none is dropped for being nearly the same as an earlier one of its own conversation.
    """
    found = np.empty(keys.count, dtype=np.uint8)
    if not keys.count:
        return found
    for start, chunk in keys.chunks():
        found[start : start + len(chunk)] = chunk["split"]
    if options.cleaning.deduplicate:
        _drop(keys, found, _duplicates(keys), lambda dropped: tell("duplicate", dropped))
    if near is not None and options.cleaning.near_duplicates.enabled:
        first = clusters(near, keys.count)
        later = np.flatnonzero((first != np.arange(keys.count)) & (found != DROPPED))
        if exchanges:
            later = later[keys.places(later) != keys.places(first[later])]
        _drop(keys, found, later, lambda dropped: tell("nearly the same as an earlier row", dropped))
    _drop(keys, found, _leaks(keys, found), lambda dropped: tell("same prompt as a held-out row", dropped))
    if near is not None and len(near):
        keys.join(near)
        _drop(keys, found, _leaks(keys, found), lambda dropped: tell("nearly the same as a held-out row", dropped))
    _split(keys, found, options)
    return found


def copies(keys: KeyFile, found: Fates, weights: Sequence[float], tell: Callable[[str, Keys], None]) -> Fates:
    """How often each example is written: if it is trained on, as often as the weight of its source says, and else once. `found` is what `fates` returned;
    those that are not drawn at all are dropped in it, and told.

    Who is drawn for a part of a weight depends on the conversation's hash alone, so re-ordering and splitting files changes nothing.
    """
    made = np.ones(keys.count, dtype=np.uint8)
    train = SPLITS.index(Split.TRAIN)
    for source, weight in enumerate(weights):
        if weight == 1:
            continue
        whole, part = divmod(weight, 1)
        limit = np.uint64(part * 2**64)
        for start, chunk in keys.chunks():
            mine = np.flatnonzero((chunk["source"] == source) & (found[start : start + len(chunk)] == train))
            made[start + mine] = int(whole) + (chunk["content"][mine, 1] < limit)
        absent = np.flatnonzero((made == 0) & (found == train))
        _drop(keys, found, absent, partial(tell, f"not drawn (weight {weight:g})"))
    return made


def _drop(keys: KeyFile, found: Fates, numbers: Longs, tell: Callable[[Keys], None]) -> None:
    if not len(numbers):
        return
    found[numbers] = DROPPED
    numbers = np.sort(numbers)
    for start, chunk in keys.chunks():
        first, last = np.searchsorted(numbers, [start, start + len(chunk)])
        if last > first:
            tell(chunk[numbers[first:last] - start])


def _duplicates(keys: KeyFile) -> Longs:
    """Numbers of the examples whose content came before: held-out rows are read first, so they stay."""
    buckets = max(1, -(-keys.count // _BUCKET))
    later = [np.empty(0, np.int64)]
    for bucket in range(buckets):
        contents, numbers = [], []
        for start, chunk in keys.chunks():
            mine = np.flatnonzero(chunk["content"][:, 0] % buckets == bucket)
            contents.append(chunk["content"][mine])
            numbers.append(mine + start)
        content, number = np.concatenate(contents), np.concatenate(numbers)
        order = np.lexsort((number, content[:, 1], content[:, 0]))
        same = (content[order[1:]] == content[order[:-1]]).all(axis=1)
        later.append(number[order[1:][same]])
    return np.concatenate(later)


def _leaks(keys: KeyFile, found: Fates) -> Longs:
    """Numbers of the train examples whose group is also in a held-out source."""
    train = SPLITS.index(Split.TRAIN)
    held = [np.empty(0, np.uint64)]
    for start, chunk in keys.chunks():
        fate = found[start : start + len(chunk)]
        held.append(np.unique(chunk["group"][(fate != train) & (fate != DROPPED)]))
    groups = np.unique(np.concatenate(held))
    leaks = [np.empty(0, np.int64)]
    if len(groups):
        for start, chunk in keys.chunks():
            fate = found[start : start + len(chunk)]
            leaks.append(np.flatnonzero((fate == train) & np.isin(chunk["group"], groups)) + start)
    return np.concatenate(leaks)


def _split(keys: KeyFile, found: Fates, options: Dataset) -> None:
    """Draw test and validation rows from those to train on. Which groups are drawn depends on their numbers alone, so re-ordering the sources changes
    nothing; a share above 0 gets at least one group where there are two."""
    has_validation = any(source.split is Split.VALIDATION for source in options.sources)
    shares = [(Split.TEST, options.test_fraction), (Split.VALIDATION, 0.0 if has_validation else options.validation_fraction)]
    rows = int((found == SPLITS.index(Split.TRAIN)).sum())
    for split, share in shares:
        left = int((found == SPLITS.index(Split.TRAIN)).sum())
        count = min(max(round(share * rows), 1), left - 1) if share > 0 and left > 1 else 0
        if count:
            limit = _smallest(keys, found, count)
            for start, chunk in keys.chunks():
                fate = found[start : start + len(chunk)]
                fate[(fate == SPLITS.index(Split.TRAIN)) & (chunk["group"] <= limit)] = SPLITS.index(split)


def _smallest(keys: KeyFile, found: Fates, count: int) -> np.uint64:
    """The group's number up to which `count` of the train examples lie; less where that would leave none.

    Two passes: the first finds by their upper 16 bits where the number lies, the second looks at those only.
    """
    train = SPLITS.index(Split.TRAIN)
    shift = np.uint64(48)
    histogram = np.zeros(2**16, np.int64)
    largest = np.uint64(0)
    for start, chunk in keys.chunks():
        groups = chunk["group"][found[start : start + len(chunk)] == train]
        histogram += np.bincount((groups >> shift).astype(np.int64), minlength=2**16)
        largest = max(largest, groups.max(initial=np.uint64(0)))
    below = np.cumsum(histogram)
    bin_ = int(np.searchsorted(below, count))
    members = [
        groups[(groups >> shift).astype(np.int64) == bin_]
        for start, chunk in keys.chunks()
        for groups in (chunk["group"][found[start : start + len(chunk)] == train],)
    ]
    ordered = np.sort(np.concatenate(members))
    limit = ordered[count - int(below[bin_ - 1] if bin_ else 0) - 1]
    return np.uint64(limit if limit < largest else max(largest, np.uint64(1)) - np.uint64(1))
