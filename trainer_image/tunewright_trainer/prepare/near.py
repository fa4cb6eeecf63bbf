"""Near duplicates: conversations that say nearly the same, by MinHash (Broder 1997) and locality-sensitive hashing.

Two texts are as near as the share of their runs of three words that both have (Jaccard). datasketch makes the signatures; what is done with them lies on
disk here, since its index would hold every example in memory.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tunewright_trainer.prepare.records import RecordFile

PERMUTATIONS: Final = 128  # the estimated nearness of two texts is off by some 4 % (standard deviation)
SHINGLE: Final = 3
_SEED: Final = 1
_CHUNK: Final = 100_000  # signatures in memory at once
_WORD: Final = re.compile(r"\w+")

Signatures = np.ndarray[Any, np.dtype[np.uint32]]
Longs = np.ndarray[Any, np.dtype[np.int64]]


def signatures(texts: Sequence[str]) -> Signatures:
    """[texts, PERMUTATIONS]: equal at about as many places as two texts are near."""
    from datasketch import MinHash

    made = MinHash.generator((_shingles(text) for text in texts), num_perm=PERMUTATIONS, seed=_SEED, hashfunc=zlib.crc32)
    return np.stack([one.hashvalues for one in made]).astype(np.uint32)


def _shingles(text: str) -> list[bytes]:
    words = _WORD.findall(text.lower())
    return [" ".join(words[at : at + SHINGLE]).encode() for at in range(max(1, len(words) - SHINGLE + 1))]


class SignatureFile(RecordFile):
    """A signature for each example."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, np.dtype((np.uint32, (PERMUTATIONS,))), chunk=_CHUNK)

    def pairs(self, threshold: float) -> Longs:
        """[pairs, 2]: numbers of examples, the smaller first, that are at least so near to one another. Of many that are all alike not every pair is told,
        but enough to join them."""
        from datasketch import MinHashLSH

        lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)  # for its choice of bands
        found = [np.empty((0, 2), np.int64)]
        for band in range(lsh.b):
            alike = _alike(np.concatenate([_band(some, band, lsh.r) for _, some in self.chunks()]))
            if len(alike):
                found.append(alike)
        candidates = np.unique(np.concatenate(found), axis=0)
        return candidates[self._nearness(candidates) >= threshold]

    def _nearness(self, pairs: Longs) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[pairs]: share of equal places."""
        if not len(pairs):
            return np.empty(0)
        whole = np.memmap(self.path, np.uint32, mode="r", shape=(self.count, PERMUTATIONS))
        parts = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
        return np.concatenate([(whole[part[:, 0]] == whole[part[:, 1]]).mean(axis=1) for part in parts])


def _band(some: Signatures, band: int, rows: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """[examples]: one number for a band of the signatures, equal where the band is (and else hardly ever: what is told alike is looked at again)."""
    number = np.full(len(some), band, dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        number = (number ^ some[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        number ^= number >> np.uint64(29)
    return number


def _alike(numbers: np.ndarray[Any, np.dtype[np.uint64]]) -> Longs:
    """[pairs, 2]: of each run of equal numbers the first with every other, and each with the next."""
    order = np.argsort(numbers, kind="stable")
    same = numbers[order[1:]] == numbers[order[:-1]]
    if not same.any():
        return np.empty((0, 2), np.int64)
    begins = np.flatnonzero(np.concatenate([[True], ~same]))
    first = order[begins[np.cumsum(np.concatenate([[True], ~same])) - 1]]
    later = np.flatnonzero(same) + 1
    return np.concatenate([np.stack([first[later], order[later]], axis=1), np.stack([order[later - 1], order[later]], axis=1)])


def clusters(pairs: Longs, count: int) -> Longs:
    """[count]: for each example the smallest number among those that it is joined to."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)
    return np.asarray(first[labels], dtype=np.int64)
