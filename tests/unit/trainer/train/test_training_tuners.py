"""Every tuner: it learns, goes on exactly where it was stopped, and what it publishes is read by PEFT and transformers themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig

from tests.support.models import Layout, tiny_model
from tests.support.training import (
    IGNORED,
    Document,
    Row,
    a_job,
    documents,
    history,
    packed,
    publish_data,
    stop_in_step,
    train_here,
    weights_digest,
)
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.method import WHOLE, Tuner
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import adalora
from tunewright_trainer.train.model import load


def answered(count: int, *, seed: int = 0) -> list[Document]:
    """Random prompts whose answers are made of two tokens only, which even a tuner of few weights can learn."""
    made = []
    for ids, labels in documents(count, seed=seed, longest=16):
        half = labels.count(IGNORED)
        answer = [token % 2 for token in ids[half:]]
        made.append((ids[:half] + answer, [IGNORED] * half + answer))
    return made


ROWS = packed(answered(8), 2)
VALIDATION = packed(answered(2, seed=9), 1)
SHORT: dict[str, Any] = {"batchSize": 2, "epochs": 2, "learningRate": 0.02, "scheduler": "constant", "warmupRatio": 0}

# Options with which the tiny model can be tuned: PEFT's own sizes are for large ones.
OPTIONS: dict[Tuner, dict[str, Any]] = {
    Tuner.BOFT: {"boft_block_size": 4},
    Tuner.C3A: {"block_size": 8},
    Tuner.FOURIERFT: {"n_frequency": 50},
    Tuner.MISS: {"r": 4},
    Tuner.OFT: {"oft_block_size": 4},
    Tuner.P_TUNING: {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    Tuner.PREFIX: {"num_virtual_tokens": 4},
    Tuner.PROMPT: {"num_virtual_tokens": 4},
    Tuner.PSOFT: {"r": 4},
    Tuner.ROAD: {"group_size": 8},
    Tuner.SHIRA: {"r": 4},
    Tuner.VBLORA: {"num_vectors": 16, "vector_length": 16},
    Tuner.WAVEFT: {"n_frequency": 64},
}
# Few weights, or weights behind a gate that begins closed: they need larger steps.
RATES: dict[Tuner, float] = {Tuner.ADAPTION_PROMPT: 0.1, Tuner.UNILORA: 0.1}
LAYOUTS: dict[Tuner, Layout] = {Tuner.BITFIT: "gpt2"}
TUNERS = [tuner for tuner in Tuner if tuner is not Tuner.HINT]  # which is for encoder-decoders


FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)


def a_tuning(tuner: Tuner, *, options: dict[str, Any] | None = None, **parts: Any) -> Any:
    method = {"tuner": tuner.value, "options": options if options is not None else OPTIONS.get(tuner, {})}
    numbers = SHORT | {"learningRate": RATES.get(tuner, SHORT["learningRate"])}
    return a_job(tiny_model(LAYOUTS.get(tuner, "llama")), method=method, **{"hyperparameters": numbers, **parts})


def with_data(work: Path, name: str) -> LocalStore:
    store = LocalStore(work / name)
    publish_data(store, work, train=ROWS, validation=VALIDATION)
    return store


@torch.no_grad()
def loss_elsewhere(network: Any, rows: list[Row]) -> float:
    """The loss of documents, one by one, as any other program computes it."""
    losses = []
    for ids, labels in (document for row in rows for document in row):
        logits = network(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
        losses.append(cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="none", ignore_index=-100))
    learned = sum(label != -100 for row in rows for _, labels in row for label in labels[1:])
    return float(torch.cat(losses).sum()) / learned


def opened_elsewhere(tuner: Tuner, artifact: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if tuner in WHOLE:
        return AutoModelForCausalLM.from_pretrained(artifact).eval()
    options = {"quantization_config": FOUR_BITS, "device_map": {"": "cpu"}} if tuner is Tuner.QLORA else {}
    base = AutoModelForCausalLM.from_pretrained(tiny_model(LAYOUTS.get(tuner, "llama")), **options)
    return PeftModel.from_pretrained(base, artifact).eval()


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_learns_resumes_exactly_and_is_read_elsewhere(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_tuning(tuner)
    undisturbed = with_data(tmp_path, "undisturbed")
    outcome = train_here(job, undisturbed, tmp_path)
    told = [line["eval_loss"] for line in history(undisturbed) if "eval_loss" in line]
    losses = [line["loss"] for line in history(undisturbed) if "loss" in line]
    assert sum(losses[2:]) < sum(losses[:2]), "the second pass over the same rows is easier than the first"

    assert outcome.artifact is not None
    assert loss_elsewhere(opened_elsewhere(tuner, outcome.artifact.uri), VALIDATION) == pytest.approx(told[-1], abs=1e-4)

    store = with_data(tmp_path, "stopped")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(process.Stopped):
            train_here(job, store, tmp_path)
    resumed = train_here(job, store, tmp_path, attempt=2)
    assert resumed.resumed_from_step == 2
    assert weights_digest(resumed) == weights_digest(outcome)


REFUSED: dict[str, tuple[Tuner, dict[str, Any], str, str]] = {
    "an option that PEFT does not have": (
        Tuner.LOHA,
        {"rnak": 8},
        "spec.method.options.rnak",
        "rnak is no option of tuner loha; there are",
    ),
    "a rank of zero": (Tuner.LOHA, {"r": 0}, "spec.method.options", "positive integer"),
    "a rank in words": (Tuner.LOHA, {"r": "many"}, "spec.method.options.r", "valid integer"),
    "what the platform sets": (Tuner.LOHA, {"task_type": "SEQ_CLS"}, "spec.method.options.task_type", "set by the platform"),
    "lora's rank, twice": (Tuner.LORA, {"r": 8}, "spec.method.options.r", "spec.method.lora.rank"),
    "a beginning that changes the base": (
        Tuner.LORA,
        {"init_lora_weights": "pissa"},
        "spec.method.options.init_lora_weights",
        "change the base",
    ),
    "biases of the base": (Tuner.LORA, {"bias": "all"}, "spec.method.options.bias", "tuner bitfit"),
    "a layer that is not there": (
        Tuner.LOHA,
        {"target_modules": ["q_proj", "query"]},
        "spec.method.options.target_modules",
        "is called query",
    ),
    "a pattern that matches nothing": (Tuner.LOHA, {"target_modules": "query"}, "spec.method.options", "not found"),
    "ranks that never become fewer": (Tuner.ADALORA, {"init_r": 8}, "spec.method.options.target_r", "below init_r (8)"),
    "adalora's rank by lora's name": (Tuner.ADALORA, {"r": 4}, "spec.method.options.r", "init_r at the beginning"),
    "a run that is over before ranks are given away": (Tuner.ADALORA, {"tfinal": 3}, "spec.hyperparameters.maxSteps", "needs two steps"),
    "sizes that do not divide": (Tuner.C3A, {"block_size": 7}, "spec.method.options", "a factor of the input size"),
}


@pytest.mark.parametrize(("tuner", "options", "param", "words"), REFUSED.values(), ids=REFUSED)
def test_options_that_cannot_work_are_refused_by_name(
    tuner: Tuner, options: dict[str, Any], param: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as caught:
        train_here(a_tuning(tuner, options=options), with_data(tmp_path, "store"), tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, param)
    assert words in caught.value.message


def test_a_model_without_biases_cannot_train_them(tmp_path: Path) -> None:
    job = a_job(tiny_model("llama"), method={"tuner": "bitfit"}, hyperparameters=SHORT)
    with pytest.raises(Refusal, match="nothing in this model to train"):
        train_here(job, with_data(tmp_path, "store"), tmp_path)


def test_bitfit_changes_biases_and_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    outcome = train_here(a_tuning(Tuner.BITFIT), with_data(tmp_path, "store"), tmp_path)
    assert outcome.artifact is not None
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (tiny_model("gpt2"), outcome.artifact.uri))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith(".bias")}


def ranks_of(artifact: str) -> list[int]:
    from safetensors.torch import load_file

    return [len(weight) for name, weight in load_file(f"{artifact}/adapter_model.safetensors").items() if "lora_E" in name]


def test_adalora_ends_with_the_ranks_that_it_may_have_and_the_best_weights_with_their_own(tmp_path: Path) -> None:
    options = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 1, "orth_reg_weight": 1.0}
    store = with_data(tmp_path, "store")
    outcome = train_here(a_tuning(Tuner.ADALORA, options=options), store, tmp_path)
    assert outcome.artifact is not None
    ranks = ranks_of(outcome.artifact.uri)
    assert sum(ranks) == 2 * len(ranks)
    assert len({*ranks}) > 1, "all have the same, as if nothing had been weighed"
    first = SHORT | {"earlyStopping": {"enabled": True, "patience": 9, "minDelta": 9}}
    best = train_here(a_tuning(Tuner.ADALORA, options=options, hyperparameters=first), with_data(tmp_path, "best"), tmp_path)
    assert best.artifact is not None
    assert {*ranks_of(best.artifact.uri)} == {6}, "no rank was taken away yet"
    apart = [line["orthogonality_loss"] for line in history(store) if "loss" in line]
    assert apart == sorted(apart, reverse=True)


def test_the_regularisation_of_adalora_is_that_of_peft(tmp_path: Path) -> None:
    tuned = load(tiny_model("llama"), a_tuning(Tuner.ADALORA).spec, steps=10)
    assert tuned.peft is not None
    tokens = torch.tensor([[1, 2, 3, 4]])
    budget = adalora.budget_of(tuned.peft)
    assert budget is not None
    found = budget.regularise()["orthogonality_loss"]
    gradients = {name: weight.grad.clone() for name, weight in tuned.trainable.items() if weight.grad is not None}
    tuned.network.zero_grad()
    theirs = tuned.peft(input_ids=tokens, labels=tokens).loss
    ours = tuned.network(input_ids=tokens, labels=tokens).loss
    assert found == pytest.approx(float((theirs - ours).detach()), abs=1e-5)
    (theirs - ours).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, tuned.trainable[name].grad, atol=1e-6, rtol=1e-4)
