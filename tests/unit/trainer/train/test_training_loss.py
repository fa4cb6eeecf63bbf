"""The loss, against independent ways to compute it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from tests.support.models import Layout, tiny_model
from tests.support.training import IGNORED, Document, a_job, documents
from tunewright_trainer.train import attention, loss
from tunewright_trainer.train.data import MicroBatch, Row, grouped, micro_batch
from tunewright_trainer.train.model import Tuned, load

CPU = torch.device("cpu")


def rows_of(made: list[Document], *, each: int) -> list[Row]:
    groups = [made[start : start + each] for start in range(0, len(made), each)]
    return [_row(group) for group in groups]


def _row(group: list[Document]) -> Row:
    import numpy as np

    ids = np.array([token for ids, _ in group for token in ids], dtype=np.int64)
    labels = np.array([label for _, labels in group for label in labels], dtype=np.int64)
    return Row(ids, labels, [len(ids) for ids, _ in group])


def full(layout: Layout) -> Tuned:
    return load(tiny_model(layout), a_job(tiny_model(layout), method={"tuner": "full"}).spec)


def loss_and_gradient(tuned: Tuned, batches: list[MicroBatch], *, smoothing: float = 0.0) -> tuple[float, torch.Tensor]:
    """The loss of a whole accumulated batch, and its gradient as one vector."""
    tuned.network.zero_grad()
    tokens = sum(len(batch.targets) for batch in batches)
    total = sum(loss.backward(tuned, batch, share_of=tokens, smoothing=smoothing) for batch in batches)
    return total, torch.cat([weight.grad.flatten() for weight in tuned.trainable.values() if weight.grad is not None])


def plain_loss(folder: Path, made: list[Document], *, smoothing: float = 0.0) -> float:
    """The mean over all trained tokens, one document at a time, by the model as it comes and the formula written out."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for ids, labels in made:
        with torch.no_grad():
            scores = torch.log_softmax(network(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        for position, label in enumerate(labels[1:]):
            if label != IGNORED:
                total -= float((1 - smoothing) * scores[position, label] + smoothing * scores[position].mean())
                count += 1
    return total / count


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_formula(layout: Layout, smoothing: float) -> None:
    made = documents(6)
    found, _ = loss_and_gradient(full(layout), [micro_batch(rows_of(made, each=3), CPU)], smoothing=smoothing)
    assert found == pytest.approx(plain_loss(tiny_model(layout), made, smoothing=smoothing), abs=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_packed_is_unpacked(layout: Layout) -> None:
    made = documents(8, seed=1)
    tuned = full(layout)
    tuned.network.eval()
    alone = loss_and_gradient(tuned, [micro_batch([row], CPU) for row in rows_of(made, each=1)])
    together = loss_and_gradient(tuned, [micro_batch(rows_of(made, each=4), CPU)])
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    torch.testing.assert_close(together[1], alone[1], atol=1e-5, rtol=1e-4)


def test_accumulated_is_at_once_however_uneven_the_parts() -> None:
    rows = rows_of(documents(9, seed=2), each=1)
    tuned = full("llama")
    at_once = loss_and_gradient(tuned, [micro_batch(rows, CPU)])
    parts = [micro_batch(group, CPU) for group in grouped(rows, 4)]
    assert len(parts) == 3
    accumulated = loss_and_gradient(tuned, parts)
    assert accumulated[0] == pytest.approx(at_once[0], abs=1e-5)
    torch.testing.assert_close(accumulated[1], at_once[1], atol=1e-5, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradient() -> None:
    made = rows_of(documents(6, seed=3), each=3)
    job = a_job(method={"tuner": "full"}, hyperparameters={"gradientCheckpointing": True})
    tuned = load(tiny_model("llama"), job.spec)
    tuned.network.train()
    plain = full("llama")
    plain.network.train()
    found, expected = (loss_and_gradient(one, [micro_batch(made, CPU)]) for one in (tuned, plain))
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1])


def test_evaluation_counts_tokens_and_right_guesses() -> None:
    tuned = full("llama")
    tuned.network.eval()
    batch = micro_batch(rows_of(documents(3), each=3), CPU)
    with attention.documents(batch.segments):
        guesses = loss.forward(tuned, batch).argmax(dim=-1)
    again = replace(batch, targets=guesses)
    assert loss.evaluate(tuned, again)[1:] == (len(guesses), len(guesses))


def test_a_sliding_window_is_kept() -> None:
    attention.register()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
    )
    network: Any = MistralForCausalLM(config).eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        network.config._attn_implementation = "sdpa"
        expected = network(input_ids=ids, use_cache=False).logits
        network.config._attn_implementation = attention.NAME
        found = network(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
