"""Prompts for the model to answer itself: conversations that are not packed, whose answers rewards may compare with."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.preparing import a_data_job, examples, prepare_here, report, rows, write_lines
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer.prepare.conversation import Message, assistant, system, user
from tunewright_trainer.prepare.template import chat_template, load_tokenizer, render_prompt_ids
from tunewright_trainer.train.data import Rows
from tunewright_trainer.train.rollouts import prompt_of

BRIEFLY = {"objective": "ppo", "rewards": [{"type": "length", "max": 9}]}
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


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        pytest.param({"prompt": "Say 1.", "system": "Be brief."}, [system("Be brief."), user("Say 1.")], id="text"),
        pytest.param({"prompt": [system("Be brief."), user("Say 1.")]}, [system("Be brief."), user("Say 1.")], id="messages"),
        pytest.param(
            {"messages": [user("Say 1."), assistant("1!"), user("And 2?")]}, [user("Say 1."), assistant("1!"), user("And 2?")], id="chat"
        ),
        pytest.param({"prompt": "Say 1.", "chosen": "1!", "rejected": "2!"}, [user("Say 1.")], id="preferences"),
    ],
)
def test_a_prompt_may_have_no_answer(tmp_path: Path, row: dict[str, Any], asked: list[Message]) -> None:
    """It is read as the served model reads it, and nothing stands where the answer would."""
    source = {"uri": str(write_lines(tmp_path / "data.jsonl", [row])), "format": "prompt" if "chosen" in row else "auto"}
    config = a_data_job(source, method=BRIEFLY)
    prepare_here(config, tmp_path)
    found = prompt_of(Rows(tmp_path / "out" / "train")[0])
    folder = Path(config.spec.model.uri)
    assert found.ids.tolist() == render_prompt_ids(load_tokenizer(folder), asked, chat_template(folder, ""))
    assert found.reference.tolist() == []
    assert not any("are learned" in one["what"] for one in report(tmp_path)["warnings"])


def test_a_prompt_without_an_answer_is_never_cut(tmp_path: Path) -> None:
    """Its last tokens are those that ask for the answer."""
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "long " * 40}, {"prompt": "short"}])
    prepare_here(a_data_job(data, method=BRIEFLY, dataset={"overlong": "truncate", "maxLength": 100}), tmp_path)
    assert len(rows(tmp_path)) == 1
    assert report(tmp_path)["dropped"] == {"longer than maxLength": 1}


def test_a_reward_that_compares_needs_answers(tmp_path: Path) -> None:
    data = [{"prompt": "Say 1.", "completion": "1!"}, {"prompt": "Say 2."}]
    with pytest.raises(Refusal, match="jsonl:2: ends without an answer, which spec") as refusal:
        prepare_here(job(tmp_path, data), tmp_path)
    assert refusal.value.code is FailureCode.DATA_INVALID
    prepare_here(a_data_job(tmp_path / "data.jsonl", method=BRIEFLY), tmp_path)
    assert len(rows(tmp_path)) == 2


def test_elsewhere_a_row_without_an_answer_stays_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="jsonl:1: completion: is missing"):
        prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", [{"prompt": "Say 1."}])), tmp_path)
