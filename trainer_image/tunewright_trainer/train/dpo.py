"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

Of each pair the chosen answer shall become likelier than the rejected one, compared with the reference: the model without its adapter, as it was before.
Each row is a pair of two documents, the chosen one first.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from tunewright_trainer.train import loss
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Row, Rows, micro_batch
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned


class Dpo:
    """``beta`` holds the model to the reference; ``smoothing`` is the share of pairs that are expected to be the wrong way round (Mitchell 2023)."""

    def __init__(self, *, beta: float, smoothing: float) -> None:
        self._beta = beta
        self._smoothing = smoothing

    def size(self, rows: Sequence[Row]) -> int:
        """The loss is the mean over pairs."""
        return max(1, len(rows))

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: int) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        before = reference(tuned, batch)
        with documents(batch.lengths):
            total, measured = self.summed(log_probabilities(tuned, batch), before)
            torch.autograd.backward(total / share_of)
        return {name: value / share_of for name, value in measured.items()}

    @torch.no_grad()
    def evaluate(self, tuned: Tuned, rows: Rows) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        tuned.network.eval()
        totals: Measured = {}
        for index in range(len(rows)):
            batch = micro_batch([rows[index]], tuned.device)
            with documents(batch.lengths):
                _, measured = self.summed(log_probabilities(tuned, batch), reference(tuned, batch))
            totals = {name: totals.get(name, 0.0) + value for name, value in measured.items()}
        return {f"eval_{name}": total / len(rows) for name, total in totals.items()}

    def summed(self, policy: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, Measured]:
        """Sum of the pairs' losses, in nats, and of what is measured of them. Both are log-probabilities [2 pairs]: chosen, rejected, chosen, ..."""
        rewards = self._beta * (policy - before)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        losses = -(1 - self._smoothing) * logsigmoid(margins) - self._smoothing * logsigmoid(-margins)
        told = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": margins > 0,
            "rewards/margins": margins,
            "logps/chosen": policy[0::2],
            "logps/rejected": policy[1::2],
        }
        return losses.sum(), {name: float(values.detach().sum()) for name, values in told.items()}


def log_probabilities(tuned: Tuned, batch: MicroBatch) -> torch.Tensor:
    """[documents]: log-probability of what is learned of each, in nats. Must be called within `attention.documents`."""
    each = -cross_entropy(loss.forward(tuned, batch), batch.targets, reduction="none")
    ends = torch.cumsum(torch.tensor([0, *batch.lengths], device=batch.keep.device), 0)
    counts = torch.searchsorted(batch.keep, ends).diff()
    return torch.stack([part.sum() for part in torch.split(each, counts.tolist())])


@torch.no_grad()
def reference(tuned: Tuned, batch: MicroBatch) -> torch.Tensor:
    """`log_probabilities` by the model without its adapter, and without dropout."""
    with documents(batch.lengths), _as_before(tuned):
        return log_probabilities(tuned, batch)


@contextlib.contextmanager
def _as_before(tuned: Tuned) -> Iterator[None]:
    assert tuned.peft is not None  # the contract refuses dpo of the whole model
    training = tuned.network.training
    tuned.network.eval()
    try:
        with tuned.peft.disable_adapter():
            yield
    finally:
        tuned.network.train(training)
