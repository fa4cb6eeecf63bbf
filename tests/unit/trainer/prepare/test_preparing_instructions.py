"""Data for a hypernetwork (tuner hint): instructions stand apart from their inputs."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, prepare_here, report, rows, write_lines
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer.prepare.template import load_tokenizer

END, BEGIN = "<|im_end|>", "<|begin|>"
TASK = {
    "Definition": ["Add the numbers."],
    "Instances": [{"input": "1 2", "output": ["3", "three"]}, {"input": "4 4", "output": ["8"]}],
}
ADD = ("Add the numbers.", "1 2")

ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str, str]]]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("Add.", "1 2", "3")]),
    "alpaca with a system message": (
        {"system": "Be short.", "instruction": "Add.", "input": "1 2", "output": "3"},
        [("Be short.\n\nAdd.", "1 2", "3")],
    ),
    "alpaca without an input": ({"instruction": "Name a colour.", "input": "", "output": "red"}, [("Name a colour.", "", "red")]),
    "an instruction of two paragraphs": (
        {"instruction": "Add.\n\nIn words.", "input": "1\n\n2", "output": "three"},
        [("Add.\n\nIn words.", "1\n\n2", "three")],
    ),
    "dolly": ({"instruction": "Who?", "context": "It was Ann.", "response": "Ann"}, [("Who?", "It was Ann.", "Ann")]),
    "natural instructions": (TASK, [(*ADD, "3"), (*ADD, "three"), ("Add the numbers.", "4 4", "8")]),
    "self-instruct": (
        {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]},
        [("Add.", "1 2", "3")],
    ),
}


def job(work: Path, data: list[Any], **parts: Any) -> PodConfig:
    return a_data_job(
        write_lines(work / "data.jsonl", data), base=tiny_model("t5"), method={"tuner": "hint"}, evaluation={"enabled": False}, **parts
    )


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
def test_instruction_input_and_answer_stand_apart(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    prepare_here(job(tmp_path, [row]), tmp_path)
    tokenizer = load_tokenizer(tiny_model("t5"))
    found = [tuple(tokenizer.decode(row[name]) for name in ("instruction", "input_ids", "labels")) for row in rows(tmp_path)]
    assert found == [(f"{BEGIN}{told}{END}", f"{BEGIN}{given}{END}", f"{answer}{END}") for told, given, answer in expected]


def test_rows_that_do_not_tell_them_apart_are_left_out_and_told(tmp_path: Path) -> None:
    good = {"instruction": "Add.", "input": "1 2", "output": "3"}
    others = [
        {"prompt": "Add 1 2.", "completion": "3"},
        {"messages": [{"role": "user", "content": "Add 1 2."}, {"role": "assistant", "content": "3"}]},
        good | {"history": [["Hi", "Hello"]]},
    ]
    prepare_here(job(tmp_path, [good, *others]), tmp_path)
    assert len(rows(tmp_path)) == 1
    facts = report(tmp_path)
    assert facts["dropped"] == {"no instruction apart from its input": 4}, "of the last row each of its two exchanges"
    assert facts["dataset"]["trainableTokens"] == 2
    assert facts["samples"] == [[{"text": f"{BEGIN}Add.{END}{BEGIN}1 2{END}", "learned": False}, {"text": f"3{END}", "learned": True}]]


def test_a_longest_length_for_each_part(tmp_path: Path) -> None:
    row = {"instruction": "i" * 30, "input": "j" * 30, "output": "k" * 30}
    prepare_here(job(tmp_path / "fits", [row], dataset={"maxLength": 32, "overlong": "drop"}), tmp_path / "fits")
    assert [len(rows(tmp_path / "fits")[0][name]) for name in ("instruction", "input_ids", "labels")] == [32, 32, 31]
    with pytest.raises(Refusal, match="longer than maxLength"):
        prepare_here(job(tmp_path / "long", [row], dataset={"maxLength": 31, "overlong": "drop"}), tmp_path / "long")


def test_masked_and_cleaned_rows_are_still_told_apart(tmp_path: Path) -> None:
    row = {"instruction": "Reply\r\nto them.", "input": "Write to ann@example.org, \x00please.", "output": "Done."}
    prepare_here(job(tmp_path, [row], dataset={"cleaning": {"personalData": "mask"}}), tmp_path)
    tokenizer = load_tokenizer(tiny_model("t5"))
    (found,) = rows(tmp_path)
    assert tokenizer.decode(found["instruction"]) == f"{BEGIN}Reply\nto them.{END}"
    assert tokenizer.decode(found["input_ids"]) == f"{BEGIN}Write to <EMAIL>, please.{END}"


@pytest.mark.parametrize("layout", ["bart", "llama"])
def test_models_that_no_hypernetwork_writes_for_are_refused(tmp_path: Path, layout: Any) -> None:
    config = a_data_job(
        write_lines(tmp_path / "data.jsonl", [ROWS["alpaca"][0]]),
        base=tiny_model(layout),
        method={"tuner": "hint"},
        evaluation={"enabled": False},
    )
    with pytest.raises(Refusal, match="tuner hint is for t5 and mt5") as caught:
        prepare_here(config, tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, "spec.method.tuner")
