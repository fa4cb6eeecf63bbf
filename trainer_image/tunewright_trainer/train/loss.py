"""Supervised fine-tuning: cross-entropy over the trained tokens."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from tunewright_trainer.train import seq2seq
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Padded, Row, Rows, micro_batch
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.world import World


class Sft:
    """``smoothing`` of each target is spread evenly over the vocabulary while training."""

    def __init__(self, *, smoothing: float) -> None:
        self._smoothing = smoothing

    def size(self, rows: Sequence[Row]) -> int:
        """The loss is the mean over trained tokens."""
        return max(1, sum(row.targets for row in rows))

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> dict[str, float]:
        """See `tunewright_trainer.train.objective.Optimised`."""
        return {"loss": backward(tuned, batch, share_of=share_of, smoothing=self._smoothing)}

    def evaluate(self, tuned: Tuned, rows: Rows, world: World) -> dict[str, float]:
        """See `tunewright_trainer.train.objective.Optimised`."""
        tuned.network.eval()
        found = world.together(range(len(rows)), lambda own: [evaluate(tuned, micro_batch([rows[index]], tuned.device)) for index in own])
        losses, right, tokens = zip(*found, strict=True)
        return {"eval_loss": sum(losses) / max(1, sum(tokens)), "eval_mean_token_accuracy": sum(right) / max(1, sum(tokens))}


def forward(tuned: Tuned, batch: MicroBatch) -> torch.Tensor:
    """`Tuned.logits`, or of an encoder-decoder `seq2seq.forward`."""
    return seq2seq.forward(tuned, batch) if isinstance(batch, Padded) else tuned.logits(batch)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the targets' cross-entropies, in nats. ``smoothing`` of each target is spread evenly over the vocabulary (Szegedy et al. 2016)."""
    return cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


def backward(tuned: Tuned, batch: MicroBatch, *, share_of: float, smoothing: float) -> float:
    """Add the gradients of a micro-batch's loss, as its share of a batch with ``share_of`` trained tokens; returns that share of the loss.

    Dividing by the tokens of the whole batch makes accumulation exact: a long micro-batch counts as its tokens do.
    """
    if not len(batch.targets):
        return 0.0
    with documents(batch.segments):
        loss = summed_loss(forward(tuned, batch), batch.targets, smoothing=smoothing) / share_of
        torch.autograd.backward(loss)
    return float(loss.detach())


@torch.no_grad()
def evaluate(tuned: Tuned, batch: MicroBatch) -> tuple[float, int, int]:
    """Summed loss without smoothing, correct tokens, and tokens, of a micro-batch."""
    if not len(batch.targets):
        return 0.0, 0, 0
    with documents(batch.segments):
        logits = forward(tuned, batch)
    correct = int((logits.argmax(dim=-1) == batch.targets).sum())
    return float(summed_loss(logits, batch.targets)), correct, len(batch.targets)
