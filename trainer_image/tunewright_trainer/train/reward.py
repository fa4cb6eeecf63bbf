"""Learning to judge answers from pairs (Ouyang et al. 2022, arXiv:2203.02155; Bradley and Terry 1952).

Each row is a pair of two documents, the chosen one first. What is trained is a reward model (`reward_model`).
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch.nn.functional import logsigmoid

from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Row, Rows, micro_batch
from tunewright_trainer.train.metrics import Measured, added
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward_model import scores
from tunewright_trainer.train.world import World


class BradleyTerry:
    """The chosen answer of a pair wins with probability sigmoid(its reward - the other's). ``centering`` weighs the squared sum of both rewards, which
    keeps them around 0 (Eisenstein et al. 2023, arXiv:2312.09244)."""

    def __init__(self, *, centering: float) -> None:
        self._centering = centering

    def size(self, rows: Sequence[Row]) -> int:
        """The loss is the mean over pairs."""
        return max(1, len(rows))

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        with documents(batch.segments):
            with tuned.autocast():
                rewards = scores(tuned.network, batch)
            losses = self.losses(rewards)
            torch.autograd.backward(losses.sum() / share_of)
        return _measured(losses.detach(), rewards.detach(), share_of=share_of)

    @torch.no_grad()
    def evaluate(self, tuned: Tuned, rows: Rows, world: World) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        tuned.network.eval()

        def of(index: int) -> Measured:
            with tuned.autocast():
                rewards = scores(tuned.network, micro_batch([rows[index]], tuned.device))
            return _measured(self.losses(rewards), rewards, share_of=len(rows))

        found = reduce(added, world.together(range(len(rows)), lambda own: [of(index) for index in own]))
        return {f"eval_{name}": value for name, value in found.items()}

    def losses(self, rewards: torch.Tensor) -> torch.Tensor:
        """[pairs], in nats, of rewards [2 pairs]: chosen, rejected, chosen, ..."""
        chosen, rejected = rewards[0::2], rewards[1::2]
        return -logsigmoid(chosen - rejected) + self._centering * (chosen + rejected) ** 2


def _measured(losses: torch.Tensor, rewards: torch.Tensor, *, share_of: float) -> Measured:
    """TRL's metrics of the pairs, as their share of ``share_of`` pairs."""
    margins = rewards[0::2] - rewards[1::2]
    sums = {"loss": losses, "accuracy": margins > 0, "margin": margins, "mean_reward": (rewards[0::2] + rewards[1::2]) / 2}
    extremes = {"min_reward": float(rewards.min()), "max_reward": float(rewards.max())}
    return {name: float(values.sum()) / share_of for name, values in sums.items()} | extremes
