"""Prompts for the model to answer itself: conversations that are not packed, whose answers rewards may compare with."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.preparing import a_data_job, examples, prepare_here, rows, write_lines
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig

PAIRS = [{"prompt": f"Say {number}.", "completion": f"{number}!"} for number in range(4)]


def job(work: Path, data: list[Any], **parts: Any) -> PodConfig:
    method = {"objective": "grpo", "rewards": [{"type": "exact-match"}]}
    return a_data_job(write_lines(work / "data.jsonl", data), method=method, **parts)


def test_conversations_are_not_packed(tmp_path: Path) -> None:
    """As for objective sft with packing: false."""
    (tmp_path / "plain").mkdir()
    outcome = prepare_here(job(tmp_path, PAIRS, dataset={"packing": True}), tmp_path)
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", PAIRS)), tmp_path / "plain")
    assert outcome.dataset is not None
    assert outcome.dataset.train_examples == len(rows(tmp_path)) == 4
    assert all("lengths" not in row for row in rows(tmp_path))
    assert examples(tmp_path) == examples(tmp_path / "plain")


def test_a_plain_text_has_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="holds a plain text, in which nothing is a prompt") as refusal:
        prepare_here(job(tmp_path, [{"text": "once upon a time"}]), tmp_path)
    assert refusal.value.code is FailureCode.DATA_INVALID
