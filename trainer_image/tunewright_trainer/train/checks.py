"""What is refused once the data and the processes are known, before anything is loaded."""

from typing import Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.hyperparameters import Optimizer
from tunewright_crds.job import JobSpec
from tunewright_crds.method import Objective, Tuner
from tunewright_trainer.train.dpo_losses import couples
from tunewright_trainer.train.world import World

_SHARDED: Final = (Optimizer.ADAMW, Optimizer.SGD)  # they treat each element of a weight by itself


def check_rows(spec: JobSpec, rows: int, validation: int) -> None:
    """Refuse a job with too few rows for what it asks."""
    if not rows:
        raise Refusal(
            FailureCode.DATA_EMPTY, "no row is left to train on; the data report says what was dropped", param="spec.dataset.sources"
        )
    if spec.hyperparameters.early_stopping.enabled and not validation:
        raise Refusal(
            FailureCode.CONFIG_INVALID,
            "early stopping needs validation rows, and with so little data none was drawn: raise validationFraction",
            param="spec.dataset.validationFraction",
        )


def check_together(spec: JobSpec, world: World) -> None:
    """Refuse what several processes cannot share yet: it needs the whole batch, or a second copy of weights that are spread."""
    method, optimizer = spec.method, spec.hyperparameters.optimizer
    if world.size == 1:
        return
    if optimizer.within_backward or (spec.shards_model and optimizer not in _SHARDED):
        what = f"optimizer {optimizer} works on weights that are whole, in one process"
        raise Refusal(FailureCode.CONFIG_INVALID, what, param="spec.hyperparameters.optimizer")
    if method.objective is Objective.DPO and couples(method.dpo) and spec.shards_model:
        what = "this loss compares the pairs of a batch, which needs a copy of the weights in each process: set sharding to none"
        raise Refusal(FailureCode.CONFIG_INVALID, what, param="spec.resources.sharding")
    if method.objective is Objective.DPO and method.tuner is Tuner.FULL and spec.shards_model:
        what = "dpo of the whole model keeps a copy of what the model was, which is not spread yet"
        raise Refusal(FailureCode.CONFIG_INVALID, what, param="spec.resources.sharding")
