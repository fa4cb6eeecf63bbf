"""The test rows as questions: what is read, what should be answered, and examples shown before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunewright_crds.method import Examples
from tunewright_trainer.train.data import IGNORED, Ints, Judged, Row, Rows, SourceTarget, permutation


@dataclass(frozen=True)
class Example:
    """One document of a test row; of a preference that of the chosen answer, with ``rejected`` the other one.

    ``answer_at`` is the position of its last answer, 0 where there is no prompt before one, so that nothing can be asked. ``desirable``: the answer is
    not marked as bad.
    """

    document: Row
    answer_at: int
    rejected: Row | None = None
    desirable: bool = True

    @property
    def prompt(self) -> Ints:
        return self.document.input_ids[: self.answer_at]

    @property
    def answer(self) -> Ints:
        """The right answer, with the tokens that end it."""
        if isinstance(self.document, SourceTarget):
            return self.document.labels
        learned = self.document.labels[self.answer_at :] != IGNORED
        answer: Ints = self.document.input_ids[self.answer_at :][learned]
        return answer


def chosen_examples(rows: Rows, *, learned: Examples, most: int, seed: int) -> list[Example]:
    """At most so many examples, drawn by the seed, in the order of the rows. Each row of preferences is a chosen and a rejected document; a prompt may
    have no answer."""
    pairs = learned is Examples.PREFERENCES
    places = [(index, number) for index in range(len(rows)) for number in range(1 if pairs else len(rows[index].lengths))]
    drawn = sorted(permutation(len(places), seed=seed, epoch=0)[:most].tolist()) if places else []
    return [_example(rows[places[place][0]], places[place][1], learned) for place in drawn]


def _example(row: Row, number: int, learned: Examples) -> Example:
    if isinstance(row, SourceTarget):
        return Example(row, len(row.input_ids))
    found = _document(row, number)
    at = _last_answer(found.labels)
    if learned is Examples.PROMPTS and not found.targets:
        at = len(found.input_ids)
    return Example(found, at, _document(row, 1) if learned is Examples.PREFERENCES else None, _is_good(row))


def _is_good(row: Row) -> bool:
    return not isinstance(row, Judged) or row.desirable


def _document(row: Row, number: int) -> Row:
    start = sum(row.lengths[:number])
    end = start + row.lengths[number]
    return Row(row.input_ids[start:end], row.labels[start:end], [end - start])


def _last_answer(labels: Ints) -> int:
    """Where the last run of labels begins."""
    learned = np.flatnonzero(labels != IGNORED)
    if not len(learned):
        return 0
    unlearned = np.flatnonzero(labels[: learned[-1]] == IGNORED)
    return int(unlearned[-1]) + 1 if len(unlearned) else 0


def shots(rows: Rows, count: int, *, pairs: bool, seed: int) -> list[Row]:
    """Answered examples of the train rows, each of a row of its own, drawn by the seed; fewer where there are no more."""
    return [document for document, _ in zip(_answered(rows, pairs=pairs, seed=seed), range(count), strict=False)]


def _answered(rows: Rows, *, pairs: bool, seed: int) -> Iterator[Row]:
    for index in permutation(len(rows), seed=seed, epoch=0).tolist() if len(rows) else []:
        row = rows[index]
        if not _is_good(row):
            continue
        for number in range(1 if pairs else len(row.lengths)):
            document = _document(row, number)
            if _last_answer(document.labels):
                yield document
                break


def shown_before(shown: Sequence[Row], example: Example, *, beginning: int | None, room: int) -> Example:
    """The example with others before it, as many as fit into ``room`` tokens; a token that begins a text (``beginning``) stands there once."""
    while shown and sum(len(row.input_ids) for row in shown) + _longest(example) > room:
        shown = shown[:-1]
    if not shown:
        return example
    ids = np.concatenate([row.input_ids if not number else _without(row.input_ids, beginning) for number, row in enumerate(shown)])
    skip = len(example.document.input_ids) - len(_without(example.document.input_ids, beginning))

    def after(row: Row) -> Row:
        labels = np.concatenate([np.full(len(ids), IGNORED, dtype=np.int64), row.labels[skip:]])
        return Row(np.concatenate([ids, row.input_ids[skip:]]), labels, [len(labels)])

    at = len(ids) + example.answer_at - skip if example.answer_at else 0
    return Example(after(example.document), at, after(example.rejected) if example.rejected else None, example.desirable)


def _longest(example: Example) -> int:
    return max(len(row.input_ids) for row in (example.document, example.rejected) if row is not None)


def _without(ids: Ints, beginning: int | None) -> Ints:
    return ids[1:] if beginning is not None and len(ids) and ids[0] == beginning else ids
