"""Options of the objectives that learn from preferences: dpo, kto and reward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, cel_list


class DpoLoss(StrEnum):
    """Losses of objective dpo, by TRL's names."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    EXO_PAIR = "exo_pair"
    NCA_PAIR = "nca_pair"
    ROBUST = "robust"
    BCO_PAIR = "bco_pair"
    SPPO_HARD = "sppo_hard"
    AOT = "aot"
    AOT_UNPAIRED = "aot_unpaired"
    APO_ZERO = "apo_zero"
    APO_DOWN = "apo_down"
    DISCOPOP = "discopop"
    SFT = "sft"
    SIGMOID_NORM = "sigmoid_norm"


class FDivergence(StrEnum):
    """How far a model is from its reference."""

    REVERSE_KL = "reverse_kl"
    FORWARD_KL = "forward_kl"
    JS = "js_divergence"
    ALPHA = "alpha_divergence"


class WeightedLoss(Part):
    """One of several losses."""

    type: DpoLoss = Field(description="One of the losses that `loss` may be.")
    weight: float = Field(1.0, gt=0, le=1000, description="By which it is multiplied.")


_SMOOTHED: Final = (DpoLoss.SIGMOID, DpoLoss.EXO_PAIR, DpoLoss.ROBUST, DpoLoss.AOT, DpoLoss.AOT_UNPAIRED)
_DIVERGENT: Final = (
    DpoLoss.SIGMOID,
    DpoLoss.SIGMOID_NORM,
    DpoLoss.HINGE,
    DpoLoss.IPO,
    DpoLoss.EXO_PAIR,
    DpoLoss.ROBUST,
    DpoLoss.DISCOPOP,
)


class Dpo(Part):
    """Options of objective dpo (Rafailov et al. 2023, arXiv:2305.18290)."""

    loss: DpoLoss = Field(
        DpoLoss.SIGMOID,
        description="What is minimised over pairs: sigmoid (DPO's own), hinge (SLiC), ipo (means of tokens, squared: does not overfit to pairs that all agree on), exo_pair, "
        "nca_pair, robust (labels of which a known share is wrong), bco_pair, sppo_hard, aot, aot_unpaired (distributions instead of pairs: the pairs of a batch "
        "are compared in order of their margins, which takes another forward pass), apo_zero, apo_down (the chosen answers are better, or worse, than the model's own), "
        "discopop, sft (cross-entropy of the chosen answers; of use beside others), sigmoid_norm (means of tokens: long answers weigh no more).",
    )
    losses: list[WeightedLoss] = Field(
        default_factory=list,
        max_length=8,
        description="Several losses, whose weighted sum is minimised, instead of `loss`: [{type: sigmoid, weight: 0.8}, {type: sft}].",
    )
    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="How strongly the model is held to what it was: the lower, the further it may go for the sake of the preferences.",
    )
    label_smoothing: float = Field(
        0.0,
        alias="labelSmoothing",
        ge=0,
        le=0.5,  # the API server compares a whole number, such as 0, with the bound's whole part
        description="Share of the pairs that are expected to be the wrong way round, with losses sigmoid (conservative DPO: Mitchell 2023), robust, exo_pair, aot and aot_unpaired.",
    )
    ld_alpha: float | None = Field(
        None,
        alias="ldAlpha",
        ge=0,
        le=1,
        description="Weight of the tokens of an answer beyond the length of the other one (LD-DPO: Liu et al. 2024, arXiv:2409.06411): 0 leaves them out. Default: 1.",
    )
    f_divergence: FDivergence = Field(
        FDivergence.REVERSE_KL,
        alias="fDivergence",
        description="Divergence by which the model is held to what it was (Wang et al. 2023, arXiv:2309.16240), with losses sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop.",
    )
    f_alpha_divergence_coef: float = Field(
        0.5, alias="fAlphaDivergenceCoef", ge=-100, le=100, description="Alpha of fDivergence alpha_divergence; 1 is reverse_kl."
    )
    discopop_tau: float = Field(
        0.05, alias="discopopTau", gt=0, le=100, description="Temperature at which loss discopop turns from logistic to exponential."
    )

    @property
    def weighed(self) -> list[tuple[DpoLoss, float]]:
        """The losses with their weights."""
        return [(one.type, one.weight) for one in self.losses] or [(self.loss, 1.0)]

    @model_validator(mode="after")
    def _have_an_effect(self) -> "Dpo":
        for rule in DPO_RULES:
            if not rule.holds(self):
                raise ValueError(rule.said)
        return self


@dataclass(frozen=True)
class DpoRule:
    """What options of dpo must fulfil: in CEL at ``self.method.dpo``, and in Python."""

    cel: str
    holds: Callable[[Dpo], bool]
    said: str


def _some(losses: Sequence[DpoLoss]) -> str:
    """CEL: one of the losses is among these."""
    names, at = cel_list(losses), "self.method.dpo"
    return f"({at}.losses.size() > 0 ? {at}.losses.exists(l, l.type in {names}) : {at}.loss in {names})"


def _is_some(dpo: Dpo, losses: Sequence[DpoLoss]) -> bool:
    return any(loss in losses for loss, _ in dpo.weighed)


def _others(losses: Sequence[DpoLoss]) -> list[DpoLoss]:
    return [loss for loss in DpoLoss if loss not in losses]


DPO_RULES: Final = (
    DpoRule(
        "self.method.dpo.losses.size() == 0 || self.method.dpo.loss == 'sigmoid'",
        lambda dpo: not dpo.losses or dpo.loss is DpoLoss.SIGMOID,
        "dpo.losses stands for dpo.loss: name the loss there, or leave one of both out",
    ),
    DpoRule(
        f"self.method.dpo.labelSmoothing == 0.0 || {_some(_SMOOTHED)}",
        lambda dpo: not dpo.label_smoothing or _is_some(dpo, _SMOOTHED),
        "dpo.labelSmoothing has an effect with losses sigmoid, exo_pair, robust, aot and aot_unpaired only",
    ),
    DpoRule(
        f"self.method.dpo.labelSmoothing > 0.0 || !{_some([DpoLoss.EXO_PAIR])}",
        lambda dpo: dpo.label_smoothing > 0 or not _is_some(dpo, [DpoLoss.EXO_PAIR]),
        "loss exo_pair needs dpo.labelSmoothing above 0, such as 0.001",
    ),
    DpoRule(
        f"self.method.dpo.labelSmoothing < 0.5 || !{_some([DpoLoss.ROBUST])}",
        lambda dpo: dpo.label_smoothing < 0.5 or not _is_some(dpo, [DpoLoss.ROBUST]),
        "loss robust needs dpo.labelSmoothing below 0.5: with half of the pairs the wrong way round there is nothing to learn",
    ),
    DpoRule(
        f"!has(self.method.dpo.ldAlpha) || {_some(_others([DpoLoss.SFT]))}",
        lambda dpo: dpo.ld_alpha is None or _is_some(dpo, _others([DpoLoss.SFT])),
        "dpo.ldAlpha has no effect with loss sft alone",
    ),
    DpoRule(
        f"self.method.dpo.fDivergence == 'reverse_kl' || ({_some(_DIVERGENT)} && !{_some(_others([*_DIVERGENT, DpoLoss.SFT]))})",
        lambda dpo: (
            dpo.f_divergence is FDivergence.REVERSE_KL
            or (_is_some(dpo, _DIVERGENT) and not _is_some(dpo, _others([*_DIVERGENT, DpoLoss.SFT])))
        ),
        "dpo.fDivergence is defined for losses sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop, and sft beside them",
    ),
    DpoRule(
        "self.method.dpo.fAlphaDivergenceCoef == 0.5 || self.method.dpo.fDivergence == 'alpha_divergence'",
        lambda dpo: dpo.f_alpha_divergence_coef == 0.5 or dpo.f_divergence is FDivergence.ALPHA,
        "dpo.fAlphaDivergenceCoef is for fDivergence alpha_divergence",
    ),
    DpoRule(
        f"self.method.dpo.discopopTau == 0.05 || {_some([DpoLoss.DISCOPOP])}",
        lambda dpo: dpo.discopop_tau == 0.05 or _is_some(dpo, [DpoLoss.DISCOPOP]),
        "dpo.discopopTau is for loss discopop",
    ),
)


class KtoLoss(StrEnum):
    """Losses of objective kto, by TRL's names."""

    KTO = "kto"
    APO_ZERO_UNPAIRED = "apo_zero_unpaired"


class Kto(Part):
    """Options of objective kto (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    loss: KtoLoss = Field(
        KtoLoss.KTO,
        description="kto compares each answer with what answers gain in the mean, which takes another forward pass over the batch; apo_zero_unpaired compares with nothing.",
    )
    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="How strongly the model is held to what it was: the lower, the further it may go for the sake of the marks.",
    )
    desirable_weight: float = Field(
        1.0,
        alias="desirableWeight",
        gt=0,
        le=1000,
        description="Weight of good answers; raise it where they are few: weights times counts should be alike.",
    )
    undesirable_weight: float = Field(1.0, alias="undesirableWeight", gt=0, le=1000, description="Weight of bad answers.")


class Reward(Part):
    """Options of objective reward (Ouyang et al. 2022, arXiv:2203.02155)."""

    center_rewards_coefficient: float = Field(
        0.0,
        alias="centerRewardsCoefficient",
        ge=0,
        le=100,
        description="Adds so much of the squared sum of a pair's two rewards to its loss, which keeps rewards around 0 (Eisenstein et al. 2023): 0.01 is usual.",
    )
