"""What is optimised, as the recipe sees it: each objective is a file of its own."""

from collections.abc import Sequence
from typing import Protocol

from tunewright_crds.job import JobSpec
from tunewright_crds.method import Objective
from tunewright_trainer.train.data import MicroBatch, Row, Rows
from tunewright_trainer.train.dpo import Dpo
from tunewright_trainer.train.loss import Sft
from tunewright_trainer.train.model import Tuned


class Optimised(Protocol):
    """An objective with its options."""

    def size(self, rows: Sequence[Row]) -> int:
        """How many parts the loss of these rows is the mean of; at least 1."""
        ...

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> dict[str, float]:
        """Add the gradients of a micro-batch, as its share of a batch of that size; returns its share of each metric, `loss` among them."""
        ...

    def evaluate(self, tuned: Tuned, rows: Rows) -> dict[str, float]:
        """Metrics over the validation rows, `eval_loss` among them."""
        ...


def objective_of(spec: JobSpec) -> Optimised:
    """What the job asks for."""
    if spec.method.objective is Objective.DPO:
        return Dpo(beta=spec.method.dpo.beta, smoothing=spec.method.dpo.label_smoothing)
    return Sft(smoothing=spec.hyperparameters.label_smoothing)
