"""Sources are mixed by weight: rows to train on occur that often, always the same ones, and nothing else is repeated."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.preparing import a_data_job, examples, out, prepare_here, report, write_lines


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {n}?", "completion": f"{n}"} for n in range(count)]


def prepared(work: Path, *sources: tuple[list[dict[str, str]], float], **dataset: Any) -> Counter[str]:
    """How often each prompt is trained on."""
    named = [{"uri": str(write_lines(work / f"{n}.jsonl", data)), "weight": weight} for n, (data, weight) in enumerate(sources)]
    prepare_here(a_data_job(*named, dataset=dataset), work)
    return Counter(told.text.split("\n")[1].removesuffix("<|im_end|>") for told in examples(work))


@pytest.mark.parametrize(("packing", "weight"), [(False, 2.0), (True, 2.0), (False, 3.0), (True, 100.0)])
def test_a_whole_weight_repeats_each_row(tmp_path: Path, packing: bool, weight: float) -> None:
    found = prepared(tmp_path, (rows("a", 5), weight), (rows("b", 5), 1.0), packing=packing)
    assert found == {f"a {n}?": weight for n in range(5)} | {f"b {n}?": 1 for n in range(5)}
    assert report(tmp_path)["splits"]["train"]["examples"] == 5 * weight + 5
    assert report(tmp_path)["dropped"] == {}


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_a_part_of_a_weight_takes_a_share_of_the_rows(tmp_path: Path, weight: float) -> None:
    found = prepared(tmp_path, (rows("a", 600), weight), (rows("b", 7), 1.0))
    drawn = [prompt for prompt in found if prompt.startswith("a")]
    assert abs(len(drawn) / 600 - weight) < 0.08
    assert report(tmp_path)["dropped"] == {f"not drawn (weight {weight:g})": 600 - len(drawn)}
    assert set(found.values()) == {1}
    assert sum(prompt.startswith("b") for prompt in found) == 7


def test_two_and_a_half_takes_half_of_the_rows_a_third_time(tmp_path: Path) -> None:
    found = prepared(tmp_path / "more", (rows("a", 300), 2.5))
    half = prepared(tmp_path / "half", (rows("a", 300), 0.5))
    assert {prompt for prompt, times in found.items() if times == 3} == set(half)
    assert set(found.values()) == {2, 3}
    assert len(found) == 300


def test_order_and_files_do_not_change_who_is_drawn(tmp_path: Path) -> None:
    data = rows("a", 100)
    one = prepared(tmp_path / "one", (data, 1.5))
    other = prepared(tmp_path / "other", (data[60:][::-1], 1.5), (data[:60], 1.5))
    assert one == other
    assert len(set(one.values())) == 2


def test_only_rows_to_train_on_are_repeated_and_duplicates_stay_out(tmp_path: Path) -> None:
    found = prepared(tmp_path, (rows("a", 50) + rows("a", 3), 3.0), validationFraction=0.2, testFraction=0.1)
    assert set(found.values()) == {3}
    assert (len(found), len(examples(tmp_path, "validation")), len(examples(tmp_path, "test"))) == (35, 10, 5)
    assert report(tmp_path)["dropped"] == {"duplicate": 3}
    assert '<td class="n">3</td>' in out(tmp_path).get_bytes("report.html").decode()


def test_a_weight_of_rows_to_test_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="weight is for rows to train on"):
        a_data_job(tmp_path, {"uri": "x", "split": "test", "weight": 2})
