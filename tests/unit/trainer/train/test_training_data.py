"""Order and micro-batches: what every promise of exact resumption stands on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import documents, packed, write_rows
from tunewright_trainer.train.attention import Segments
from tunewright_trainer.train.data import IGNORED, Order, Row, Rows, grouped, micro_batch, permutation

CPU = torch.device("cpu")
GOLDEN_ORDER = ([3, 6, 0, 4, 7, 1, 2, 5], [0, 1, 6, 5, 3, 7, 4, 2])


def a_row(*documents: list[int]) -> Row:
    """A row in which every token is a label."""
    tokens = np.array([token for document in documents for token in document], dtype=np.int64)
    return Row(tokens, tokens.copy(), [len(document) for document in documents])


@given(rows=st.integers(1, 300), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
def test_every_pass_takes_every_row_once(rows: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(rows, seed=seed, epoch=epoch)) == list(range(rows))


def test_the_order_is_fixed_for_ever() -> None:
    """Checkpoints of an older release are resumed from: the order that they were taken in must not change."""
    assert permutation(8, seed=42, epoch=0).tolist() == GOLDEN_ORDER[0]
    assert permutation(8, seed=42, epoch=1).tolist() == GOLDEN_ORDER[1]
    assert permutation(8, seed=43, epoch=0).tolist() != GOLDEN_ORDER[0]


def test_a_position_means_the_same_row_however_one_gets_there() -> None:
    straight = Order(7, seed=1)
    walked = [straight[position] for position in range(30)]
    assert [Order(7, seed=1)[position] for position in range(29, -1, -1)] == walked[::-1]


def test_rows_come_back_from_several_files(tmp_path: Path) -> None:
    made = packed(documents(6), 2)
    write_rows(tmp_path / "a", made[:2])
    write_rows(tmp_path / "b", made[2:])
    (tmp_path / "both").mkdir()
    (tmp_path / "a" / "data-00000.arrow").rename(tmp_path / "both" / "0.arrow")
    (tmp_path / "b" / "data-00000.arrow").rename(tmp_path / "both" / "1.arrow")
    rows = Rows(tmp_path / "both")
    assert len(rows) == 3
    for index, documents_of_row in enumerate(made):
        assert rows[index].input_ids.tolist() == [token for ids, _ in documents_of_row for token in ids]
        assert rows[index].labels.tolist() == [label for _, labels in documents_of_row for label in labels]
        assert list(rows[index].lengths) == [len(ids) for ids, _ in documents_of_row]


def test_a_split_that_was_not_written_has_no_rows(tmp_path: Path) -> None:
    assert len(Rows(tmp_path / "validation")) == 0


def test_a_micro_batch_predicts_within_documents_only() -> None:
    batch = micro_batch([a_row([1, 2, 3], [4, 5]), a_row([6, 7])], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.segments == Segments([3, 2, 2], [-1, -1, -1])
    # From 1 to 2, 2 to 3, 4 to 5, 6 to 7; never across a border.
    assert batch.keep.tolist() == [0, 1, 3, 5]
    assert batch.targets.tolist() == [2, 3, 5, 7]


def test_a_first_token_is_no_target_even_where_it_has_a_label() -> None:
    row = a_row([1, 2, 3], [4, 5])
    assert row.targets == 3
    row.labels[:] = IGNORED
    assert row.targets == 0


@pytest.mark.parametrize(
    ("sizes", "micro_batch_size", "halvings", "groups"),
    [
        pytest.param([3, 3, 3, 3], 2, 0, [2, 2], id="so many rows"),
        pytest.param([3, 3, 3, 3], 2, 1, [1, 1, 1, 1], id="halved"),
        pytest.param([3, 3, 3, 3], 2, 9, [1, 1, 1, 1], id="never less than one row"),
        pytest.param([3, 3, 3], 2, 0, [2, 1], id="a rest"),
        pytest.param([2000, 2000, 2000], "auto", 0, [2, 1], id="automatic: about 4,096 tokens"),
        pytest.param([2000, 2000, 2000], "auto", 1, [1, 1, 1], id="automatic, halved"),
        pytest.param([9000, 10], "auto", 0, [1, 1], id="a row longer than that goes alone"),
    ],
)
def test_groups(sizes: list[int], micro_batch_size: int | str, halvings: int, groups: list[int]) -> None:
    rows = [a_row([1] * size) for size in sizes]
    assert [len(group) for group in grouped(rows, micro_batch_size, halvings=halvings)] == groups
