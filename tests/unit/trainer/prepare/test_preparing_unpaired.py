"""Answers that are marked as good or bad: what they are read from, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.preparing import a_data_job, out, prepare_here, report, rows, write_lines
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer.train.data import Judged, Rows

SYSTEM, USER, ANSWER = ({"role": role, "content": role} for role in ("system", "user", "assistant"))


def job(work: Path, data: list[Any], **parts: Any) -> PodConfig:
    return a_data_job(write_lines(work / "data.jsonl", data), method={"objective": "kto"}, **parts)


def marked(number: int, label: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Say {number}.", "completion": f"{number}!", "label": label} | more


def test_marked_answers_and_both_sides_of_pairs_are_rows_with_their_mark(tmp_path: Path) -> None:
    data = [
        marked(1, True),
        marked(2, False),
        marked(2, False),
        {"prompt": [SYSTEM, USER], "completion": [ANSWER], "label": 1},
        {"prompt": "Say 4.", "chosen": "4!", "rejected": "No, not 4"},
    ]
    prepare_here(job(tmp_path, data), tmp_path)
    assert [sum(length > 0 for length in row["lengths"]) for row in rows(tmp_path)] == [1] * 5
    read = Rows(tmp_path / "out" / "train")
    found = [read[index] for index in range(len(read))]
    assert all(isinstance(row, Judged) and row.targets and len(row.lengths) == 1 for row in found)
    assert [row.desirable for row in found if isinstance(row, Judged)] == [True, False, True, True, False]
    told = report(tmp_path)
    assert (told["desirable"], told["undesirable"], told["dropped"]) == (3, 3, {"duplicate": 1})
    page = out(tmp_path).get_bytes("report.html").decode()
    assert "good answers" in page
    assert '<mark class="worse">' in page


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mark that is none": (marked(1, "good"), "label: must be true or false"),
    "no mark": ({"prompt": "a", "completion": "b"}, "holds no marked answers"),
    "a completion that begins with a question": (marked(1, True, completion=[USER, ANSWER]), "completion: must begin with an answer"),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_a_row_without_a_mark_is_told_by_its_field(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal) as caught:
        prepare_here(job(tmp_path, [row]), tmp_path)
    assert caught.value.code is FailureCode.DATA_INVALID
    assert caught.value.message.startswith(f"data.jsonl:1: {said}"), caught.value.message
