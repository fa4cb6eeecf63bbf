"""What is optimised, as the recipe sees it: each objective is a file of its own."""

from collections.abc import Sequence
from typing import Protocol

from tunewright_crds.job import JobSpec
from tunewright_crds.method import Objective
from tunewright_trainer.train.data import MicroBatch, Row, Rows
from tunewright_trainer.train.dpo import Dpo
from tunewright_trainer.train.loss import Sft
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward import BradleyTerry


class Optimised(Protocol):
    """An objective with its options."""

    def size(self, rows: Sequence[Row]) -> int:
        """How many parts the loss of these rows is the mean of; at least 1."""
        ...

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: int) -> Measured:
        """Add the gradients of a micro-batch, as its share of a batch of that size; returns its share of each metric, `loss` among them.

        Shares come together by `metrics.added`.
        """
        ...

    def evaluate(self, tuned: Tuned, rows: Rows) -> Measured:
        """Metrics over the validation rows, `eval_loss` among them."""
        ...


def objective_of(spec: JobSpec) -> Optimised:
    """What the job asks for."""
    if spec.method.objective is Objective.DPO:
        return Dpo(beta=spec.method.dpo.beta, smoothing=spec.method.dpo.label_smoothing)
    if spec.method.objective is Objective.REWARD:
        return BradleyTerry(centering=spec.method.reward.center_rewards_coefficient)
    return Sft(smoothing=spec.hyperparameters.label_smoothing)
