"""Losses, metrics and gradients over preferences are TRL's, to rounding: one process of TRL computes all cases."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import trl_preferences
from tests.support.models import Layout, tiny_model
from tests.support.preferences import accumulated, adapted
from tests.support.training import IGNORED, Document, Row, a_job, marked, pairs
from tests.support.trl_preferences import METRICS
from tunewright_trainer.train.model import Tuned, load
from tunewright_trainer.train.objective import objective_of

PAIRS = pairs(6)
MARKED = marked(4)[:-1]
KTO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")
REWARD_METRICS = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")


@dataclass(frozen=True)
class Case:
    """Options of `method` and those of TRL's trainer that mean the same."""

    method: Mapping[str, Any]
    trl: Mapping[str, Any]
    layout: Layout = "llama"

    @property
    def objective(self) -> str:
        return str(self.method["objective"])


def dpo(options: Mapping[str, Any] = MappingProxyType({}), trl: Mapping[str, Any] = MappingProxyType({})) -> Case:
    return Case({"objective": "dpo", "dpo": {"beta": 0.3, **options}}, {"beta": 0.3, **trl})


def loss(name: str, options: Mapping[str, Any] = MappingProxyType({}), trl: Mapping[str, Any] = MappingProxyType({})) -> Case:
    return dpo({"loss": name, **options}, {"loss_type": [name], **trl})


SMOOTHED, SMOOTHED_TRL = {"labelSmoothing": 0.2}, {"label_smoothing": 0.2}
MIXED = [{"type": "sigmoid", "weight": 0.8}, {"type": "bco_pair", "weight": 0.2}, {"type": "sft"}, {"type": "aot_unpaired", "weight": 0.3}]
CASES = {
    **{
        name: loss(name)
        for name in (
            *("hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        )
    },
    **{f"{name}, smoothed": loss(name, SMOOTHED, SMOOTHED_TRL) for name in ("exo_pair", "robust", "aot", "aot_unpaired")},
    "discopop, hot": loss("discopop", {"discopopTau": 0.5}, {"discopop_tau": 0.5}),
    "tails that weigh less": dpo({"ldAlpha": 0.4}, {"ld_alpha": 0.4}),
    "forward KL": dpo({"fDivergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "Jensen-Shannon": loss("ipo", {"fDivergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    "alpha divergence": loss(
        "hinge",
        {"fDivergence": "alpha_divergence", "fAlphaDivergenceCoef": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "several": dpo(
        {"losses": MIXED, "ldAlpha": 0.4},
        {"loss_type": [one["type"] for one in MIXED], "loss_weights": [one.get("weight", 1) for one in MIXED], "ld_alpha": 0.4},
    ),
    "dpo": Case({"objective": "dpo", "dpo": {"beta": 0.3}}, {"beta": 0.3}),
    "dpo of another family": Case({"objective": "dpo", "dpo": {"beta": 0.3}}, {"beta": 0.3}, "gpt2"),
    **{
        f"kto, {name}": Case({"objective": "kto", "kto": {"beta": 0.3, **options}}, {"beta": 0.3, **trl})
        for name, options, trl in (
            ("weighed", {"desirableWeight": 1.5, "undesirableWeight": 0.5}, {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
            ("compared with nothing", {"loss": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
        )
    },
    "kto of another family": Case({"objective": "kto", "kto": {"beta": 0.3}}, {"beta": 0.3}, "gpt2"),
    "reward": Case({"objective": "reward"}, {}),
    "reward around 0": Case(
        {"objective": "reward", "reward": {"centerRewardsCoefficient": 0.5}}, {"center_rewards_coefficient": 0.5}, "gpt2"
    ),
}


def test_losses_metrics_and_gradients_are_those_of_trl(tmp_path: Path) -> None:
    tuned = {name: _model(case, tmp_path / str(number)) for number, (name, case) in enumerate(CASES.items())}
    folders = {name: tmp_path / str(number) for number, name in enumerate(CASES)}
    trl_preferences.compute(list(folders.values()))
    for name, case in CASES.items():
        expected, gradients = json.loads((folders[name] / "metrics.json").read_text()), load_file(folders[name] / "gradient.safetensors")
        objective = objective_of(a_job(method=case.method).spec, tuned[name])
        for each in (6, 2):
            found, gradient = accumulated(tuned[name], MARKED if case.objective == "kto" else PAIRS, objective, each=each)
            assert found == pytest.approx(expected, abs=1e-5), f"{name}, {each} at once"
            wanted = torch.cat([gradients[weight].flatten() for weight in tuned[name].trainable])
            assert wanted.abs().max() > 1e-4, name
            torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4, msg=lambda told, name=name: f"{name}: {told}")


def _model(case: Case, folder: Path) -> Tuned:
    """The model of a case, and in the folder what TRL shall compute: the same ids with the same weights."""
    folder.mkdir()
    told: dict[str, Any] = {"objective": case.objective, "options": dict(case.trl), "model": str(tiny_model(case.layout))}
    if case.objective == "reward":
        tuned = load(tiny_model(case.layout), a_job(method={"objective": "reward", "tuner": "full"}).spec)
        with torch.no_grad():
            tuned.network.score.weight.mul_(20)  # rewards that differ, as of a trained judge
        told |= {"metrics": REWARD_METRICS, "rows": [_as_documents(*row) for row in PAIRS]}
    else:
        tuned = adapted(case.layout)
        lora = a_job().spec.method.lora
        rows, told_of = ([_as_pair(*row) for row in PAIRS], METRICS) if case.objective == "dpo" else (_as_marked(MARKED), KTO_METRICS)
        told |= {"metrics": told_of, "rows": rows, "rank": lora.rank, "alpha": lora.alpha}
    save_file({name: weight.detach() for name, weight in tuned.trainable.items()}, folder / "weights.safetensors")
    (folder / "case.json").write_text(json.dumps(told))
    return tuned


def _as_pair(chosen: Document, rejected: Document) -> dict[str, Sequence[int]]:
    prompt = sum(label == IGNORED for label in chosen[1])
    return {"prompt_ids": chosen[0][:prompt], "chosen_ids": chosen[0][prompt:], "rejected_ids": rejected[0][prompt:]}


def _as_marked(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """With the answer of the row before as TRL's KL completion, as its own preparation has it for one batch."""
    read = []
    for chosen, rejected in rows:
        ids, labels = chosen if chosen[0] else rejected
        prompt = sum(label == IGNORED for label in labels)
        read.append({"prompt_ids": ids[:prompt], "completion_ids": ids[prompt:], "label": bool(chosen[0])})
    return [row | {"KL_completion_ids": read[at - 1]["completion_ids"]} for at, row in enumerate(read)]


def _as_documents(chosen: Document, rejected: Document) -> dict[str, Sequence[int]]:
    return {"chosen_ids": chosen[0], "rejected_ids": rejected[0]}
