"""What tests of the objectives over preferences share."""

from collections.abc import Sequence

import numpy as np
import torch

from tests.support.models import Layout, tiny_model
from tests.support.training import Row, a_job
from tunewright_trainer.train import data, metrics
from tunewright_trainer.train.model import Tuned, load
from tunewright_trainer.train.objective import Coupled, Optimised, shares_of
from tunewright_trainer.train.world import World

CPU = torch.device("cpu")
NO_DROPOUT = {"dropout": 0}


def rows_of(made: Sequence[Row]) -> list[data.Row]:
    """Rows as training reads them."""
    return [_row(row) for row in made]


def _row(row: Row) -> data.Row:
    ids = np.array([token for ids, _ in row for token in ids], dtype=np.int64)
    labels = np.array([label for _, labels in row for label in labels], dtype=np.int64)
    lengths = [len(ids) for ids, _ in row]
    return data.Judged(ids, labels, [len(ids)], desirable=lengths[0] > 0) if 0 in lengths else data.Row(ids, labels, lengths)


def adapted(layout: Layout = "llama", *, objective: str = "dpo", seed: int = 1) -> Tuned:
    """A model whose adapter is no longer that of the beginning, so that it differs from its reference."""
    tuned = load(tiny_model(layout), a_job(method={"objective": objective, "lora": NO_DROPOUT}).spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.trainable.items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return tuned


def gradient(tuned: Tuned) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in tuned.trainable.values() if weight.grad is not None])


def accumulated(tuned: Tuned, made: Sequence[Row], objective: Optimised | Coupled, *, each: int) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics of a batch that goes through the model so many rows at once, and its gradient as one vector."""
    tuned.network.zero_grad()
    tuned.network.train()
    found: dict[str, float] = {}
    rows = rows_of(made)
    groups = list(data.grouped(rows, each))
    (shares,) = shares_of(objective, tuned, [groups], World())
    for group, share in zip(groups, shares, strict=True):
        found = metrics.added(found, objective.backward(tuned, data.micro_batch(group, CPU), share_of=share))
    return found, gradient(tuned)
