"""Every objective with tuners of each sort: what it is for gets better, or the contract refuses the two and says why. Every tuner with sft: test_training_tuners.py."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.models import decided_model, tiny_model
from tests.support.training import Row, a_job, documents, history, marked, pairs, publish_data, train_here
from tunewright_crds.method import LEARNS_FROM, Examples, Objective
from tunewright_trainer.storage import LocalStore

SORTS: Final = ("full", "lora", "dora", "adalora", "ia3", "bitfit", "prompt")  # all weights, matrices, factors, biases, and tokens
RATES: Final = {"full": 0.002, "ia3": 0.1, "adalora": 0.1}
REWARDED_RATES: Final = {"full": 0.01}
VOWELS: Final = {"type": "regex", "pattern": "[aeiou]"}
# What shall become more or less: the rewards of batches, what is preferred in validation, or the loss, which begins at one half with kto.
AIMS: Final = {
    Objective.DPO: ("eval_rewards/margins", 1),
    Objective.KTO: ("loss", -1),
    Objective.REWARD: ("eval_loss", -1),
    Objective.PPO: ("reward", 1),
    Objective.GRPO: ("reward", 1),
    Objective.RLOO: ("reward", 1),
}
_REWARDED: Final = (Objective.PPO, Objective.GRPO, Objective.RLOO)
REFUSED: Final = {
    **{(objective, "prompt"): "is for objective sft" for objective in AIMS},
    **{(objective, "bitfit"): "is for objective sft" for objective in AIMS},
    **{(objective, "adalora"): "makes several updates" for objective in _REWARDED},
    (Objective.REWARD, "ia3"): "needs tuner lora, dora or full",
    (Objective.REWARD, "adalora"): "needs tuner lora, dora or full",
}
# ia3 only scales what a layer gives: too little to raise the rewards of a tiny model in ten steps.
PAIRS: Final = [(objective, tuner) for objective in AIMS for tuner in SORTS if (objective in _REWARDED, tuner) != (True, "ia3")]


def test_no_objective_is_left_out() -> None:
    assert {*AIMS, Objective.SFT} == {*Objective}


@pytest.mark.parametrize(("objective", "tuner"), PAIRS)
def test_an_objective_with_a_tuner_gets_better_or_is_refused(objective: Objective, tuner: str, tmp_path: Path) -> None:
    rewarded = LEARNS_FROM[objective] is Examples.PROMPTS
    method: dict[str, Any] = {"objective": objective.value, "tuner": tuner}
    numbers: dict[str, Any] = {"warmupRatio": 0, "scheduler": "constant", "batchSize": 8}
    if rewarded:
        method |= {"rewards": [VOWELS], objective.value: {"maxNewTokens": 6} | ({} if objective is Objective.PPO else {"generations": 8})}
        numbers |= {"maxSteps": 10, "learningRate": REWARDED_RATES.get(tuner, 0.03), "batchSize": 32 if objective is Objective.PPO else 4}
    else:
        numbers |= {"epochs": 3, "learningRate": RATES.get(tuner, 0.003)}
    if (objective, tuner) in REFUSED:
        with pytest.raises(ValidationError, match=REFUSED[objective, tuner]):
            a_job(method=method)
        return
    store = LocalStore(tmp_path / "store")
    train, validation = rows_for(objective)
    publish_data(store, tmp_path, train=train, validation=[] if rewarded else validation)
    outcome = train_here(
        a_job(decided_model() if rewarded else tiny_model("llama"), method=method, hyperparameters=numbers), store, tmp_path
    )
    assert outcome.artifact is not None
    name, sign = AIMS[objective]
    told = [line[name] for line in history(store) if name in line]
    before, after = np.mean(told[:3]) if rewarded else told[0], np.mean(told[-3:])
    assert sign * (after - before) > (0.1 if rewarded else 0), told


def rows_for(objective: Objective) -> tuple[list[Row], list[Row]]:
    if objective is Objective.KTO:
        return marked(16), marked(4, seed=9)
    if LEARNS_FROM[objective] is Examples.PREFERENCES:
        return pairs(32), pairs(6, seed=9)
    return [[document] for document in documents(16, longest=16)], []
