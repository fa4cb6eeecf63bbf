"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): of several answers to one prompt, those that are rewarded more than the others
shall become likelier. Norms of the loss: GRPO's own, DAPO's (Yu et al. 2025, arXiv:2503.14476), and that of Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).
"""

from collections.abc import Sequence
from typing import Final

import torch

from tunewright_crds import reinforcement
from tunewright_crds.reinforcement import LossType, ScaleRewards
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Row, Rows
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reinforced import (
    Answering,
    Experience,
    Reference,
    Setting,
    Update,
    clipped,
    log_probabilities,
    mean_of,
)

_LEAST_DEVIATION: Final = 1e-4  # added before dividing, as in TRL


class Grpo:
    """Learns from groups of answers; see `tunewright_trainer.train.objective.Reinforced`."""

    def __init__(self, tuned: Tuned, setting: Setting) -> None:
        self._options = setting.spec.method.grpo
        self._answering = Answering(tuned, setting, self._options)
        self._reference = Reference(tuned) if self._options.beta else None

    def learn(self, rows: Sequence[Row], *, step: int, state: dict[str, float], update: Update) -> tuple[Sequence[Row], Measured]:
        """See `tunewright_trainer.train.objective.Reinforced`."""
        options, answering = self._options, self._answering
        drawn = answering.draw(rows, step=step, each=options.generations)
        samples = drawn.samples
        gains = advantages(drawn.rewards.reshape(-1, options.generations), options.scale_rewards).flatten()
        # With one step on the same answers these are its own log-probabilities.
        policy = answering.log_probabilities(samples, answering.tuned) if options.iterations > 1 else [None] * len(samples)
        before: Sequence[torch.Tensor | None] = [None] * len(samples)
        if self._reference:
            with self._reference.as_before() as tuned:
                before = answering.log_probabilities(samples, tuned)
        experience = [
            Experience(one.input_ids, one.labels, one.lengths, gain.expand(one.targets), old, of_reference)
            for one, gain, old, of_reference in zip(samples, gains, policy, before, strict=True)
        ]
        loss = Surrogate(options, temperature=answering.temperature, tokens=sum(one.targets for one in samples))
        measured = mean_of([update(experience, loss) for _ in range(options.iterations)])
        return samples, drawn.measured | measured

    def evaluate(self, rows: Rows) -> Measured:
        """See `tunewright_trainer.train.objective.Reinforced`."""
        return self._answering.likeliest(rows)


def advantages(rewards: torch.Tensor, scale: ScaleRewards) -> torch.Tensor:
    """Of rewards [prompts, generations]: how much more each got than the others to its prompt in the mean."""
    gains = rewards - rewards.mean(dim=1, keepdim=True)
    if scale is ScaleRewards.GROUP:
        return gains / (rewards.std(dim=1, keepdim=True) + _LEAST_DEVIATION)
    return gains / (rewards.std() + _LEAST_DEVIATION) if scale is ScaleRewards.BATCH else gains


class Surrogate:
    """The clipped surrogate of each token, and the divergence from the reference by its estimator k3 (Schulman 2020).

    ``tokens``: of the answers of the batch, which metrics are the mean over.
    """

    def __init__(self, options: reinforcement.Grpo, *, temperature: float, tokens: int) -> None:
        self._options = options
        self._temperature = temperature
        self._tokens = tokens

    def size(self, rows: Sequence[Row]) -> int:
        """What the sum of the weighted tokens is divided by."""
        kind = self._options.loss_type
        if kind is LossType.DAPO:
            return max(1, sum(row.targets for row in rows))
        return len(rows) * (self._options.max_new_tokens if kind is LossType.DR_GRPO else 1)

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        rows = [row for row in batch.rows if isinstance(row, Experience)]
        with documents(batch.segments):
            policy, entropy = log_probabilities(tuned, batch, self._temperature)
            summed, measured = self.summed(policy, rows)
            torch.autograd.backward(summed / share_of)
        told = measured | {"entropy": entropy}
        return {"loss": float(summed.detach()) / share_of} | {name: float(values.sum()) / self._tokens for name, values in told.items()}

    def summed(self, policy: torch.Tensor, rows: Sequence[Experience]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the tokens' weighted losses, and what is measured of each token. ``policy``: log-probabilities of the rows' tokens [tokens], in nats."""
        gains = torch.cat([row.advantages for row in rows]).to(policy.device)
        drawn = [row.policy for row in rows if row.policy is not None]
        old = torch.cat(drawn).to(policy.device) if drawn else policy.detach()
        each, beyond = clipped(policy, old, gains, clip=self._options.clip)
        measured = {"clip_ratio/region_mean": beyond.float()}
        before = [row.reference for row in rows if row.reference is not None]
        if before:
            off = torch.cat(before).to(policy.device) - policy
            kl = torch.exp(off) - off - 1
            each = each + self._options.beta * kl
            measured["kl"] = kl.detach()
        return (each * self._weights(rows).to(policy.device)).sum(), measured

    def _weights(self, rows: Sequence[Row]) -> torch.Tensor:
        """[tokens]: of the answer's own length, where the loss is a mean of means."""
        means = self._options.loss_type is LossType.GRPO
        return torch.cat([torch.full((row.targets,), 1 / row.targets if means else 1.0) for row in rows])
