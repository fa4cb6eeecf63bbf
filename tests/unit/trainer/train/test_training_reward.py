"""Reward models: whole attempts on tiny models, and what others read of them. Beside TRL: test_training_golden.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import tiny_model
from tests.support.preferences import CPU, NO_DROPOUT, rows_of
from tests.support.training import a_job, history, pairs, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import data
from tunewright_trainer.train.reward_model import load_reward_model, padding_of, scores

RATES = {"full": 0.01, "lora": 0.003}


def job(tuner: str = "lora", **parts: Any) -> PodConfig:
    parts["method"] = {"objective": "reward", "tuner": tuner} | parts.get("method", {})
    return a_job(**parts)


def published(outcome: Outcome) -> Path:
    assert outcome.artifact is not None
    assert outcome.artifact.kind == "reward"
    return Path(outcome.artifact.uri)


@pytest.mark.parametrize("tuner", RATES)
def test_what_is_preferred_is_learned_and_plain_transformers_gives_the_same_rewards(tmp_path: Path, tuner: str) -> None:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=pairs(96), validation=pairs(8, seed=9))
    options = {"batchSize": 8, "epochs": 4, "learningRate": RATES[tuner], "warmupRatio": 0}
    outcome = train_here(job(tuner, hyperparameters=options, method={"lora": NO_DROPOUT if tuner == "lora" else {}}), store, tmp_path)
    lines = history(store)
    told, evaluated = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    names = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    assert set(told[0]) >= {"step", "grad_norm", *names}
    assert evaluated[-1].keys() == {"step", "eval_loss", *(f"eval_{name}" for name in names)}
    assert np.mean([line["accuracy"] for line in told[-4:]]) > 0.9
    assert evaluated[-1]["eval_accuracy"] > 0.9
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert told[-1]["min_reward"] < told[-1]["mean_reward"] < told[-1]["max_reward"]

    folder = published(outcome)
    card = (folder / "README.md").read_text()
    assert "A reward model: it gives no answers" in card
    assert "pipeline_tag: text-classification" in card
    batch = data.micro_batch(rows_of(pairs(5, seed=3)), CPU)
    own = scores(load_reward_model(folder, device=CPU, dtype=torch.float32), batch)
    assert own.shape == (10,)
    torch.testing.assert_close(_plain(folder, batch), own, atol=1e-4, rtol=1e-4)
    if tuner == "lora":
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        base = AutoModelForSequenceClassification.from_pretrained(tiny_model("llama"), num_labels=1, pad_token_id=padding_of(folder)[0])
        beside = PeftModel.from_pretrained(base, folder.parent / "adapter")
        torch.testing.assert_close(_plain(folder, batch, beside), own, atol=1e-4, rtol=1e-4)
    else:
        assert not (folder.parent / "adapter").exists()


@torch.no_grad()
def _plain(folder: Path, batch: data.MicroBatch, network: Any = None) -> torch.Tensor:
    """Rewards of a padded batch by nothing of ours."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = network or AutoModelForSequenceClassification.from_pretrained(folder)
    assert network.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [document.input_ids.tolist() for document in batch.documents]
    rewards: torch.Tensor = network.eval()(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]
    return rewards


@pytest.mark.parametrize("tuner", RATES)
def test_a_stopped_run_goes_on_at_the_exact_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuner: str) -> None:
    options = {"batchSize": 4, "epochs": 2, "learningRate": 0.01, "earlyStopping": {"enabled": True}}
    config = job(tuner, hyperparameters=options, checkpointing={"everySteps": 100}, output={"formats": ["merged"]})
    store, undisturbed = LocalStore(tmp_path / "store"), LocalStore(tmp_path / "undisturbed")
    for one in (store, undisturbed):
        publish_data(one, tmp_path, train=pairs(12), validation=pairs(3, seed=9))
    expected = train_here(config, undisturbed, tmp_path)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(process.Stopped):
            train_here(config, store, tmp_path)
    outcome = train_here(config, store, tmp_path, attempt=2)
    assert (outcome.resumed_from_step, outcome.reached_step) == (3, 6)
    assert weights_digest(outcome) == weights_digest(expected)
    assert not (published(outcome).parent / "adapter").exists()


def test_the_head_begins_as_the_seed_says_and_a_reward_model_goes_on_with_its_own(tmp_path: Path) -> None:
    from tunewright_trainer.train.model import load

    heads = [load(tiny_model("llama"), job("full", hyperparameters={"seed": seed}).spec).network.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2])
    assert 0.01 < float(heads[0].detach().std()) < 0.03
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=pairs(4))
    folder = published(train_here(job("full", hyperparameters={"maxSteps": 1, "learningRate": 0.1}), store, tmp_path))
    again = load(folder, job("full", model=folder).spec).network.score.weight
    assert torch.equal(again, load_file(folder / "model.safetensors")["score.weight"])


def test_the_padding_is_a_token_that_texts_do_not_end_with(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("gpt2"), base)
    assert padding_of(base)[1] == "<|pad|>"
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"pad_token": "<|im_end|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert padding_of(base)[1] == "<|begin|>"
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=pairs(4))
    folder = published(train_here(job("full", model=base, hyperparameters={"maxSteps": 1}), store, tmp_path))
    end = json.loads((base / "config.json").read_text())["eos_token_id"]
    rows = rows_of([[([5, 6, 7, end], [5, 6, 7, end])], [([5, end], [5, end])]])
    batch = data.micro_batch(rows, CPU)
    own = scores(load_reward_model(folder, device=CPU, dtype=torch.float32), batch)
    torch.testing.assert_close(_plain(folder, batch), own, atol=1e-5, rtol=1e-4)
    without_end = data.micro_batch(rows_of([[([5, 6, 7], [5, 6, 7])]]), CPU)
    assert not torch.allclose(scores(load_reward_model(folder, device=CPU, dtype=torch.float32), without_end)[0], own[0])


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    wide = tmp_path / "wide"
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_model("llama"), num_labels=3)).save_pretrained(wide)
    for folder, said in ((tiny_model("llama"), "lack score.weight"), (wide, "gives 3 numbers"), (tmp_path, "cannot be loaded")):
        with pytest.raises(Refusal, match=said) as caught:
            load_reward_model(folder, device=CPU, dtype=torch.float32)
        assert (caught.value.code, caught.value.param) == (FailureCode.MODEL_UNSUPPORTED, "spec.method.rewardModel")
