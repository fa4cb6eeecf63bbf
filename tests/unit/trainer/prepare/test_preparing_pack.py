"""Packing: nothing lost, nothing twice, nothing too long, and the same each time."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.support.preparing import a_data_job, examples, prepare_here, rows, write_lines
from tests.support.rows import alpaca_rows
from tunewright_trainer.prepare.pack import best_fit_decreasing

CAPACITY = 64


@settings(deadline=None, max_examples=200, derandomize=True)
@given(some.lists(some.integers(1, CAPACITY), max_size=200))
def test_every_example_is_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    packed = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(index for row in packed for index in row) == list(range(len(lengths)))
    room = [sum(lengths[index] for index in row) for row in packed]
    assert all(0 < filled <= CAPACITY for filled in room)
    # Two rows that would fit into one are never left apart: that is what "best fit" is worth.
    assert sum(2 * filled <= CAPACITY for filled in room) <= 1
    assert packed == best_fit_decreasing(lengths, CAPACITY)


def test_an_example_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="example 1 has 65 tokens"):
        best_fit_decreasing([1, 65], CAPACITY)


def test_packed_rows_hold_the_same_examples_as_unpacked_ones(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(100))
    apart = prepare_here(a_data_job(file), tmp_path / "apart")
    together = prepare_here(a_data_job(file, dataset={"packing": True}), tmp_path / "together")
    assert sorted(examples(tmp_path / "together")) == sorted(examples(tmp_path / "apart"))
    assert apart.dataset is not None
    assert together.dataset is not None
    assert (together.dataset.tokens, together.dataset.trainable_tokens) == (apart.dataset.tokens, apart.dataset.trainable_tokens)
    packed = rows(tmp_path / "together")
    assert len(packed) < 15
    assert all(sum(row["lengths"]) == len(row["input_ids"]) <= 512 for row in packed)
