"""Where the documents of a micro-batch lie in its one sequence.

Documents that begin alike, as the two answers of a pair, the many to one prompt, or conversations behind one system message, share that beginning: it is
there once, and each goes on from it. Nothing that is learned is shared, so a loss and its gradients are those of the documents one after the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tunewright_trainer.train.attention import Segments

# Attention over another segment too has a mask, and computes what a causal one leaves out: where ends are much longer than the beginning that is the
# greater part (benchmarks/sharing.py).
LEAST_SHARED: Final = 16  # tokens
LEAST_SHARE: Final = 1 / 3  # of each document

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Document:
    """Token ids [tokens], of which the first ``prompt`` are read and not learned. One token at least is not."""

    ids: Ints
    prompt: int


@dataclass(frozen=True)
class Place:
    """Of a document the first ``shared`` tokens begin at ``trunk`` in the sequence, the others at ``start``."""

    trunk: int
    shared: int
    start: int

    def of(self, tokens: Ints | int) -> Ints:
        """Where in the sequence tokens of the document are, by their numbers in it."""
        return np.where(tokens < self.shared, self.trunk + tokens, self.start - self.shared + tokens)


@dataclass(frozen=True)
class Layout:
    """``input_ids`` and ``positions`` (of each token in its document) are [tokens of the sequence]; ``places`` are the documents'."""

    input_ids: Ints
    positions: Ints
    segments: Segments
    places: Sequence[Place]


def lay_out(documents: Sequence[Document]) -> Layout:
    """The documents end to end, beginnings that neighbours have in common once."""
    ids: list[Ints] = []
    positions: list[Ints] = []
    lengths: list[int] = []
    continues: list[int] = []
    places: list[Place] = []
    end = 0

    def add(part: Ints, *, first: int, trunk: int = -1) -> int:
        nonlocal end
        ids.append(part)
        positions.append(np.arange(first, first + len(part), dtype=np.int64))
        lengths.append(len(part))
        continues.append(trunk)
        end += len(part)
        return end - len(part)

    for shared, family in _families(documents):
        number = len(lengths)
        trunk = add(family[0].ids[:shared], first=0) if shared else end
        places += [Place(trunk, shared, add(one.ids[shared:], first=shared, trunk=number if shared else -1)) for one in family]
    return Layout(np.concatenate(ids), np.concatenate(positions), Segments(lengths, continues), places)


def _families(documents: Sequence[Document]) -> Iterator[tuple[int, Sequence[Document]]]:
    """Neighbours, and how many tokens all of them begin with; another joins where more is saved with it than without."""
    family, shared = [documents[0]], documents[0].prompt
    for document in documents[1:]:
        common = _common(family[0].ids[:shared], document)
        least = max(LEAST_SHARED, LEAST_SHARE * max(len(one.ids) for one in (*family, document)))
        if common >= least and common * len(family) >= shared * (len(family) - 1):
            family.append(document)
            shared = common
        else:
            yield shared if len(family) > 1 else 0, family
            family, shared = [document], document.prompt
    yield shared if len(family) > 1 else 0, family


def _common(beginning: Ints, document: Document) -> int:
    """How many tokens of the beginning the document's prompt begins with, too."""
    most = min(len(beginning), document.prompt)
    other = np.flatnonzero(beginning[:most] != document.ids[:most])
    return int(other[0]) if len(other) else most
