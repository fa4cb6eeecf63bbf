"""Early stopping: when validation no longer improves, and which weights were best."""

from tunewright_crds.hyperparameters import EarlyStopping
from tunewright_trainer.train.checkpoints import Counters


def judge(counters: Counters, loss: float, rule: EarlyStopping) -> bool:
    """Note an evaluation in ``counters``; returns whether it is the best so far. ``ended_early`` is set when patience is used up."""
    best = counters.best_loss is None or loss < counters.best_loss - (rule.min_delta if rule.enabled else 0.0)
    if best:
        counters.best_loss, counters.best_step, counters.evaluations_without_gain = loss, counters.step, 0
    else:
        counters.evaluations_without_gain += 1
        counters.ended_early = rule.enabled and counters.evaluations_without_gain >= rule.patience
    return best
