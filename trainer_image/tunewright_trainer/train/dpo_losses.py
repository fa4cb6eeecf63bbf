"""The losses of direct preference optimisation, as TRL computes them; each with its paper.

All are functions of `Pairs` and give [pairs], of which the mean is the loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.functional import logsigmoid

from tunewright_crds.preference import Dpo, DpoLoss, FDivergence

_MOST_EXPONENT: Final = 80.0  # exp of more is no number in fp32


@dataclass(frozen=True)
class Documents:
    """What a model says of documents [documents], chosen, rejected, chosen, ...: ``logps``, log-probabilities of what is learned of each in nats, tokens beyond
    those that both answers have weighed by ``ldAlpha``; ``sums``, the same unweighed; ``counts``, the tokens learned."""

    logps: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device) -> "Documents":
        """The same, on this device."""
        return Documents(self.logps.to(device), self.sums.to(device), self.counts.to(device))


@dataclass(frozen=True)
class Pairs:
    """What the losses are of. ``chosen`` and ``rejected`` [pairs] are log-ratios: log-probabilities less those of the reference."""

    options: Dpo
    policy: Documents
    before: torch.Tensor
    """Log-probabilities by the reference, as `Documents.logps`."""
    tokens: int
    """Learned tokens of the chosen answers of the whole batch, by which loss sft is divided; of ``pairs``."""
    pairs: int

    @property
    def chosen(self) -> torch.Tensor:
        return self.policy.logps[0::2] - self.before[0::2]

    @property
    def rejected(self) -> torch.Tensor:
        return self.policy.logps[1::2] - self.before[1::2]

    @property
    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-ratios of both as the divergence from the reference measures them: f'(ratio) (Wang et al. 2023, arXiv:2309.16240)."""
        return self._scored(self.chosen), self._scored(self.rejected)

    @property
    def margins(self) -> torch.Tensor:
        chosen, rejected = self.scores
        return self.options.beta * (chosen - rejected)

    def _scored(self, ratios: torch.Tensor) -> torch.Tensor:
        power = self.options.f_alpha_divergence_coef - 1
        match self.options.f_divergence:
            case FDivergence.FORWARD_KL:
                return 1 - torch.exp(-ratios)
            case FDivergence.JS:
                return math.log(2) + logsigmoid(ratios)
            case FDivergence.ALPHA if abs(power) >= 1e-6:
                return (torch.exp(torch.clamp(power * ratios, max=_MOST_EXPONENT)) - 1) / power
            case _:
                return ratios


def _doubted(margins: torch.Tensor, doubt: float) -> torch.Tensor:
    return -(1 - doubt) * logsigmoid(margins) - doubt * logsigmoid(-margins)


def _sigmoid(pairs: Pairs) -> torch.Tensor:
    """Rafailov et al. 2023, arXiv:2305.18290; with label smoothing Mitchell 2023."""
    return _doubted(pairs.margins, pairs.options.label_smoothing)


def _hinge(pairs: Pairs) -> torch.Tensor:
    """Zhao et al. 2023, arXiv:2305.10425."""
    return torch.relu(1 - pairs.margins)


def _per_token(pairs: Pairs) -> torch.Tensor:
    chosen, rejected = pairs.scores
    return chosen / pairs.policy.counts[0::2] - rejected / pairs.policy.counts[1::2]


def _ipo(pairs: Pairs) -> torch.Tensor:
    """Azar et al. 2023, arXiv:2310.12036, with mean log-ratios of tokens."""
    return (_per_token(pairs) - 1 / (2 * pairs.options.beta)) ** 2


def _sigmoid_norm(pairs: Pairs) -> torch.Tensor:
    """Sigmoid of mean log-ratios of tokens (Meng et al. 2024, arXiv:2405.14734, with a reference)."""
    return -logsigmoid(pairs.options.beta * _per_token(pairs))


def _exo_pair(pairs: Pairs) -> torch.Tensor:
    """Ji et al. 2024, arXiv:2402.00856, equation 16."""
    margins, doubt = pairs.margins, pairs.options.label_smoothing
    wins = torch.sigmoid(margins) * (logsigmoid(margins) - math.log1p(-doubt))
    return wins + torch.sigmoid(-margins) * (logsigmoid(-margins) - math.log(doubt))


def _nca_pair(pairs: Pairs) -> torch.Tensor:
    """Chen et al. 2024, arXiv:2402.05369."""
    chosen, rejected = pairs.options.beta * pairs.chosen, pairs.options.beta * pairs.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(pairs: Pairs) -> torch.Tensor:
    """Chowdhury et al. 2024, arXiv:2403.00409."""
    margins, doubt = pairs.margins, pairs.options.label_smoothing
    return (-(1 - doubt) * logsigmoid(margins) + doubt * logsigmoid(-margins)) / (1 - 2 * doubt)


def _bco_pair(pairs: Pairs) -> torch.Tensor:
    """Jung et al. 2024, arXiv:2404.04656, without a running mean, as TRL has it for pairs."""
    return -logsigmoid(pairs.options.beta * pairs.chosen) - logsigmoid(-pairs.options.beta * pairs.rejected)


def _sppo_hard(pairs: Pairs) -> torch.Tensor:
    """Wu et al. 2024, arXiv:2405.00675, with certain winners."""
    aim = 0.5 / pairs.options.beta
    return (pairs.chosen - aim) ** 2 + (pairs.rejected + aim) ** 2


def _aot(pairs: Pairs) -> torch.Tensor:
    """Melnyk et al. 2024, arXiv:2406.05882: margins of the policy and of the reference, each in order."""
    margins, before = (all_of[0::2] - all_of[1::2] for all_of in (pairs.policy.logps, pairs.before))
    return _doubted(pairs.options.beta * (torch.sort(margins).values - torch.sort(before).values), pairs.options.label_smoothing)


def _aot_unpaired(pairs: Pairs) -> torch.Tensor:
    """Melnyk et al. 2024: log-ratios of the chosen and of the rejected answers, each in order."""
    margins = torch.sort(pairs.chosen).values - torch.sort(pairs.rejected).values
    return _doubted(pairs.options.beta * margins, pairs.options.label_smoothing)


def _apo_zero(pairs: Pairs) -> torch.Tensor:
    """D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7."""
    return 1 - torch.sigmoid(pairs.options.beta * pairs.chosen) + torch.sigmoid(pairs.options.beta * pairs.rejected)


def _apo_down(pairs: Pairs) -> torch.Tensor:
    """D'Oosterlinck et al. 2024, equation 8."""
    chosen, beta = pairs.chosen, pairs.options.beta
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - pairs.rejected))


def _discopop(pairs: Pairs) -> torch.Tensor:
    """Lu et al. 2024, arXiv:2406.08414, equation 5."""
    margins = pairs.margins
    share = torch.sigmoid(margins / pairs.options.discopop_tau)
    return -logsigmoid(margins) * (1 - share) + torch.exp(-margins) * share


def _sft(pairs: Pairs) -> torch.Tensor:
    """Mean cross-entropy of the tokens of chosen answers (RPO: Pang et al. 2024, arXiv:2404.19733)."""
    return -pairs.policy.sums[0::2] * (pairs.pairs / pairs.tokens)


_LOSSES: Final[dict[DpoLoss, Callable[[Pairs], torch.Tensor]]] = {
    DpoLoss.SIGMOID: _sigmoid,
    DpoLoss.HINGE: _hinge,
    DpoLoss.IPO: _ipo,
    DpoLoss.EXO_PAIR: _exo_pair,
    DpoLoss.NCA_PAIR: _nca_pair,
    DpoLoss.ROBUST: _robust,
    DpoLoss.BCO_PAIR: _bco_pair,
    DpoLoss.SPPO_HARD: _sppo_hard,
    DpoLoss.AOT: _aot,
    DpoLoss.AOT_UNPAIRED: _aot_unpaired,
    DpoLoss.APO_ZERO: _apo_zero,
    DpoLoss.APO_DOWN: _apo_down,
    DpoLoss.DISCOPOP: _discopop,
    DpoLoss.SFT: _sft,
    DpoLoss.SIGMOID_NORM: _sigmoid_norm,
}
_COUPLED: Final = {DpoLoss.AOT, DpoLoss.AOT_UNPAIRED}


def couples(options: Dpo) -> bool:
    """Whether the loss of a pair depends on the other pairs of its batch."""
    return any(loss in _COUPLED for loss, _ in options.weighed)


def losses(pairs: Pairs) -> torch.Tensor:
    """[pairs], each loss by its weight. Where pairs are coupled these must be all of a batch."""
    return torch.stack([weight * _LOSSES[loss](pairs) for loss, weight in pairs.options.weighed]).sum(0)
