"""How a model is tuned: the objective, the tuner, and their options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from pydantic import Field, model_validator

from tunewright_crds.fields import Part
from tunewright_crds.reinforcement import MAX_REWARDS, Grpo, Ppo, RewardTerm, Rloo


class Objective(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    REWARD = "reward"
    PPO = "ppo"
    GRPO = "grpo"
    RLOO = "rloo"


class Tuner(StrEnum):
    """Each but full, qlora, dora and bitfit is a method of PEFT; most are called there as they are here."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"
    ADAMSS = "adamss"
    ADAPTION_PROMPT = "adaption-prompt"
    BEFT = "beft"
    BITFIT = "bitfit"
    BOFT = "boft"
    C3A = "c3a"
    DEFT = "deft"
    DELORA = "delora"
    FOURIERFT = "fourierft"
    FROD = "frod"
    GLORA = "glora"
    GRALORA = "gralora"
    HIRA = "hira"
    HRA = "hra"
    IA3 = "ia3"
    LILY = "lily"
    LN_TUNING = "ln-tuning"
    LOHA = "loha"
    LOKR = "lokr"
    MISS = "miss"
    OFT = "oft"
    OSF = "osf"
    PEANUT = "peanut"
    PSOFT = "psoft"
    PVERA = "pvera"
    RANDLORA = "randlora"
    ROAD = "road"
    SHIRA = "shira"
    SUPERTUNING = "supertuning"
    TINYLORA = "tinylora"
    UNILORA = "unilora"
    VBLORA = "vblora"
    VERA = "vera"
    WAVEFT = "waveft"


WHOLE: Final = (Tuner.FULL, Tuner.BITFIT)  # they change weights of the model itself, and publish all of it
LORA_FAMILY: Final = (Tuner.LORA, Tuner.QLORA, Tuner.DORA)
UNMERGED: Final = (Tuner.ADAPTION_PROMPT, Tuner.BEFT, Tuner.LILY)  # their adapters cannot be added into the weights
# Their adapters can be written as LoRA matrices.
CONVERTIBLE: Final = (
    Tuner.DORA,
    Tuner.C3A,
    Tuner.DELORA,
    Tuner.FOURIERFT,
    Tuner.GRALORA,
    Tuner.LOHA,
    Tuner.LOKR,
    Tuner.MISS,
    Tuner.PSOFT,
    Tuner.RANDLORA,
    Tuner.TINYLORA,
    Tuner.UNILORA,
    Tuner.VBLORA,
    Tuner.VERA,
    Tuner.WAVEFT,
)
MAX_OPTIONS: Final = 32


class Examples(StrEnum):
    """What an objective learns from."""

    CONVERSATIONS = "conversations"
    PREFERENCES = "preferences"  # a chosen and a rejected answer to one prompt
    PROMPTS = "prompts"  # what comes before the last answer of a conversation; the answer is what rewards may compare with


LEARNS_FROM: Final[dict[Objective, Examples]] = {
    Objective.SFT: Examples.CONVERSATIONS,
    Objective.DPO: Examples.PREFERENCES,
    Objective.REWARD: Examples.PREFERENCES,
    Objective.PPO: Examples.PROMPTS,
    Objective.GRPO: Examples.PROMPTS,
    Objective.RLOO: Examples.PROMPTS,
}
REINFORCED: Final = tuple(objective for objective, examples in LEARNS_FROM.items() if examples is Examples.PROMPTS)
"""The objectives that learn from rewards for answers of the model's own."""


class Lora(Part):
    """Options of the LoRA tuners (Hu et al. 2021, arXiv:2106.09685; with dora: Liu et al. 2024, arXiv:2402.09353)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: float = Field(
        32.0, gt=0, le=65_536, description="Scale: the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank) with rslora)."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: str = Field(
        "all-linear",
        alias="targetModules",
        max_length=1024,
        pattern=r"^[A-Za-z0-9_.-]+(,[A-Za-z0-9_.-]+)*$",
        description="Which layers get an adapter: `all-linear` (all but the output head), or names joined by commas such as q_proj,v_proj.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732).")


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
    names, at = f"[{', '.join(repr(loss.value) for loss in losses)}]", "self.method.dpo"
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


class Reward(Part):
    """Options of objective reward (Ouyang et al. 2022, arXiv:2203.02155)."""

    center_rewards_coefficient: float = Field(
        0.0,
        alias="centerRewardsCoefficient",
        ge=0,
        le=100,
        description="Adds so much of the squared sum of a pair's two rewards to its loss, which keeps rewards around 0 (Eisenstein et al. 2023): 0.01 is usual.",
    )


NEEDS_REWARDS: Final = "an objective that learns from rewards needs some: give method.rewards"


class Apart(NamedTuple):
    """Two fields of the spec whose values do not go together: not these of the one with those of the other."""

    field: str
    values: Sequence[str | bool]
    other: str
    others: Sequence[str | bool]
    because: str


def every(names: type[StrEnum], *, but: Sequence[StrEnum]) -> tuple[str, ...]:
    """The values of an enumeration without some."""
    return tuple(name.value for name in names if name not in but)


# Pairs of objective and tuner that cannot be, and why.
UNFIT: Final[dict[tuple[Objective, Tuner], str]] = {
    (Objective.DPO, Tuner.FULL): "objective dpo needs tuner lora or qlora: what the model was before is itself without its adapter; "
    "full would need a second copy of it",
    (
        Objective.REWARD,
        Tuner.QLORA,
    ): "objective reward needs tuner lora or full: a reward model is published whole, over weights that are not in 4 bits",
}

# More that does not go together, in terms of any two fields of a job's spec.
APART: Final[tuple[Apart, ...]] = (
    Apart("method.tuner", UNMERGED, "output.formats", ("merged",), "an adapter of this tuner cannot be merged: take format adapter"),
    Apart(
        "method.tuner",
        (Tuner.BITFIT,),
        "method.objective",
        every(Objective, but=(Objective.SFT,)),
        "tuner bitfit is for objective sft: it has no adapter to be set aside, and trains no head",
    ),
    Apart(
        "method.objective",
        (Objective.REWARD,),
        "method.tuner",
        every(Tuner, but=(Tuner.FULL, *LORA_FAMILY)),
        "objective reward needs tuner lora, dora or full",
    ),
)

# Fields of `method` that hold options, and the objectives that these are for.
OPTIONS: Final[dict[str, tuple[Objective, ...]]] = {
    "dpo": (Objective.DPO,),
    "reward": (Objective.REWARD,),
    "ppo": (Objective.PPO,),
    "grpo": (Objective.GRPO,),
    "rloo": (Objective.RLOO,),
    "rewards": REINFORCED,
}
# The same for tuners.
TUNER_OPTIONS: Final[dict[str, tuple[Tuner, ...]]] = {"lora": LORA_FAMILY}
NO_OPTIONS: Final = f"tuner {' and '.join(WHOLE)} have no options: leave method.options out"


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def misplaced(field: str) -> str:
    """What is said of options of another objective than the job's."""
    names = either(OPTIONS[field])
    return f"{field} holds options of objective {names}: set objective: {OPTIONS[field][0]}, or leave them out"


def misplaced_of_tuner(field: str) -> str:
    """What is said of options of another tuner than the job's."""
    return f"{field} holds options of tuner {either(TUNER_OPTIONS[field])}; those of other tuners stand in method.options"


class Method(Part):
    """How the model is tuned.

    The tuner decides which weights change. lora, the default, trains a small adapter beside the frozen base; the base is shared by
    all adapters where they are served. qlora does the same over a base held in 4 bits, for models that would not fit otherwise; it
    needs a GPU. full trains every weight, needs about eight times the memory, and publishes a whole model. bitfit trains the biases of a
    model that has some (GPT-2, Qwen2). dora splits weights into size and direction. ia3 and ln-tuning train least. The others are the
    methods of PEFT, by its names.

    options are those of the tuner's config class in PEFT, by its names: {r: 8} with loha, {num_virtual_tokens: 16} with prompt. What PEFT
    does not know is refused before a pod with a GPU is made.

    lora.rank sets the adapter's size and lora.alpha / lora.rank its scale: more rank for tasks far from what the base knows.
    lora.targetModules takes all linear layers but the output head; lora.dropout helps against small data being learned by heart.
    The objective is what is optimised. sft, supervised fine-tuning: the responses are learned, the prompts only read (see
    spec.dataset.trainOn). dpo, direct preference optimisation: from pairs of a chosen and a rejected answer to one prompt, to prefer the chosen
    one, without going further than need be from what the model was; usually done with a model that sft has tuned. reward: from such pairs, to judge
    answers by a number, the higher the better; what comes of it is no language model but a judge, which reinforcement learning asks. ppo,
    grpo and rloo: the model answers the prompts of the data itself, and learns to answer as it is rewarded (see rewards), for which an answer of the data
    may be compared with its own.
    """

    objective: Objective = Field(
        Objective.SFT,
        description="What is optimised: sft (supervised fine-tuning on the responses), dpo (preferring the chosen answer of a pair to the rejected one; lora and qlora only), reward (a model that judges answers, from the same pairs; full and lora only), "
        "ppo (rewards for answers of the model's own, compared with what a value head expects), grpo or rloo (the same, each compared with others to the same prompt).",
    )
    tuner: Tuner = Field(
        Tuner.LORA,
        description="Which weights change: full (all), bitfit (biases), lora (an adapter), qlora (an adapter over a base in 4 bits; needs a GPU), or another adapter of PEFT.",
    )
    lora: Lora = Field(default_factory=Lora, description="Options of lora, qlora and dora.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        max_length=MAX_OPTIONS,
        description="Further options of an adapter, by the names of its config class in PEFT.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    dpo: Dpo = Field(default_factory=Dpo, description="Options of objective dpo.")
    reward: Reward = Field(default_factory=Reward, description="Options of objective reward.")
    ppo: Ppo = Field(default_factory=Ppo, description="Options of objective ppo.")
    grpo: Grpo = Field(default_factory=Grpo, description="Options of objective grpo.")
    rloo: Rloo = Field(default_factory=Rloo, description="Options of objective rloo.")
    rewards: list[RewardTerm] = Field(
        default_factory=list, max_length=MAX_REWARDS, description="What answers are rewarded for, with objectives that learn from rewards."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Method":
        for field, objectives in OPTIONS.items():
            if self.objective not in objectives and (options := getattr(self, field)) != type(options)():
                raise ValueError(misplaced(field))
        for field, tuners in TUNER_OPTIONS.items():
            if self.tuner not in tuners and (options := getattr(self, field)) != type(options)():
                raise ValueError(misplaced_of_tuner(field))
        if self.options and self.tuner in WHOLE:
            raise ValueError(NO_OPTIONS)
        if unfit := UNFIT.get((self.objective, self.tuner)):
            raise ValueError(unfit)
        if self.objective in REINFORCED and not self.rewards:
            raise ValueError(NEEDS_REWARDS)
        return self

    @property
    def examples(self) -> Examples:
        """What the objective learns from."""
        return LEARNS_FROM[self.objective]
