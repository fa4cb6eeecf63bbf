"""Near duplicates: found, dropped or kept together, and never on both sides of a test. And answers that decline."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.preparing import a_data_job, examples, prepare_here, report, write_lines
from tunewright_trainer.prepare.near import SignatureFile, _shingles, clusters, signatures

WORDS = [f"word{n}" for n in range(400)]


def a_text(seed: int, *, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def nearly(text: str, *, changes: int = 1) -> str:
    """The text with other words at its end, and in capitals."""
    return " ".join([*text.split()[:-changes], *(f"other{n}" for n in range(changes))]).upper()


def a_row(text: str) -> dict[str, str]:
    return {"prompt": f"Continue: {text}", "completion": "Yes."}


def nearness(one: str, other: str) -> float:
    """Jaccard's index, counted."""
    ours, theirs = set(_shingles(one)), set(_shingles(other))
    return len(ours & theirs) / len(ours | theirs)


def test_signatures_agree_as_often_as_texts_are_near() -> None:
    for changes in (1, 6, 15, 30):
        text = a_text(changes)
        one, other = signatures([text, nearly(text, changes=changes)])
        assert abs(float((one == other).mean()) - nearness(text, nearly(text, changes=changes))) < 0.15


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from([0, 1, 2, 25])), min_size=1, max_size=40))
def test_pairs_are_those_that_comparing_all_with_all_would_join(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, int]]
) -> None:
    texts = [nearly(a_text(seed), changes=changes) if changes else a_text(seed) for seed, changes in made]
    some = signatures(texts)
    file = SignatureFile(tmp_path_factory.mktemp("near") / "signatures")
    file.add(some[:3])
    file.add(some[3:])
    file.close()
    near = np.array([(i, j) for j in range(len(texts)) for i in range(j) if (some[i] == some[j]).mean() >= 0.8], dtype=np.int64).reshape(
        -1, 2
    )
    assert clusters(file.pairs(0.8), len(texts)).tolist() == clusters(near, len(texts)).tolist()


def test_near_duplicates_are_dropped_if_the_job_says_so(tmp_path: Path) -> None:
    texts = [a_text(n) for n in range(20)]
    file = write_lines(
        tmp_path / "data.jsonl", [a_row(text) for text in [*texts, nearly(texts[3]), nearly(texts[7]), nearly(texts[9], changes=30)]]
    )
    prepare_here(a_data_job(file, dataset={"cleaning": {"nearDuplicates": {"enabled": True}}}), tmp_path)
    assert report(tmp_path)["droppedAt"] == {"nearly the same as an earlier row": ["data.jsonl:21", "data.jsonl:22"]}
    assert len(examples(tmp_path)) == 21
    prepare_here(a_data_job(file), tmp_path)
    assert len(examples(tmp_path)) == 23, "unless it does"


def test_nothing_nearly_the_same_as_a_held_out_row_is_trained_on(tmp_path: Path) -> None:
    texts = [a_text(n) for n in range(10)]
    test = write_lines(tmp_path / "test.jsonl", [a_row(text) for text in texts[:2]])
    train = write_lines(tmp_path / "train.jsonl", [a_row(text) for text in [*texts[2:], nearly(texts[0]), nearly(texts[5])]])
    prepare_here(a_data_job(train, {"uri": str(test), "split": "test"}), tmp_path)
    assert report(tmp_path)["droppedAt"] == {"nearly the same as a held-out row": ["train.jsonl:9"]}
    assert (len(examples(tmp_path, "test")), len(examples(tmp_path))) == (2, 9)


def test_near_duplicates_and_rows_of_one_prompt_are_drawn_together(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(60):
        text = a_text(n)
        rows += [a_row(text), a_row(nearly(text)), {"prompt": f"Continue: {nearly(text)}", "completion": f"No, {n}."}]
    random.Random(1).shuffle(rows)
    file = write_lines(tmp_path / "data.jsonl", rows)
    prepare_here(a_data_job(file, dataset={"testFraction": 0.3, "maxLength": 1024}), tmp_path)
    told = [
        {tuple(told.text.lower().split("continue: ")[1].split()[:20]) for told in examples(tmp_path, split)} for split in ("train", "test")
    ]
    assert all(told)
    assert not told[0] & told[1], "each family is on one side"
    assert sum(map(len, told)) == 60


REFUSING = [
    "I'm sorry, but I cannot help with that.",
    "As an AI language model, I have no feelings.",
    "I cannot assist with this request.",
    "Unfortunately I can’t provide that.",
    "I am unable to create images.",
]
ANSWERING = [
    "I'm sorry to hear that! Rest and drink.",
    "He said that he cannot come.",
    "Sorry means regret.",
    "A model is a likeness.",
    f"{a_text(1)} I cannot help with that.",
]


def test_answers_that_decline_are_dropped_if_the_job_says_so(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"prompt": f"{n}?", "completion": text} for n, text in enumerate([*REFUSING, *ANSWERING])])
    prepare_here(a_data_job(file, dataset={"cleaning": {"dropRefusals": True}, "maxLength": 1024}), tmp_path)
    assert report(tmp_path)["droppedAt"] == {"an answer that declines": [f"data.jsonl:{line}" for line in range(1, 6)]}
    assert len(examples(tmp_path)) == 5
