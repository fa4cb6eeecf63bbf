"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), with any of the losses of `dpo_losses`.

Of each pair the chosen answer shall become likelier than the rejected one, compared with the reference: the model as it was before, without its adapter or as a frozen copy.
Each row is a pair of two documents, the chosen one first.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from tunewright_crds.preference import Dpo as Options
from tunewright_trainer.train import loss
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Parts, Row, Rows, micro_batch, rows_of
from tunewright_trainer.train.dpo_losses import Documents, Pairs, couples, losses
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reinforced import Reference
from tunewright_trainer.train.world import World


@dataclass(frozen=True)
class Whole:
    """What a micro-batch must know of its batch: its ``pairs``, and the learned ``tokens`` of their chosen answers. ``weight`` 0: it is no part of it."""

    pairs: int
    tokens: int
    weight: float = 1.0


@dataclass(frozen=True)
class Coupled:
    """Of a micro-batch whose pairs' losses depend on the other pairs: what came of the batch as a whole. ``logps`` and ``sums`` [documents] are the loss's
    derivatives by these, ``measured`` its share of each metric."""

    logps: torch.Tensor
    sums: torch.Tensor
    measured: Measured


Share = Whole | Coupled


class Dpo:
    """See `tunewright_trainer.train.objective.Optimised`."""

    def __init__(self, options: Options, before: Reference) -> None:
        self._options = options
        self._before = before

    def shares(self, tuned: Tuned, parts: Parts, world: World) -> Sequence[Sequence[Share]]:
        """What pairs of the whole batch must be known for is computed before the gradients: so accumulation is the big batch, whatever the loss."""
        rows = rows_of(parts)
        whole = Whole(len(rows), max(1, sum(_learned(row) for row in rows)))
        if not couples(self._options):
            return [[whole] * len(own) for own in parts]
        shares = iter(self._coupled(tuned, parts, world, whole))
        return [[next(shares) for _ in own] for own in parts]

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: Share) -> Measured:
        """The loss is the mean over pairs; of loss sft the mean over tokens."""
        before = None if isinstance(share_of, Coupled) else reference(self._before, batch, tail=self._options.ld_alpha)
        with documents(batch.segments):
            policy = likelihoods(tuned, batch, tail=self._options.ld_alpha)
            if isinstance(share_of, Coupled):
                torch.autograd.backward((policy.logps * share_of.logps + policy.sums * share_of.sums).sum())
                return share_of.measured
            assert before is not None
            total, measured = self.measured(policy, before, share_of)
            torch.autograd.backward(total)
        return measured

    @torch.no_grad()
    def evaluate(self, tuned: Tuned, rows: Rows, world: World) -> Measured:
        """All validation rows are one batch."""
        tuned.network.eval()
        found = world.together(range(len(rows)), lambda own: [self._both(tuned, micro_batch([rows[index]], tuned.device)) for index in own])
        policy, before = joined([one for one, _ in found]), torch.cat([one for _, one in found])
        _, measured = self.measured(policy, before, Whole(len(rows), max(1, int(policy.counts[0::2].sum()))))
        return {f"eval_{name}": value for name, value in measured.items()}

    def measured(self, policy: Documents, before: torch.Tensor, whole: Whole) -> tuple[torch.Tensor, Measured]:
        """The pairs' share of the loss of the whole batch, and of its metrics. ``before`` is `Documents.logps` of the reference."""
        pairs = Pairs(self._options, policy, before, tokens=whole.tokens, pairs=whole.pairs)
        each = losses(pairs)
        return each.sum() / whole.pairs * whole.weight, _told(pairs, each.detach(), share=whole.weight / whole.pairs)

    @torch.no_grad()
    def _both(self, tuned: Tuned, batch: MicroBatch) -> tuple[Documents, torch.Tensor]:
        """What the model says, and `Documents.logps` of the reference; on the processor."""
        before = reference(self._before, batch, tail=self._options.ld_alpha)
        with documents(batch.segments):
            return likelihoods(tuned, batch, tail=self._options.ld_alpha).to(torch.device("cpu")), before.cpu()

    def _coupled(self, tuned: Tuned, parts: Parts, world: World, whole: Whole) -> list[Share]:
        own = [self._both(tuned, micro_batch(group, tuned.device)) for group in parts[world.rank]]
        found = [one for each in world.of_each(own) for one in each]
        policy = joined([one for one, _ in found]).to(tuned.device)
        before = torch.cat([one for _, one in found]).to(tuned.device)
        leaves = policy.logps.requires_grad_(), policy.sums.requires_grad_()
        pairs = Pairs(self._options, policy, before, tokens=whole.tokens, pairs=whole.pairs)
        each = losses(pairs)
        # Loss sft alone looks at the sums.
        found_grads = torch.autograd.grad(each.sum() / whole.pairs, leaves, allow_unused=True, materialize_grads=True)
        counts = [len(group) for each in parts for group in each]
        by_logps, by_sums = (torch.split(part, [2 * count for count in counts]) for part in found_grads)
        told = (
            _told(part, some, share=1 / whole.pairs)
            for part, some in zip(_split(pairs, counts), torch.split(each.detach(), counts), strict=True)
        )
        return [Coupled(logps, sums, measured) for logps, sums, measured in zip(by_logps, by_sums, told, strict=True)]


def _learned(row: Row) -> int:
    """Tokens that are learned of a pair's chosen answer."""
    return next(row.documents).targets


def joined(parts: Sequence[Documents]) -> Documents:
    """The documents of several micro-batches."""
    return Documents(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logps", "sums", "counts")))


def _split(pairs: Pairs, each: Sequence[int]) -> Iterator[Pairs]:
    """So many pairs at a time, as they are measured."""
    parts = (torch.split(part.detach(), [2 * count for count in each]) for part in (*vars(pairs.policy).values(), pairs.before))
    for logps, sums, counts, before in zip(*parts, strict=True):
        yield Pairs(pairs.options, Documents(logps, sums, counts), before, pairs.tokens, pairs.pairs)


def _told(pairs: Pairs, each: torch.Tensor, *, share: float) -> Measured:
    """TRL's metrics. Rewards are log-ratios by beta, in nats, whatever the loss."""
    chosen, rejected = pairs.options.beta * pairs.chosen, pairs.options.beta * pairs.rejected
    told = {
        "loss": each,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.policy.logps[0::2],
        "logps/rejected": pairs.policy.logps[1::2],
    }
    return {name: float(values.detach().sum()) * share for name, values in told.items()}


def likelihoods(tuned: Tuned, batch: MicroBatch, *, tail: float | None = None) -> Documents:
    """What the model says of each document. Must be called within `attention.documents`.

    ``tail`` weighs tokens of an answer beyond the length of the shorter one of its pair (Liu et al. 2024, arXiv:2409.06411).
    """
    each = -cross_entropy(loss.forward(tuned, batch), batch.targets, reduction="none")
    counts = [document.targets for document in batch.documents]
    parts = torch.split(each, counts)
    sums = torch.stack([part.sum() for part in parts])
    if tail is None:
        return Documents(sums, sums, torch.tensor(counts, device=each.device))
    shared = [min(len(parts[at]), len(parts[at ^ 1])) for at in range(len(parts))]
    logps = torch.stack([part[:both].sum() + tail * part[both:].sum() for part, both in zip(parts, shared, strict=True)])
    return Documents(logps, sums, torch.tensor(counts, device=each.device))


@torch.no_grad()
def reference(before: Reference, batch: MicroBatch, *, tail: float | None = None) -> torch.Tensor:
    """`Documents.logps` by the model as it was before training, and without dropout."""
    with documents(batch.segments), before.as_before() as tuned, without_dropout(tuned.network):
        return likelihoods(tuned, batch, tail=tail).logps


@contextlib.contextmanager
def without_dropout(network: torch.nn.Module) -> Iterator[None]:
    """For as long as it lasts."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
