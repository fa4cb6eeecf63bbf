"""What answers get by a job's own rewards is what they get in training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.models import CHAT_TEMPLATE, decided_model
from tests.support.training import a_job
from tests.unit.trainer.train.test_training_reinforced import a_judge
from tunewright_trainer.evaluate.examples import chosen_examples
from tunewright_trainer.evaluate.rewarding import Rewarding
from tunewright_trainer.prepare.template import load_tokenizer
from tunewright_trainer.serve.turns import end_of_turn
from tunewright_trainer.train.data import IGNORED, Row, Rows, micro_batch
from tunewright_trainer.train.model import load_untuned
from tunewright_trainer.train.reward_model import load_reward_model, scores


def test_a_reward_model_reads_answers_as_it_does_in_training(tmp_path: Path) -> None:
    folder, judge = decided_model(), a_judge(tmp_path / "judge")
    method = {
        "objective": "grpo",
        "rewards": [{"type": "regex", "pattern": "[aeiou]"}],
        "rewardModel": str(judge),
        "grpo": {"maxNewTokens": 8},
    }
    spec = a_job(folder, method=method, evaluation={"maxNewTokens": 8}).spec
    tuned, tokenizer = load_untuned(folder, spec), load_tokenizer(folder)
    end = end_of_turn(tokenizer, CHAT_TEMPLATE)
    (ends,) = end.ids
    prompt, said = np.arange(30, 36), [[ord(letter) for letter in word] for word in ("so", "brrr", "ah, longer", "12345678")]
    found, each = Rewarding(spec, judge, tokenizer, CHAT_TEMPLATE, end).of(
        tuned, [prompt] * 4, said, ["so", "brrr", "ah, long", "12345678"], [None] * 4
    )
    rows = [Row(ids, ids, [len(ids)]) for answer in said for ids in [np.array([*prompt, *answer, *([ends] if len(answer) < 8 else [])])]]
    with torch.no_grad():
        by_model = scores(load_reward_model(judge, device=tuned.device, dtype=tuned.compute), micro_batch(rows, tuned.device)).tolist()
    assert each == {"regex": [1, 0, 1, 0], "model": pytest.approx(by_model, abs=1e-5)}
    assert found == pytest.approx([one + other for one, other in zip(by_model, each["regex"], strict=True)], abs=1e-5)


def test_a_prompt_without_an_answer_is_asked_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [Row(np.arange(5), np.full(5, IGNORED), [5]), Row(np.arange(5), np.array([IGNORED] * 3 + [3, 4]), [5])]
    monkeypatch.setattr(Rows, "__len__", lambda _: len(rows))
    monkeypatch.setattr(Rows, "__getitem__", lambda _, index: rows[index])
    learned = a_job(method={"objective": "grpo", "rewards": [{"type": "length", "max": 3}]}).spec.method.examples
    asked = chosen_examples(Rows(tmp_path), learned=learned, most=5, seed=1)
    assert [(one.answer_at, one.answer.tolist()) for one in asked] == [(5, []), (3, [3, 4])]
