"""The recipe: set-up, loop and end of tuning, whatever the objective.

A loop of our own on plain torch, with transformers' models and PEFT's adapters, rather than transformers' Trainer, for what this project exists
for: a run that is killed any number of times must end with the same weights, bit for bit; only what is learned is computed; and the first step
comes within seconds of the process's start. Each of these needs control of every line that a step executes. What a step does is a function of
(weights, optimizer state, seed, step): no generator, iterator or scheduler has a state that a checkpoint could miss.
"""

import copy
import gc
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch

from tunewright_crds.method import Tuner
from tunewright_crds.pod import Outcome
from tunewright_crds.status import BestCheckpoint
from tunewright_crds.storage import MANIFEST, checkpoints_key, metrics_key
from tunewright_trainer import publish
from tunewright_trainer.architecture import is_seq2seq
from tunewright_trainer.process import Stopped, stop_requested, telling, work_under_way
from tunewright_trainer.tracking import Trackers, open_trackers
from tunewright_trainer.train import adalora, divergence, metrics, optimizers, schedule, sharding
from tunewright_trainer.train import data as rows_of
from tunewright_trainer.train.attempt import Attempt
from tunewright_trainer.train.checkpoints import Checkpoints, Counters, Snapshot, Tensors, copied
from tunewright_trainer.train.checks import check_rows, check_together
from tunewright_trainer.train.determinism import reproducible
from tunewright_trainer.train.model import load
from tunewright_trainer.train.objective import Coupled, none_of, objective_of, reinforced, shares_of
from tunewright_trainer.train.reinforced import Loss, Setting
from tunewright_trainer.train.stopping import judge

log = logging.getLogger(__name__)


def train(attempt: Attempt) -> Outcome:
    """Train from the base on the rows, and publish; see `tunewright_trainer.train.run`."""
    outcome = Outcome(attempt=attempt.number)
    with telling(outcome), reproducible(attempt.spec):
        detour = _follow(attempt, outcome, None)
        while detour:
            gc.collect()  # the model that went astray; the next one is as large
            detour = _follow(attempt, outcome, detour)
    return outcome


def _follow(attempt: Attempt, outcome: Outcome, detour: "Detour | None") -> "Detour | None":
    """Train to the end and publish, or until the loss goes astray: then it returns how the run has to begin anew, as an attempt after a kill does."""
    run = Run(attempt)
    try:
        run.resume(detour)
        work_under_way.set()
        while not run.done:
            if run.world.any(stop_requested.is_set()):
                run.save()
                raise Stopped(run.tell(outcome))
            run.step()
            if run.detour:
                run.checkpoints.wait()
                return run.detour
            run.evaluate_if_due()
            run.checkpoint_if_due()
            run.report()
        run.save()
        run.take_result()
        if run.world.leads:
            outcome.artifact = run.publish(outcome)
    finally:
        run.tell(outcome)
        run.close(done=outcome.artifact is not None)
    return None


@dataclass(frozen=True)
class Detour:
    """How a run goes on whose loss went astray: from the weights of step ``kept``, with what ``counters`` say is left out."""

    kept: int
    counters: Counters


class Run:
    """The state of one attempt, and what its loop does with it. Each method leaves a state that can be saved."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.config, self.spec, self.wanted = attempt.config, attempt.spec, attempt.spec.hyperparameters
        self.world = replace(attempt.world, in_step=attempt.world.size > 1 and self.spec.shards_model)
        self.store, self.halvings = attempt.store, attempt.halvings
        self.prepared = json.loads((attempt.data / MANIFEST).read_bytes())
        seq2seq = is_seq2seq(attempt.model)
        self.rows = rows_of.Rows(attempt.data / "train", seq2seq=seq2seq)
        self.validation = rows_of.Rows(attempt.data / "validation", seq2seq=seq2seq)
        check_rows(self.spec, len(self.rows), len(self.validation))
        check_together(self.spec, self.world)
        optimizers.check_passes(self.wanted, halvings=self.halvings)
        self.plan = schedule.plan(self.spec, len(self.rows))
        self.order = rows_of.Order(len(self.rows), seed=self.wanted.seed)
        self.tuned = load(attempt.model, self.spec, steps=self.plan.max_steps)
        self.objective = objective_of(self.spec, self.tuned)
        if self.world.in_step:
            sharding.shard(self.tuned.network, self.world, whole=self.spec.method.tuner is Tuner.FULL)
        self.reinforced = reinforced(self.tuned, Setting(self.spec, attempt.model, self.prepared, self.halvings, attempt.judge, self.world))
        self.weights = self.tuned.trainable
        self.updates = optimizers.updates(self.tuned, self.wanted)
        self.counters = Counters(planned_halvings=attempt.planned_halvings)
        self.best: Tensors | None = None
        self.resumed_from = 0
        self.detour: Detour | None = None
        self.touched = False
        """Whether the step that is being made has changed weights already."""
        self.checkpoints = Checkpoints(
            self.store,
            checkpoints_key(self.config.job.namespace, self.config.job.uid),
            attempt.work / "checkpoints",
            keep=self.spec.checkpointing.keep,
            lineage={"dataset": attempt.dataset_digest},
            after_each=self.upload_history,
        )
        folder = attempt.work / f"metrics{'' if self.world.leads else -self.world.rank}"
        self.history = metrics.History(folder / f"train-{attempt.number}.jsonl")
        self.pace = metrics.Pace()
        self.reporter = metrics.Reporter(self.config.progress_url if self.world.leads else "", self.config.job)
        self.trackers = (
            open_trackers(self.config, attempt=attempt.number, work=attempt.work / "tracking") if self.world.leads else Trackers([])
        )
        self.told_at = -math.inf

    @property
    def done(self) -> bool:
        return self.counters.step >= self.plan.max_steps or self.counters.ended_early

    def resume(self, detour: Detour | None = None) -> None:
        """Go on from the newest whole checkpoint, if there is one; on a detour from one of its step or before."""
        if detour and self.world.leads:
            self.checkpoints.discard_after(detour.kept)
        snapshot = self.checkpoints.newest() if self.world.leads else None
        if detour:
            self.counters = self.counters.with_detours_of(detour.counters)
            if snapshot:
                snapshot.counters = snapshot.counters.with_detours_of(detour.counters)
        if not self.world.any(snapshot is not None):
            log.info("training %d steps of %d rows", self.plan.max_steps, self.plan.batch_size)
            if self.wanted.learning_rate == "auto":
                log.info("learningRate auto: %g, %s", *schedule.automatic_rate(self.spec))
            return
        self.counters = self.world.of_leader(snapshot.counters if snapshot else Counters())
        self.best = snapshot.best if snapshot else None
        self.tuned.load_weights(sharding.spread(snapshot.weights if snapshot else {}, self.weights, self.world))
        saved = sharding.spread(snapshot.optimizer if snapshot else {}, self.weights, self.world)
        optimizers.restore(self.updates.optimizer, self.weights, saved)
        self.resumed_from = self.counters.step
        log.info("going on from step %d of %d", self.resumed_from, self.plan.max_steps)

    def step(self) -> None:
        """One effective batch: an optimizer step over it, or with rewards as many as the objective makes of the answers to it; none where it is left out."""
        step = self.counters.step + 1
        if step in self.counters.left_out:
            self.counters.step = step
            return
        batch: Sequence[rows_of.Row] = [self.rows[self.order[position]] for position in self.plan.positions(step)]
        state = dict(self.counters.state)
        self.touched = False
        self.tuned.network.train()
        # Dropout draws from the seed and the step alone, and in each process other numbers.
        torch.manual_seed(self.world.seed((self.wanted.seed << 32) + step))
        try:
            if self.reinforced:
                batch, measured = self.reinforced.learn(batch, step=step, state=self.counters.state, update=self._update)
            else:
                measured = self._update(batch, self.objective)
        except divergence.Astray as astray:
            self.updates.optimizer.zero_grad(set_to_none=True)
            self.counters.state = state
            self._leave_out(step, str(astray))
            return
        self._count(step, batch, measured)
        divergence.remember(self.counters, measured["loss"])
        risen = "" if self.reinforced else divergence.spike(self.counters.recent, self.wanted.divergence.spike_factor)
        if risen:
            self._leave_out(step, risen, risen=True)

    def _leave_out(self, step: int, why: str, *, risen: bool = False) -> None:
        """Have a step that went astray left out: at once where nothing came of it yet, else by a detour."""
        kept = divergence.leave_out(self.counters, step, why, self.wanted.divergence, steps=self.plan.max_steps, risen=risen)
        log.warning("%s at step %d: what was learned since step %d is left out (roll-back %d)", why, step, kept, self.counters.rollbacks)
        if kept == step - 1 and not self.touched:
            self.counters.step = step
        else:
            self.detour = Detour(kept, self.counters)

    def _update(self, batch: Sequence[rows_of.Row], loss: Loss | Coupled) -> dict[str, float]:
        """One optimizer step, whose gradients micro-batches add up to; returns the metrics of the loss and the gradient's norm."""
        shares = self._shares(batch, loss)

        def backward() -> dict[str, float]:
            measured: dict[str, float] = {}
            for group, share in shares:
                found = loss.backward(self.tuned, rows_of.micro_batch(group, self.tuned.device), share_of=share)
                measured = metrics.added(measured, found)
            sharding.add_up(self.weights.values(), self.world)
            return reduce(metrics.added, self.world.of_each(measured))

        def check(loss: float, norm: float) -> None:
            divergence.check_number(*self.world.of_leader((loss, norm)))

        self.touched |= not self.updates.checks_first
        measured = self.updates.take(backward, check, rate=self.plan.learning_rate(self.counters.step + 1))
        self.touched = True
        return measured

    def _groups(self, batch: Sequence[rows_of.Row]) -> list[Sequence[rows_of.Row]]:
        """What goes through the model at once."""
        if self.wanted.optimizer.within_backward:
            return [batch]
        return list(rows_of.grouped(batch, self.wanted.micro_batch_size, halvings=self.halvings + self.counters.planned_halvings))

    def _shares(self, batch: Sequence[rows_of.Row], loss: Loss | Coupled) -> list[tuple[Sequence[rows_of.Row], Any]]:
        """The groups of rows that this process computes, each with what it is the share of.

        With weights spread over the processes all of them compute each layer together. One that has fewer groups then repeats another, as no share.
        """
        parts = [self._groups(rows) for rows in self.world.shares(batch)]
        shares = shares_of(loss, self.tuned, parts, self.world)
        each = [list(zip(*both, strict=True)) for both in zip(parts, shares, strict=True)]
        own = each[self.world.rank]
        if self.world.in_step and (absent := max(map(len, each)) - len(own)):
            group, share = max(each, key=len)[0]
            own += [(group, none_of(share))] * absent
        return own

    def _count(self, step: int, batch: Sequence[rows_of.Row], measured: dict[str, float]) -> None:
        tokens = sum(row.tokens for row in batch)
        targets = sum(row.targets for row in batch)
        self.counters.step = step
        self.counters.tokens += tokens
        self.counters.trained_tokens += targets
        pace, trained_pace = self.pace.step(tokens, targets)
        self.counters.metrics |= measured | {
            "learning_rate": self.plan.learning_rate(step),
            "rollbacks": float(self.counters.rollbacks),
            "epoch": self.plan.epoch(step),
            "num_tokens": float(self.counters.tokens),
            "tokens_per_second": pace,
            "trained_tokens_per_second": trained_pace,
        }
        self.history.add(step, self.counters.metrics)
        self.trackers.add(step, self.counters.metrics)

    def evaluate_if_due(self) -> None:
        """Measure the validation loss where the plan says so, and judge it; not where nothing was learned."""
        learned = self.counters.step not in self.counters.left_out or self.done
        if not len(self.validation) or not learned or not self.plan.evaluates(self.counters.step):
            return
        measured = (
            self.reinforced.evaluate(self.validation)
            if self.reinforced
            else self.objective.evaluate(self.tuned, self.validation, self.world)
        )
        measured = self.world.of_leader(measured)
        value = measured["eval_loss"]
        divergence.check_evaluation(self.counters.step, value)
        self.counters.metrics |= measured
        self.history.add(self.counters.step, measured)
        self.trackers.add(self.counters.step, measured)
        if judge(self.counters, value, self.wanted.early_stopping) and self.wanted.early_stopping.enabled:
            self.best = self._whole(self.weights)
        log.info(
            "step %d  eval_loss %.4f%s", self.counters.step, value, "  (best)" if self.counters.best_step == self.counters.step else ""
        )

    def _whole(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copies in the leader's memory, of tensors that may be spread over all; the others have none."""
        whole = {name: sharding.gathered(tensor) for name, tensor in tensors.items()}
        return copied(whole) if self.world.leads else {}

    def snapshot(self) -> Snapshot:
        """A copy of all that the rest of the run depends on, and the answer to whoever asked for it."""
        self.counters.answered = self.reporter.asked or self.counters.answered
        return Snapshot(
            counters=copy.deepcopy(self.counters),
            weights=self._whole(self.weights),
            optimizer=self._whole(optimizers.state_of(self.updates.optimizer, self.weights)),
            best=self.best,
        )

    def checkpoint_if_due(self) -> None:
        """Begin a checkpoint in the background, where the plan or the job's owner wants one; with one still on its way (storage is slow or away) the plan's is
        left out, and the owner waits."""
        asked = self.world.of_leader(self.reporter.asked not in ("", self.counters.answered))
        due = asked or self.plan.saves(self.counters.step) or self.counters.step == self.counters.astray_at
        if due and not self.done and self.world.of_leader(self.checkpoints.ready()):
            snapshot = self.snapshot()
            if self.world.leads:
                self.checkpoints.begin(snapshot)

    def save(self) -> None:
        """Have this very step in storage before going on."""
        self.checkpoints.wait()
        last = self.world.of_leader(self.checkpoints.last)
        if last is None or last.step != self.counters.step:
            snapshot = self.snapshot()
            if self.world.leads:
                self.checkpoints.save(snapshot)
        self.world.wait()

    def upload_history(self) -> None:
        """Bring the metrics so far to storage."""
        folder = metrics_key(self.config.job.namespace, self.config.job.uid)
        self.store.put_bytes(f"{folder}/{self.history.path.name}", self.history.path.read_bytes())

    def take_result(self) -> None:
        """The leader gets what is published: with early stopping the best weights seen, else the last, in a model that is whole."""
        if not self.world.in_step:
            if self.best:
                self.tuned.load_weights(self.best)
            adalora.settle(self.tuned.peft)
            return
        weights = self.best or self._whole(self.weights)
        if self.world.leads:
            self.tuned = load(self.attempt.model, self.spec, device=torch.device("cpu"))
            self.tuned.load_weights(weights)

    def publish(self, outcome: Outcome) -> publish.Published:
        """Publish what was trained; a stop asked for meanwhile ends it between two forms."""
        self.tuned.network.eval()
        chosen = self.counters.best_step if self.best is not None else self.counters.step
        result = publish.Result(
            config=self.config,
            tuned=self.tuned,
            base_folder=self.attempt.model,
            dataset_digest=self.attempt.dataset_digest,
            licenses=self.prepared["licenses"],
            step=chosen,
            metrics=dict(self.counters.metrics),
            probe=self.validation[0] if len(self.validation) else self.rows[0],
        )
        return publish.publish(result, self.store, self.attempt.work / "artifacts", before_each=lambda: _stop_if_asked(self.tell(outcome)))

    def report(self) -> None:
        """Tell the front end (from a thread) and, every few seconds, the log."""
        last = self.done or self.counters.step == self.resumed_from + 1
        now = time.monotonic()
        if not last and now - self.told_at < metrics.REPORT_SECONDS:
            return
        self.told_at = now
        self.counters.metrics["peak_memory_bytes"] = float(metrics.peak_memory_bytes())
        progress = metrics.progress(
            step=self.counters.step,
            max_steps=self.plan.max_steps,
            epoch=self.plan.epoch(self.counters.step),
            tokens=self.counters.tokens,
            remaining=self.pace.remaining(0 if self.done else self.plan.max_steps - self.counters.step),
            attempt=self.attempt.number,
            resumed_from=self.resumed_from,
            metrics=self.counters.metrics,
        )
        self.reporter.report(progress, self.checkpoints.last)
        log.info("%s", metrics.line(progress, self.plan.learning_rate(self.counters.step)))

    def tell(self, outcome: Outcome) -> Outcome:
        """Write into ``outcome`` how far the run is."""
        if outcome.resumed_from_step is None:  # else the attempt went back since, which is no loss of steps to a kill
            outcome.resumed_from_step = self.resumed_from
        outcome.reached_step = self.counters.step
        outcome.rollbacks = self.counters.rollbacks
        outcome.last_checkpoint = self.checkpoints.last
        best = self.counters.best_loss
        outcome.best_checkpoint = BestCheckpoint(step=self.counters.best_step, value=best) if best is not None else None
        return outcome

    def close(self, *, done: bool) -> None:
        """Say farewell to the front end and the trackers; ``done``: no attempt follows."""
        self.reporter.close()
        self.trackers.close(done=done)


def _stop_if_asked(outcome: Outcome) -> None:
    if stop_requested.is_set():
        raise Stopped(outcome)
