"""How many steps, how large, and what happens at which: pure functions of the job and the number of rows."""

import math
from dataclasses import dataclass
from typing import Final

from tunewright_crds.hyperparameters import Scheduler
from tunewright_crds.job import JobSpec
from tunewright_crds.method import REINFORCED, Objective, Tuner

ADAPTER_RATE: Final = 2e-4
FULL_RATE: Final = 2e-5
PREFERENCE_RATE: Final = 5e-6  # of adapters that learn preferences
REWARD_RATES: Final = {True: 1e-5, False: 1e-4}  # of the whole model, and of an adapter with the head; a head that is new learns slowly
REINFORCED_RATES: Final = {True: 1e-6, False: 1e-5}  # of the whole model, and of an adapter, that learns from rewards
CHECKPOINTS_PER_JOB: Final = 20
MOST_STEPS_BETWEEN: Final = 500


@dataclass(frozen=True)
class Plan:
    """The course of a job. Steps count from 1; positions in the order of samples from 0."""

    rows: int
    batch_size: int
    samples: int  # in all; the last batch of a job may be smaller
    peak_rate: float
    scheduler: Scheduler
    warmup_steps: int
    evaluate_every: int
    save_every: int

    @property
    def max_steps(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def positions(self, step: int) -> range:
        """The samples of step ``step``."""
        return range((step - 1) * self.batch_size, min(step * self.batch_size, self.samples))

    def epoch(self, step: int) -> float:
        """Passes over the rows done after ``step`` steps."""
        return min(step * self.batch_size, self.samples) / self.rows

    def learning_rate(self, step: int) -> float:
        """Rate of step ``step``: a linear rise whose first step is not 0, then constant, or falling to 0 after the last step."""
        if step <= self.warmup_steps:
            return self.peak_rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.scheduler is Scheduler.COSINE:
            return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.peak_rate * (1 - done) if self.scheduler is Scheduler.LINEAR else self.peak_rate

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.max_steps

    def saves(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.max_steps


def plan(spec: JobSpec, rows: int) -> Plan:
    """The course of a job over ``rows`` rows."""
    wanted = spec.hyperparameters
    samples = wanted.max_steps * wanted.batch_size if wanted.max_steps else max(1, round(wanted.epochs * rows))
    steps = math.ceil(samples / wanted.batch_size)
    every = spec.checkpointing.every_steps
    return Plan(
        rows=rows,
        batch_size=wanted.batch_size,
        samples=samples,
        peak_rate=automatic_rate(spec) if wanted.learning_rate == "auto" else wanted.learning_rate,
        scheduler=wanted.scheduler,
        warmup_steps=math.ceil(wanted.warmup_ratio * steps),
        evaluate_every=max(1, round(rows / wanted.batch_size / wanted.evaluations_per_epoch)),
        save_every=max(1, min(MOST_STEPS_BETWEEN, round(steps / CHECKPOINTS_PER_JOB))) if every == "auto" else every,
    )


def automatic_rate(spec: JobSpec) -> float:
    """What `learningRate: auto` is."""
    whole = spec.method.tuner is Tuner.FULL
    if spec.method.objective is Objective.DPO:
        return PREFERENCE_RATE
    if spec.method.objective is Objective.REWARD:
        return REWARD_RATES[whole]
    if spec.method.objective in REINFORCED:
        return REINFORCED_RATES[whole]
    return FULL_RATE if whole else ADAPTER_RATE
