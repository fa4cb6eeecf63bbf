"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): an answer is one action, compared with the mean reward of the other answers to its prompt."""

from collections.abc import Sequence

import torch

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


class Rloo:
    """Learns from groups of answers; see `tunewright_trainer.train.objective.Reinforced`."""

    def __init__(self, tuned: Tuned, setting: Setting) -> None:
        self._options = setting.spec.method.rloo
        self._answering = Answering(tuned, setting, self._options)
        self._reference = Reference(tuned) if self._options.beta else None

    def learn(self, rows: Sequence[Row], *, step: int, state: dict[str, float], update: Update) -> tuple[Sequence[Row], Measured]:
        """See `tunewright_trainer.train.objective.Reinforced`."""
        options, answering = self._options, self._answering
        drawn = answering.draw(rows, step=step, each=options.generations)
        samples, rewards, kl = drawn.samples, drawn.rewards, {}
        policy = answering.log_probabilities(samples, answering.tuned)
        if self._reference:
            with self._reference.as_before() as tuned:
                before = answering.log_probabilities(samples, tuned)
            divergences = torch.stack([(own - others).sum() for own, others in zip(policy, before, strict=True)])
            rewards = rewards - options.beta * divergences
            kl = {"kl": float(divergences.mean())}
        gains = advantages(rewards.reshape(-1, options.generations)).flatten()
        experience = [
            Experience(one.input_ids, one.labels, one.lengths, gain.expand(one.targets), old)
            for one, gain, old in zip(samples, gains, policy, strict=True)
        ]
        loss = Surrogate(clip=options.clip, temperature=answering.temperature, tokens=sum(one.targets for one in samples))
        measured = mean_of([update(experience, loss) for _ in range(options.iterations)])
        return samples, drawn.measured | measured | kl

    def evaluate(self, rows: Rows) -> Measured:
        """See `tunewright_trainer.train.objective.Reinforced`."""
        return self._answering.likeliest(rows)


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Of rewards [prompts, generations]: how much more each got than the mean of the others to its prompt."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


class Surrogate:
    """The clipped surrogate of whole answers. ``tokens``: of the answers of the batch, which the entropy is the mean over."""

    def __init__(self, *, clip: float, temperature: float, tokens: int) -> None:
        self._clip = clip
        self._temperature = temperature
        self._tokens = tokens

    def size(self, rows: Sequence[Row]) -> int:
        """The loss is the mean over answers."""
        return max(1, len(rows))

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        rows = [row for row in batch.rows if isinstance(row, Experience)]
        with documents(batch.segments):
            policy, entropy = log_probabilities(tuned, batch, self._temperature)
            summed, beyond = self.summed(policy, rows)
            torch.autograd.backward(summed / share_of)
        return {
            "loss": float(summed.detach()) / share_of,
            "clip_ratio/region_mean": float(beyond.sum()) / share_of,
            "entropy": float(entropy.sum()) / self._tokens,
        }

    def summed(self, policy: torch.Tensor, rows: Sequence[Experience]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the answers' losses, and which of them clipping held back [answers]. ``policy``: log-probabilities of the tokens [tokens], in nats."""
        answers = torch.stack([part.sum() for part in torch.split(policy, [row.targets for row in rows])])
        old = torch.stack([row.policy.sum() for row in rows if row.policy is not None]).to(policy.device)
        gains = torch.stack([row.advantages[0] for row in rows]).to(policy.device)
        each, beyond = clipped(answers, old, gains, clip=self._clip)
        return each.sum(), beyond
