"""What is optimised, as the recipe sees it: each objective is a file of its own."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from tunewright_crds.job import JobSpec
from tunewright_crds.method import Objective
from tunewright_trainer.train.data import MicroBatch, Parts, Row, Rows, rows_of
from tunewright_trainer.train.dpo import Dpo
from tunewright_trainer.train.grpo import Grpo
from tunewright_trainer.train.kto import Kto
from tunewright_trainer.train.loss import Sft
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.ppo import Ppo
from tunewright_trainer.train.reinforced import Loss, Reference, Setting, Update
from tunewright_trainer.train.reward import BradleyTerry
from tunewright_trainer.train.rloo import Rloo
from tunewright_trainer.train.world import World


class Optimised(Protocol):
    """An objective with its options."""

    def size(self, rows: Sequence[Row]) -> int:
        """How many parts the loss of these rows is the mean of; at least 1."""
        ...

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> Measured:
        """Add the gradients of a micro-batch, as its share of a batch of that size; returns its share of each metric, `loss` among them.

        Shares come together by `metrics.added`.
        """
        ...

    def evaluate(self, tuned: Tuned, rows: Rows, world: World) -> Measured:
        """Metrics over the validation rows, of which each process measures a part; `eval_loss` among them."""
        ...


class Coupled(Protocol):
    """An objective whose parts of a batch must know more of the whole than its size."""

    def shares(self, tuned: Tuned, parts: Parts, world: World) -> Sequence[Sequence[Any]]:
        """For each micro-batch, what `backward` must know of the whole batch. May ask the model, without gradients: each process of its own micro-batches in
        their order, of which dropout will be the same again."""
        ...

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: Any) -> Measured:
        """See `Optimised`."""
        ...

    def evaluate(self, tuned: Tuned, rows: Rows, world: World) -> Measured:
        """See `Optimised`."""
        ...


class Reinforced(Protocol):
    """An objective that learns from rewards for answers of the model's own. A step draws answers, and makes one optimizer step or several on them."""

    def learn(self, rows: Sequence[Row], *, step: int, state: dict[str, float], update: Update) -> tuple[Sequence[Row], Measured]:
        """One step over the prompts of these rows. ``state`` is kept in checkpoints, and the whole rest of the step depends on the weights, the optimizer's
        state, the seed and the step only. Returns what was trained on, and metrics, `loss` and `reward` among them."""
        ...

    def evaluate(self, rows: Rows) -> Measured:
        """Metrics of the likeliest answers to the prompts of validation: `eval_reward`, and `eval_loss`, which is what is to become less."""
        ...


def reinforced(tuned: Tuned, setting: Setting) -> Reinforced | None:
    """The job's objective if it learns from rewards. Layers that only training needs are added to ``tuned``."""
    made: dict[Objective, Callable[[Tuned, Setting], Reinforced]] = {Objective.PPO: Ppo, Objective.GRPO: Grpo, Objective.RLOO: Rloo}
    make = made.get(setting.spec.method.objective)
    return make(tuned, setting) if make else None


def objective_of(spec: JobSpec, tuned: Tuned) -> Optimised | Coupled:
    """What the job asks for, if it learns from what the data says. ``tuned`` is as it was loaded: what the model was before is kept where the objective needs it."""
    if spec.method.objective is Objective.DPO:
        return Dpo(spec.method.dpo, Reference(tuned))
    if spec.method.objective is Objective.KTO:
        return Kto(spec.method.kto, Reference(tuned))
    if spec.method.objective is Objective.REWARD:
        return BradleyTerry(centering=spec.method.reward.center_rewards_coefficient)
    return Sft(smoothing=spec.hyperparameters.label_smoothing)


def shares_of(loss: Loss | Coupled, tuned: Tuned, parts: Parts, world: World) -> Sequence[Sequence[Any]]:
    """For each micro-batch of a batch, what it is the share of."""
    if hasattr(loss, "shares"):
        with torch.random.fork_rng():  # looking at the batch draws no random numbers away from its gradients
            return loss.shares(tuned, parts, world)
    return [[loss.size(rows_of(parts))] * len(own) for own in parts]


def none_of(share: Any) -> Any:
    """Like ``share``, for rows that are computed and are no part of the batch: neither gradients nor metrics come of them."""
    return dataclasses.replace(share, weight=0.0) if dataclasses.is_dataclass(share) and not isinstance(share, type) else math.inf
