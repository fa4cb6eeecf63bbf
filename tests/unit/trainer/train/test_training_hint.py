"""The hypernetwork of tuner hint: what it computes, whole attempts, and instructions that it never saw."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.support.models import byte_tokenizer, tiny_model
from tests.support.training import a_job, history, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import hint, loss
from tunewright_trainer.train.data import Padded, Row, SourceTarget, micro_batch
from tunewright_trainer.train.model import Tuned, load

CPU = torch.device("cpu")
END = 257
UNMEASURED = {"enabled": False}
SMALL = {"prefixTokens": 3, "adapterRank": 4, "hiddenSize": 16}
Instructed = tuple[list[int], list[int], list[int]]  # instruction, input, answer


def examples(count: int, *, seed: int = 0) -> list[Instructed]:
    """Random inputs of several lengths under one of three instructions, which say what comes before the end of each answer."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        told = int(rng.integers(0, 3))
        given = rng.integers(0, 20, size=int(rng.integers(3, 12))).tolist()
        made.append(([50 + told] * (told + 1) + [END], [*given, END], [100 + told, END]))
    return made


def rows_of(made: list[Instructed]) -> list[Row]:
    return [SourceTarget(np.array(given), np.array(answer), [len(given)], np.array(told)) for told, given, answer in made]


def tuned(*, options: dict[str, Any] = SMALL, **parts: Any) -> Tuned:
    """A tiny T5 with a hypernetwork that does not begin at zero."""
    made = load(tiny_model("t5"), a_job(method={"tuner": "hint", "hint": options}, evaluation=UNMEASURED, **parts).spec)
    torch.manual_seed(1)
    with torch.no_grad():
        for generator in (made.network.hypernetwork.prefix, made.network.hypernetwork.adapter):
            generator[-1].weight.normal_(std=0.3)
    return made


def loss_and_gradient(one: Tuned, groups: list[list[Row]]) -> tuple[float, torch.Tensor]:
    one.network.zero_grad()
    tokens = sum(row.targets for rows in groups for row in rows)
    total = sum(loss.backward(one, micro_batch(rows, CPU), share_of=tokens, smoothing=0.0) for rows in groups)
    return total, torch.cat([weight.grad.flatten() for weight in one.trainable.values() if weight.grad is not None])


def test_an_instruction_is_read_once_for_all_of_its_rows() -> None:
    batch = micro_batch(rows_of([([5, 6], [1], [2]), ([7], [1, 1], [3]), ([5, 6], [4], [4])]), CPU)
    assert isinstance(batch, Padded)
    assert batch.instructions is not None
    assert batch.of_instruction is not None
    assert (batch.instructions.tolist(), batch.of_instruction.tolist()) == ([[5, 6], [7, -1]], [0, 1, 0])


@pytest.mark.parametrize("fusion", [True, False])
def test_neither_padding_nor_accumulation_changes_what_is_computed(fusion: bool) -> None:
    one = tuned(options=SMALL | {"fusion": fusion})
    rows = rows_of(examples(7))
    alone, together = (loss_and_gradient(one, groups) for groups in ([[row] for row in rows], [rows]))
    assert together[0] == pytest.approx(alone[0], abs=1e-6)
    torch.testing.assert_close(together[1], alone[1], atol=1e-5, rtol=1e-4)


def test_only_the_hypernetwork_learns_and_every_part_of_it() -> None:
    one = tuned()
    loss_and_gradient(one, [rows_of(examples(4))])
    assert all(name.startswith("hypernetwork.") for name in one.trainable)
    dead = [name for name, weight in one.trainable.items() if weight.grad is None or not weight.grad.any()]
    assert dead == []


def test_what_is_written_for_a_layer_changes_what_that_layer_computes() -> None:
    """Prefix and adapter, in encoder and decoder: without one of them the loss is another."""
    one = tuned()
    rows = rows_of(examples(4))
    found = {loss_and_gradient(one, [rows])[0]}
    plain = hint._use
    for layer, part in itertools.product(range(4), ("values", "up")):

        def without(network: Any, written: Any, layer: int = layer, part: str = part) -> None:
            parts = list(written)
            if parts[layer] is not None:
                parts[layer] = hint.Written(**(vars(parts[layer]) | {part: torch.zeros_like(getattr(parts[layer], part))}))
            plain(network, parts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hint, "_use", without)
            found.add(round(loss_and_gradient(one, [rows])[0], 6))
    assert len(found) == 9


def test_recomputed_activations_give_the_same_gradient() -> None:
    rows = rows_of(examples(4))
    found, expected = tuned(hyperparameters={"gradientCheckpointing": True}), tuned()
    for one in (found, expected):
        one.network.train()
    results = [loss_and_gradient(one, [rows]) for one in (found, expected)]
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


def publish_rows(store: LocalStore, work: Path, train: list[Instructed], validation: list[Instructed]) -> None:
    instructions = [one[0] for one in train], [one[0] for one in validation]
    publish_data(store, work, train=[[one[1:]] for one in train], validation=[[one[1:]] for one in validation], instructions=instructions)


def a_hint_job(model: Path, **wanted: Any) -> PodConfig:
    return a_job(
        model, method={"tuner": "hint", "hint": SMALL}, evaluation=UNMEASURED, hyperparameters=wanted, checkpointing={"everySteps": 10_000}
    )


def test_a_stopped_run_goes_on_and_what_is_published_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_hint_job(tiny_model("t5"), batchSize=8, maxSteps=12, learningRate=0.02, warmupRatio=0)
    train, validation = examples(32), examples(6, seed=3)
    stores = [LocalStore(tmp_path / name) for name in ("whole", "stopped")]
    for store in stores:
        publish_rows(store, tmp_path, train, validation)
    whole = train_here(job, stores[0], tmp_path)
    losses = [line["loss"] for line in history(stores[0]) if "loss" in line]
    assert losses[-1] < losses[0] - 1
    with monkeypatch.context() as patch:
        stop_in_step(patch, 5)
        with pytest.raises(process.Stopped):
            train_here(job, stores[1], tmp_path)
    resumed = train_here(job, stores[1], tmp_path, attempt=2)
    assert resumed.resumed_from_step == 5
    assert weights_digest(resumed) == weights_digest(whole)

    assert whole.artifact is not None
    assert whole.artifact.kind == "adapter"
    folder = Path(whole.artifact.uri)
    card = (folder / "README.md").read_text()
    assert "from tunewright_trainer.train import hint" in card
    assert "Served by: no engine yet" in card
    assert ("library_name: tunewright" in card, whole.artifact.forms[0].servability) == (True, "")
    network = hint.load(tiny_model("t5"), folder)
    told, given, _ = validation[0]
    batch = micro_batch(rows_of(validation), CPU)
    assert isinstance(batch, Padded)
    evaluated = [line["eval_loss"] for line in history(stores[0]) if "eval_loss" in line][-1]
    loaded = Tuned(network=network, peft=None, device=CPU, compute=torch.float32, keeps_logits=False)
    summed, _, tokens = loss.evaluate(loaded, batch)
    assert summed / tokens == pytest.approx(evaluated, abs=1e-4)
    (alone,), both = hint.generate(network, [told], [given]), hint.generate(network, [told, told], [given, given[:2] + given])
    assert both[0][: len(alone)] == alone


def test_bart_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        load(tiny_model("bart"), a_job(method={"tuner": "hint"}, evaluation=UNMEASURED).spec)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, "spec.method.tuner")


LETTERS = range(10)
POSITIONS, ENDINGS = (20, 21), range(30, 38)
UNSEEN = {(20, 31), (20, 34), (21, 32), (21, 37)}


def asked(count: int, *, unseen: bool, seed: int) -> list[Instructed]:
    """Instructions of two parts: which letter of the input to take, and which one to write behind it. Some pairs of parts are never trained on."""
    rng = random.Random(seed)
    pairs = [pair for pair in itertools.product(POSITIONS, ENDINGS) if (pair in UNSEEN) is unseen]
    made = []
    for _ in range(count):
        given, (position, ending) = [rng.choice(LETTERS), rng.choice(LETTERS)], rng.choice(pairs)
        made.append(([position, ending, END], [*given, END], [given[position - POSITIONS[0]], ending - ENDINGS[0], END]))
    return made


def a_model_that_copies(folder: Path) -> Path:
    """A T5 of one layer that was taught to write down what it reads."""
    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": END, "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "dropout_rate": 0}
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **ids))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(150):
        letters = torch.from_numpy(rng.integers(0, len(LETTERS), size=(32, 2)))
        ends = torch.full((32, 1), END)
        found = network(input_ids=torch.cat([letters, ends], 1), labels=torch.cat([letters, ends], 1)).loss
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def share_right(network: Any, questions: list[Instructed]) -> float:
    """Exact matches of the model with its hypernetwork."""
    found = hint.generate(network, [told for told, _, _ in questions], [given for _, given, _ in questions], longest=3)
    return sum(made[1 : 1 + len(answer)] == answer for made, (_, _, answer) in zip(found, questions, strict=True)) / len(questions)


def share_right_untuned(folder: Path, questions: list[Instructed]) -> float:
    """Exact matches of the base, which reads the instruction in front of the input."""
    network = T5ForConditionalGeneration.from_pretrained(folder).eval()
    right = 0
    for told, given, answer in questions:
        made = network.generate(input_ids=torch.tensor([told[:-1] + given]), max_new_tokens=3, do_sample=False)[0, 1:].tolist()
        right += made[: len(answer)] == answer
    return right / len(questions)


@pytest.mark.parametrize("seed", [11, 12])
def test_instructions_that_were_never_seen_are_followed(tmp_path: Path, seed: int) -> None:
    """With seeds 0, 2 and 3, by which the settings were chosen, the hypernetwork was right in 0.72 to 0.94 of 100 questions and the base in 0.07 to 0.12;
    the bounds were set then, before these seeds were run."""
    base, store = a_model_that_copies(tmp_path / "base"), LocalStore(tmp_path / "store")
    publish_rows(store, tmp_path, asked(3000, unseen=False, seed=10 * seed + 1), [])
    wanted = {"batchSize": 32, "maxSteps": 300, "learningRate": 0.003, "warmupRatio": 0.1, "seed": seed}
    job = a_job(
        base,
        method={"tuner": "hint", "hint": {"prefixTokens": 8, "adapterRank": 16, "hiddenSize": 64}},
        evaluation=UNMEASURED,
        hyperparameters=wanted,
    )
    artifact = train_here(job, store, tmp_path).artifact
    assert artifact is not None
    questions = asked(100, unseen=True, seed=10 * seed + 2)
    found, before = share_right(hint.load(base, Path(artifact.uri)), questions), share_right_untuned(base, questions)
    assert before <= 0.25  # some of what it copies happens to be right
    assert found >= before + 0.4
