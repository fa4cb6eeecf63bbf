"""Losses that go astray: how that is noticed, and which steps are then left out.

A loss or gradient that is no number is the fault of its batch until the opposite is seen: the step is not made, and its batch is left out. What comes again at
once, and a loss that has risen and stays high, is the fault of the weights: the run goes back to what they were some steps before, and leaves out the batches
that led there (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, did so with the spikes of PaLM), each time in a row further back.

All of it follows from the losses of the steps, so that a run that was killed meanwhile finds and does the same. A step keeps its number and its batch, whatever
is left out before it.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.hyperparameters import Divergence, DivergenceAction
from tunewright_trainer.train.checkpoints import Counters

WINDOW: Final = 64  # steps that a loss is compared with
ENOUGH: Final = 32  # of them; before, nothing is known of what is usual
HIGH: Final = 5  # steps in a row that must be high: a single batch may well be hard, and one step's harm is bounded by clipping
LEAST_SPREAD: Final = 0.1  # of losses, in the objective's unit: below it, nothing has gone astray
WAY_BACK: Final = 10  # steps
CALM: Final = 10  # steps after which a loss that is no number is another matter; of one that rises, which takes longer, it is WINDOW


class Astray(Exception):
    """A step that must not be made. The message says what was found."""


def check_number(loss: float, norm: float) -> None:
    """Raise `Astray` unless a step's loss and the norm of its gradient are numbers."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Astray(f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}")


def check_evaluation(step: int, loss: float) -> None:
    """Refuse a validation loss that is no number, where losses of training are: no step is to blame for it."""
    if not math.isfinite(loss):
        raise _diverged(f"eval_loss {loss} at step {step}")


def remember(counters: Counters, loss: float) -> None:
    """Note the loss of a step that was made."""
    counters.recent = [*counters.recent, loss][-WINDOW - HIGH :]


def spike(recent: Sequence[float], factor: float) -> str:
    """What is wrong with the last few losses, or nothing: each is above the median of those before by more than ``factor`` times the distance from there to their
    90th percentile. Percentiles, so that neither single odd batches nor a mixture of easy and hard ones decides."""
    before, last = recent[:-HIGH], recent[-HIGH:]
    if not factor or len(before) < ENOUGH:
        return ""
    usual, upper = float(np.median(before)), float(np.quantile(before, 0.9))
    limit = usual + factor * max(upper - usual, LEAST_SPREAD)
    return f"losses of {min(last):.4g} and more for {HIGH} steps, where {usual:.4g} was usual" if min(last) > limit else ""


def leave_out(counters: Counters, step: int, why: str, rule: Divergence, *, steps: int, risen: bool = False) -> int:
    """Note in ``counters`` that the run, of so many steps, went astray at ``step``; returns the last step to keep, to whose weights it goes back.

    ``risen``: the loss had been too high for some steps. Raises `Refusal` (LossDiverged) where going back is not wanted, or did not help.
    """
    if rule.action is DivergenceAction.FAIL:
        raise _diverged(f"{why} at step {step}")
    again = counters.rollbacks_in_a_row if step - counters.astray_at <= (WINDOW if risen else CALM) else 0
    if again == rule.max_rollbacks:
        raise _diverged(f"{why} at step {step}, after {again} roll-backs in a row")
    kept = max(0, step - 1 - (HIGH - 1 + WAY_BACK if risen else 0) - WAY_BACK * again)
    left_out = sorted({*counters.left_out, *range(kept + 1, step + 1)})
    if 2 * len(left_out) > steps:
        raise _diverged(f"{why} at step {step}; of {steps} steps {len(left_out)} would have to be left out")
    counters.left_out = left_out
    counters.rollbacks, counters.rollbacks_in_a_row, counters.astray_at = counters.rollbacks + 1, again + 1, step
    return kept


def _diverged(what: str) -> Refusal:
    return Refusal(FailureCode.LOSS_DIVERGED, what, param="spec.hyperparameters.learningRate")
