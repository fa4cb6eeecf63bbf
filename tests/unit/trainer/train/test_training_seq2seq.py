"""Encoder-decoders: the loss, whole attempts, and what is published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.support.models import Layout, tiny_model
from tests.support.training import IGNORED, a_job, history, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import Architecture
from tunewright_crds.pod import PodConfig
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import loss
from tunewright_trainer.train.data import Padded, Row, SourceTarget, grouped, micro_batch
from tunewright_trainer.train.model import Tuned, load

CPU = torch.device("cpu")
LAYOUTS: list[Layout] = ["t5", "bart"]
SHORT = {"batchSize": 4, "epochs": 2, "learningRate": 0.01}
END = 257


def sequences(count: int, *, seed: int = 0, longest: int = 30) -> list[tuple[list[int], list[int]]]:
    """Random sources of bytes, each with a target that is its first tokens and the end."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        source = rng.integers(0, 20, size=int(rng.integers(4, longest))).tolist()
        made.append((source, [*source[: int(rng.integers(2, 8))], END]))
    return made


def rows_of(made: list[tuple[list[int], list[int]]]) -> list[Row]:
    return [SourceTarget(np.array(source), np.array(target), [len(source)]) for source, target in made]


def full(layout: Layout, **parts: Any) -> Tuned:
    return load(tiny_model(layout), a_job(tiny_model(layout), method={"tuner": "full"}, **parts).spec)


def plain(layout: Layout) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(tiny_model(layout), dtype=torch.float32).eval()


def loss_and_gradient(tuned: Tuned, groups: list[Any], *, smoothing: float = 0.0) -> tuple[float, torch.Tensor]:
    """The loss of a whole accumulated batch, and its gradient as one vector."""
    tuned.network.zero_grad()
    tokens = sum(row.targets for rows in groups for row in rows)
    total = sum(loss.backward(tuned, micro_batch(rows, CPU), share_of=tokens, smoothing=smoothing) for rows in groups)
    return total, torch.cat([weight.grad.flatten() for weight in tuned.trainable.values() if weight.grad is not None])


def test_sources_and_targets_stand_beside_one_another() -> None:
    batch = micro_batch(rows_of([([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]), CPU)
    assert isinstance(batch, Padded)
    assert batch.input_ids.tolist() == [[1, 2, 3], [6, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[4, 5, IGNORED], [7, 8, 9]]
    assert (batch.keep.tolist(), batch.targets.tolist(), batch.tokens) == ([0, 1, 3, 4, 5], [4, 5, 7, 8, 9], 12)


@pytest.mark.parametrize(
    ("micro_batch_size", "halvings", "groups"),
    [
        pytest.param("auto", 0, [2, 1], id="padding counts"),
        pytest.param("auto", 1, [1, 1, 1], id="halved"),
        pytest.param(2, 0, [2, 1], id="so many rows"),
    ],
)
def test_groups_are_of_like_lengths(micro_batch_size: int | str, halvings: int, groups: list[int]) -> None:
    rows = rows_of([([1] * 2000, [2] * 90), ([1] * 900, [2] * 900), ([1] * 1000, [2] * 10)])
    found = list(grouped(rows, micro_batch_size, halvings=halvings))
    assert [len(group) for group in found] == groups
    assert [len(row.input_ids) for group in found for row in group] == [900, 1000, 2000]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_transformers_own(layout: Layout) -> None:
    made = sequences(5)
    found, _ = loss_and_gradient(full(layout), [rows_of(made)])
    network, total, count = plain(layout), 0.0, 0
    for source, target in made:
        with torch.no_grad():
            total += len(target) * float(network(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss)
        count += len(target)
    assert found == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_padding_nor_accumulation_changes_what_is_computed(layout: Layout) -> None:
    rows = rows_of(sequences(7, seed=1))
    tuned = full(layout)
    alone, together = (loss_and_gradient(tuned, groups, smoothing=0.1) for groups in ([[row] for row in rows], [rows]))
    uneven = loss_and_gradient(tuned, [rows[:1], rows[1:]], smoothing=0.1)
    for other in (together, uneven):
        assert other[0] == pytest.approx(alone[0], abs=1e-6)
        torch.testing.assert_close(other[1], alone[1], atol=1e-6, rtol=1e-4)


def test_smoothing_is_that_of_the_formula() -> None:
    made = sequences(3, seed=2)
    found, _ = loss_and_gradient(full("t5"), [rows_of(made)], smoothing=0.2)
    network, total, count = plain("t5"), 0.0, 0
    for source, target in made:
        with torch.no_grad():
            scores = torch.log_softmax(network(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0], dim=-1)
        total -= sum(float(0.8 * scores[at, label] + 0.2 * scores[at].mean()) for at, label in enumerate(target))
        count += len(target)
    assert found == pytest.approx(total / count, abs=1e-5)


def test_recomputed_activations_give_the_same_gradient() -> None:
    rows = rows_of(sequences(4, seed=3))
    tuned, other = full("t5", hyperparameters={"gradientCheckpointing": True}), full("t5")
    for one in (tuned, other):
        one.network.train()
    found, expected = (loss_and_gradient(one, [rows]) for one in (tuned, other))
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return a_store(tmp_path, "store")


def a_store(work: Path, name: str) -> LocalStore:
    store = LocalStore(work / name)
    publish_data(store, work, train=[[one] for one in sequences(24)], validation=[[one] for one in sequences(6, seed=9)])
    return store


@pytest.mark.parametrize(("layout", "tuner"), [("t5", "lora"), ("t5", "full"), ("bart", "lora"), ("bart", "full")])
def test_a_stopped_run_goes_on_and_what_is_published_is_what_was_trained(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, tuner: str
) -> None:
    job = a_job(
        tiny_model(layout),
        method={"tuner": tuner},
        hyperparameters=SHORT | {"epochs": 10, "learningRate": 0.02},
        output={"formats": ["adapter", "merged"]},
        checkpointing={"everySteps": 100},
    )
    undisturbed = a_store(tmp_path, "undisturbed")
    whole = train_here(job, undisturbed, tmp_path)
    assert history(undisturbed)[-2]["loss"] < history(undisturbed)[0]["loss"] - 0.3
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        with pytest.raises(process.Stopped):
            train_here(job, store, tmp_path)
    resumed = train_here(job, store, tmp_path, attempt=2)
    assert resumed.resumed_from_step == 7
    assert weights_digest(resumed) == weights_digest(whole)

    assert whole.artifact is not None
    folder = Path(whole.artifact.uri)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert "AutoModelForSeq2SeqLM" in card
    assert ("AutoModelForCausalLM" in card, "vLLM" in card) == (False, False)
    assert whole.artifact.forms[0].servability == ("whole" if tuner == "full" else "transformers")
    source = torch.tensor([sequences(1, seed=4)[0][0]])
    if tuner == "full":
        answers = [answer(AutoModelForSeq2SeqLM.from_pretrained(folder), source)]
    else:
        from peft import PeftModel

        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
        answers = [
            answer(PeftModel.from_pretrained(plain(layout), folder), source),
            answer(AutoModelForSeq2SeqLM.from_pretrained(folder.with_name("merged")), source),
        ]
    torch.testing.assert_close(answers[0], answers[-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(answers[0], answer(plain(layout), source), atol=0.1)


@torch.no_grad()
def answer(network: Any, source: torch.Tensor) -> torch.Tensor:
    """Scores of what a model of transformers or PEFT writes, [tokens, vocabulary], token by token the likeliest."""
    made = network.eval().generate(
        input_ids=source, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    return torch.cat(made.scores).nan_to_num(neginf=0)


def job_with(parts: dict[str, Any]) -> PodConfig:
    architecture = parts.pop("architecture", "auto")
    config = a_job(**parts)
    model = config.spec.model.model_copy(update={"architecture": Architecture(architecture)})
    return config.model_copy(update={"spec": config.spec.model_copy(update={"model": model})})


REFUSED: dict[str, tuple[Layout, dict[str, Any], str]] = {
    "preferences": ("t5", {"method": {"objective": "dpo"}}, "spec.method.objective"),
    "virtual tokens": ("t5", {"method": {"tuner": "prompt"}}, "spec.method.tuner"),
    "gradients of low rank": (
        "bart",
        {"method": {"tuner": "full"}, "hyperparameters": {"optimizer": "galore"}},
        "spec.hyperparameters.optimizer",
    ),
    "a form for other programs": ("t5", {"output": {"formats": ["adapter", "gguf"]}}, "spec.output.formats"),
    "another architecture": ("bart", {"architecture": "causal"}, "spec.model.architecture"),
    "another architecture of a decoder": ("llama", {"architecture": "seq2seq"}, "spec.model.architecture"),
    "a layer that is not there": ("t5", {"method": {"lora": {"targetModules": "q_proj"}}}, "spec.method.lora.targetModules"),
}


@pytest.mark.parametrize(("layout", "parts", "param"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_field(layout: Layout, parts: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        load(tiny_model(layout), job_with(dict(parts)).spec)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, param)


def test_chosen_layers_only() -> None:
    tuned = load(tiny_model("t5"), a_job(tiny_model("t5"), method={"lora": {"targetModules": "q,v"}}).spec)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in tuned.trainable} == {"q", "v"}
