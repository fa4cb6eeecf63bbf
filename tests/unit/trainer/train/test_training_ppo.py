"""Proximal policy optimisation: each formula written out, and whole attempts on tiny models. Exact resume is tested with the other objectives."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import decided_model, tiny_model
from tests.support.training import IGNORED, a_job, documents, history, publish_data, train_here, weights_digest
from tunewright_crds.pod import PodConfig
from tunewright_crds.reinforcement import Ppo
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train.attention import documents as isolated
from tunewright_trainer.train.data import Row, micro_batch
from tunewright_trainer.train.model import load
from tunewright_trainer.train.ppo import Surrogate, Valued, adapted, advantages, experienced, value_head, valued
from tunewright_trainer.train.rollouts import Sample

VOWELS: Final = [{"type": "regex", "pattern": "[aeiou]"}, {"type": "regex", "pattern": "[aeiou].*[aeiou]"}]
RISING: Final = {
    "batchSize": 32,
    "learningRate": 0.01,
    "warmupRatio": 0,
    "scheduler": "constant",
    "maxSteps": 14,
    "evaluationsPerEpoch": 0.05,
}


def job(options: dict[str, Any], hyperparameters: dict[str, Any], **method: Any) -> PodConfig:
    return a_job(decided_model(), method={"objective": "ppo", "ppo": options, "rewards": VOWELS} | method, hyperparameters=hyperparameters)


def attempt(work: Path, config: PodConfig) -> tuple[list[dict[str, Any]], Any, LocalStore]:
    """The steps of a run, its outcome and where everything is."""
    store = LocalStore(work / "store")
    publish_data(
        store, work, train=[[one] for one in documents(32, longest=16)], validation=[[one] for one in documents(6, seed=9, longest=16)]
    )
    outcome = train_here(config, store, work)
    return [line for line in history(store) if "loss" in line], outcome, store


def sample(size: int) -> Sample:
    return Sample(np.arange(size + 2), np.array([IGNORED, IGNORED, *range(size)]), [size + 2], "", "", True)


def test_advantages_are_sums_of_what_was_not_expected() -> None:
    """Generalised advantage estimation as the sum that it is defined by."""
    rewards, values, decay = torch.tensor([0.1, -0.2, 0.3, 2.0]), torch.tensor([0.5, 0.4, -0.1, 0.7]), 0.9
    errors = rewards + torch.tensor([0.4, -0.1, 0.7, 0.0]) - values
    expected = [sum(decay ** (at - start) * float(errors[at]) for at in range(start, 4)) for start in range(4)]
    assert advantages(rewards, values, decay=decay).tolist() == pytest.approx(expected)
    assert advantages(rewards, values, decay=1).tolist() == pytest.approx([2.2 - 0.5, 2.1 - 0.4, 2.3 + 0.1, 2.0 - 0.7])


def test_tokens_are_rewarded_for_staying_near_and_the_last_for_the_answer() -> None:
    values, divergences = [torch.tensor([0.1, 0.2]), torch.tensor([0.3])], [torch.tensor([1.0, -2.0]), torch.tensor([0.5])]
    made = experienced([sample(2), sample(1)], values, values, divergences, [3.0, -1.0], coefficient=0.1, decay=1.0)
    returns = [-0.1 + 0.2 + 3.0, 0.2 + 3.0, -0.05 - 1.0]
    gains = np.array(returns) - np.array([0.1, 0.2, 0.3])
    assert torch.cat([one.returns for one in made]).tolist() == pytest.approx(returns)
    assert torch.cat([one.advantages for one in made]).tolist() == pytest.approx(((gains - gains.mean()) / gains.std()).tolist(), abs=1e-5)


def test_the_loss_is_that_of_the_formula() -> None:
    options = Ppo.model_validate({"clip": 0.2, "valueClip": 0.5, "valueCoefficient": 0.3})
    old, policy = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -2.1, -3.0])
    gains, before, aims = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([2.0, -0.1, 1.0])
    values = torch.tensor([1.0, 0.2, 3.0])
    row = sample(3)
    made = Valued(row.input_ids, row.labels, row.lengths, gains, old, values=before, returns=aims)
    each, told = Surrogate(options, temperature=1).tokens(policy, values, [made])
    surrogate = [-1.2, float(np.exp(-0.1)), -2.0]  # the first is clipped
    errors = [0.5 * 1.5**2, 0.5 * 0.3**2, 0.5 * 2.0**2]  # the first by the value that went 0.5 at most, the last by the plain one
    assert each.tolist() == pytest.approx([one + 0.3 * other for one, other in zip(surrogate, errors, strict=True)])
    assert told["policy/clipfrac_avg"].tolist() == [1, 0, 0]
    assert told["val/clipfrac_avg"].tolist() == [1, 0, 0]


def test_the_coefficient_goes_towards_the_target() -> None:
    options = Ppo.model_validate({"klTarget": 4, "klHorizon": 100})
    found = [adapted(0.5, kl=kl, answers=20, options=options) for kl in (4, 4.4, 40, 0)]
    assert found == pytest.approx([0.5, 0.5 * (1 + 0.1 * 0.2), 0.5 * (1 + 0.2 * 0.2), 0.5 * (1 - 0.2 * 0.2)])
    assert adapted(0.5, kl=9, answers=20, options=Ppo.model_validate({"klTarget": 0})) == 0.5


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_values_are_of_the_hidden_states_that_the_next_token_is_told_from(layout: Any) -> None:
    tuned = load(tiny_model(layout), a_job(method={"tuner": "full"}).spec)
    tuned.head = value_head(tuned)
    with torch.no_grad():
        tuned.head.weight.copy_(torch.randn(tuned.head.weight.shape, generator=torch.Generator().manual_seed(1)))
    rows = [Row(np.array(ids), np.array(labels), [len(ids)]) for ids, labels in documents(3, longest=16)]
    batch = micro_batch(rows, tuned.device)
    tuned.network.eval()
    with torch.no_grad(), isolated(batch.segments):
        _, _, found = valued(tuned, batch, 1.0)
    expected = []
    for row in rows:
        with torch.no_grad():
            hidden = tuned.network.base_model(input_ids=torch.from_numpy(row.input_ids)[None]).last_hidden_state[0]
            expected.append(tuned.head(hidden)[np.flatnonzero(row.labels != IGNORED) - 1, 0])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_rewards_rise_and_the_divergence_is_held(tmp_path: Path) -> None:
    """The target holds it: without, the model goes further."""
    common = {"maxNewTokens": 6, "epochs": 3}
    held, outcome, _ = attempt(tmp_path / "held", job(common | {"klCoefficient": 0.1, "klTarget": 5, "klHorizon": 40}, RISING))
    free, _, _ = attempt(tmp_path / "free", job(common | {"klCoefficient": 0, "klTarget": 0}, RISING))
    for lines in (held, free):
        rewards = [line["reward"] for line in lines]
        assert np.mean(rewards[-4:]) > np.mean(rewards[:3]) + 0.4
        assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    ends = [float(np.mean([line["objective/kl"] for line in lines[-4:]])) for lines in (held, free)]
    assert ends[0] < 10
    assert ends[0] < 0.8 * ends[1]
    assert held[-1]["objective/kl_coefficient"] > held[0]["objective/kl_coefficient"] == 0.1
    assert set(held[0]) >= {
        "objective/entropy",
        "policy/clipfrac_avg",
        "policy/approxkl_avg",
        "val/loss",
        "rewards/regex",
        "rewards/regex-2",
    }
    assert held[0]["updates"] == 3
    (weights,) = Path(outcome.artifact.uri).glob("*.safetensors")
    assert not [name for name in load_file(weights) if "head" in name], "what values answers is not published"


def test_passes_end_once_the_policy_has_changed_enough(tmp_path: Path) -> None:
    short = RISING | {"maxSteps": 1, "batchSize": 4}
    found = []
    for number, options in enumerate(({"epochs": 4, "klLimit": 1e-9}, {"epochs": 2}, {"epochs": 4})):
        _, outcome, _ = attempt(tmp_path / str(number), job({"maxNewTokens": 4, "missingEndPenalty": 1} | options, short))
        found.append(weights_digest(outcome))
    assert found[0] == found[1] != found[2], "nothing has changed in the first pass yet"
