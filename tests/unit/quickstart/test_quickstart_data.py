"""The quick start's data: reproducible, right, and honest about what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("file", "split"), [("train.jsonl", "train"), ("test.jsonl", "test")])
def test_the_committed_file_is_what_the_script_makes(
    file: str, split: str, make_data: ModuleType, quickstart: Path, tmp_path: Path
) -> None:
    make_data.write_rows(tmp_path / file, getattr(make_data.make_splits(), split))
    assert (tmp_path / file).read_bytes() == (quickstart / "data" / file).read_bytes()


def test_another_seed_makes_other_rows(make_data: ModuleType) -> None:
    assert make_data.make_splits(1).test != make_data.make_splits(2).test


def test_train_has_enough_rows_and_none_twice(quickstart: Path) -> None:
    rows = read(quickstart / "data" / "train.jsonl")
    assert 2000 <= len(rows) <= 3000
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert all(row.keys() == {"instruction", "input", "output"} and row["instruction"] and row["output"] for row in rows)


def subject_words(row: Row, make_data: ModuleType) -> frozenset[str]:
    """Give the words that a question is about, read off its text."""
    subjects = {*make_data.NOUNS, *make_data.OPPOSITES, *make_data.SUCCESSORS, *make_data.NUMBERS}
    asked = row["input"] or row["instruction"].rpartition(":")[2] or row["instruction"]
    # In "What is the opposite of hot?" the last word is the subject.
    words = asked.split() if row["input"] or ":" in row["instruction"] else asked.split()[-1:]
    return frozenset(word.strip(".?") for word in words) & subjects


@pytest.mark.parametrize("split", ["development", "test"])
def test_no_training_row_asks_about_the_words_of_a_held_out_question(split: str, make_data: ModuleType) -> None:
    splits = make_data.make_splits()
    single_word_facts = {"opposite", "plural", "next", "after"}

    def questions(rows: list[Row]) -> set[tuple[str, frozenset[str]]]:
        found = set()
        for row in rows:
            words = subject_words(row, make_data)
            assert words, row
            fact = next(
                (name for name in single_word_facts if name in row["instruction"].rstrip(".?").replace("comes after", "next").split()), ""
            )
            found.add((fact if len(words) == 1 else "", words))
        return found

    train, held_out = questions(splits.train), questions(getattr(splits, split))
    assert len(held_out) > 90
    assert not train & held_out
    opposites = {(kind, frozenset({make_data.OPPOSITES[word]})) for kind, words in held_out if kind == "opposite" for word in words}
    assert opposites
    assert not train & opposites, "the opposite of a held-out word gives the answer away"


def test_development_and_test_ask_about_different_words(make_data: ModuleType) -> None:
    splits = make_data.make_splits()
    development = {(row["instruction"], row["input"]) for row in splits.development}
    assert not development & {(row["instruction"], row["input"]) for row in splits.test}


@pytest.mark.parametrize(
    ("task", "subject", "answer"),
    [
        ("reverse", ("red", "big", "cat"), "cat big red"),
        ("first", ("cat", "dog", "cow"), "cat"),
        ("last", ("cat", "dog", "cow"), "cow"),
        ("count", ("cat", "dog", "cow"), "3"),
        ("sort", ("dog", "cow", "cat"), "cat cow dog"),
        ("repeat", ("cat", "dog"), "cat dog cat dog"),
        ("larger", ("9", "10"), "10"),
        ("opposite", ("cold",), "hot"),
        ("plural", ("mouse",), "mice"),
        ("next", ("Sunday",), "Monday"),
        ("next", ("December",), "January"),
        ("next", ("98",), "99"),
    ],
)
def test_the_answer_is_right(task: str, subject: tuple[str, ...], answer: str, make_data: ModuleType) -> None:
    tasks = {each.name: each for each in make_data.TASKS}
    assert tasks[task].answer(subject) == answer
    row = tasks[task].row(subject, tasks[task].phrasings[0])
    assert (row["input"], row["output"]) == (" ".join(subject), answer)
