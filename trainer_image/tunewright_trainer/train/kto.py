"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): from answers each of which is marked as good or bad, without pairs.

Each row is an answer with its mark. A good answer shall gain more, and a bad one less, than answers do in the mean: the divergence of the model from its
reference, which is estimated by the answers of a batch under one another's prompts. The whole effective batch is one estimate, however it is split; a last batch of
one answer has none, and is compared with the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from tunewright_crds.preference import Kto as Options
from tunewright_crds.preference import KtoLoss
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import IGNORED, Judged, MicroBatch, Parts, Row, Rows, grouped, micro_batch, rows_of
from tunewright_trainer.train.dpo import likelihoods, reference, without_dropout
from tunewright_trainer.train.metrics import Measured, added
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reinforced import Reference
from tunewright_trainer.train.world import World


@dataclass(frozen=True)
class Whole:
    """What a micro-batch must know of its batch: how many answers are good and bad, and the divergence ``kl`` in nats."""

    good: int
    bad: int
    kl: float

    @property
    def rows(self) -> int:
        return self.good + self.bad


class Kto:
    """See `tunewright_trainer.train.objective.Coupled`."""

    def __init__(self, options: Options, before: Reference) -> None:
        self._options = options
        self._before = before

    def shares(self, tuned: Tuned, parts: Parts, world: World) -> Sequence[Sequence[Whole]]:
        """The divergence is estimated before the gradients, from the whole batch."""
        rows = rows_of(parts)
        good = sum(_is_good(row) for row in rows)
        at = len(rows_of(parts[: world.rank]))
        ratios = 0.0
        for group in parts[world.rank]:
            ratios += self._log_ratios(tuned, [(row, rows[number - 1]) for number, row in enumerate(group, start=at)])
            at += len(group)
        whole = Whole(good, len(rows) - good, self._divergence(sum(world.of_each(ratios)), len(rows)))
        return [[whole] * len(own) for own in parts]

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: Whole) -> Measured:
        """The loss is the mean over answers."""
        before = reference(self._before, batch)
        with documents(batch.segments):
            policy = likelihoods(tuned, batch).logps
            total, measured = self.measured(policy, before, _marks(batch), share_of)
            torch.autograd.backward(total)
        return measured

    @torch.no_grad()
    def evaluate(self, tuned: Tuned, rows: Rows, world: World) -> Measured:
        """All validation rows are one batch."""
        tuned.network.eval()

        def of(index: int) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
            batch = micro_batch([rows[index]], tuned.device)
            with documents(batch.segments):
                policy = likelihoods(tuned, batch).logps
            ratio = self._log_ratios(tuned, [(rows[index], rows[(index or len(rows)) - 1])])
            return ratio, policy.cpu(), reference(self._before, batch).cpu(), _marks(batch).cpu()

        found = world.together(range(len(rows)), lambda own: [of(index) for index in own])
        good = sum(int(marks.sum()) for _, _, _, marks in found)
        whole = Whole(good, len(rows) - good, self._divergence(sum(ratio for ratio, _, _, _ in found), len(rows)))
        measured = reduce(added, (self.measured(policy, before, marks, whole)[1] for _, policy, before, marks in found))
        return {f"eval_{name}": value for name, value in measured.items()}

    def measured(self, policy: torch.Tensor, before: torch.Tensor, good: torch.Tensor, whole: Whole) -> tuple[torch.Tensor, Measured]:
        """The share of these answers in the loss of the whole batch, and in TRL's metrics. Log-probabilities [answers] by model and reference, and marks [answers]."""
        beta, signs = self._options.beta, torch.where(good, 1.0, -1.0)
        weights = torch.where(good, self._options.desirable_weight, self._options.undesirable_weight)
        rewards = beta * (policy - before)
        # Of apo_zero_unpaired (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7) the kl is 0.
        each = weights * (1 - torch.sigmoid(signs * (rewards - beta * whole.kl)))
        told = {"loss": float(each.detach().sum()) / whole.rows, "kl": whole.kl * len(policy) / whole.rows}
        for values, name in ((rewards.detach(), "rewards"), (policy.detach(), "logps")):
            of_good, of_bad = float(values[good].sum()) / max(1, whole.good), float(values[~good].sum()) / max(1, whole.bad)
            told |= ({f"{name}/chosen": of_good} if whole.good else {}) | ({f"{name}/rejected": of_bad} if whole.bad else {})
        if whole.good and whole.bad:
            told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
        return each.sum() / whole.rows, told

    def _divergence(self, ratios: float, rows: int) -> float:
        """Of the sum of the log-ratios: their mean, and at least 0. One row by itself has none."""
        return max(0.0, ratios / rows) if rows > 1 else 0.0

    @torch.no_grad()
    def _log_ratios(self, tuned: Tuned, pairs: Sequence[tuple[Row, Row]]) -> float:
        """Sum over the pairs: how much likelier than before is the answer of the second row under the prompt of the first."""
        if self._options.loss is KtoLoss.APO_ZERO_UNPAIRED:
            return 0.0
        most = getattr(tuned.network.config, "max_position_embeddings", None)
        total = 0.0
        for group in grouped([_mixed(row, other, most) for row, other in pairs], "auto"):
            batch = micro_batch(group, tuned.device)
            with documents(batch.segments), without_dropout(tuned.network):
                policy = likelihoods(tuned, batch).logps
            total += float((policy - reference(self._before, batch)).sum())
        return total


def _mixed(row: Row, other: Row, most: int | None) -> Row:
    """The prompt of a row with the answer of another, of at most so many tokens."""
    prompt, answer = row.input_ids[: _start(row)], other.input_ids[_start(other) :]
    ids = np.concatenate([prompt, answer])
    labels = np.concatenate([np.full(len(prompt), IGNORED, dtype=np.int64), other.labels[_start(other) :]])
    return Row(ids[:most], labels[:most], [len(ids[:most])])


def _start(row: Row) -> int:
    """Where what is learned begins; nothing predicts a first token."""
    return max(1, int(np.argmax(row.labels != IGNORED)))


def _is_good(row: Row) -> bool:
    assert isinstance(row, Judged)
    return row.desirable


def _marks(batch: MicroBatch) -> torch.Tensor:
    """[answers], on the device of the batch."""
    return torch.tensor([_is_good(row) for row in batch.rows], device=batch.input_ids.device)
