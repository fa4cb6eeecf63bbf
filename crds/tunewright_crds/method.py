"""How a model is tuned: the objective, the tuner, and their options."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part


class Objective(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    REWARD = "reward"


class Tuner(StrEnum):
    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class Examples(StrEnum):
    """What an objective learns from."""

    CONVERSATIONS = "conversations"
    PREFERENCES = "preferences"  # a chosen and a rejected answer to one prompt


LEARNS_FROM: Final[dict[Objective, Examples]] = {
    Objective.SFT: Examples.CONVERSATIONS,
    Objective.DPO: Examples.PREFERENCES,
    Objective.REWARD: Examples.PREFERENCES,
}


class Lora(Part):
    """Options of the LoRA tuners (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: float = Field(
        32, gt=0, le=65_536, description="Scale: the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank) with rslora)."
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


class Dpo(Part):
    """Options of objective dpo (Rafailov et al. 2023, arXiv:2305.18290)."""

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
        description="Share of the pairs that are expected to be the wrong way round (conservative DPO: Mitchell 2023).",
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


# Pairs of objective and tuner that cannot be, and why.
UNFIT: Final[dict[tuple[Objective, Tuner], str]] = {
    (Objective.DPO, Tuner.FULL): "objective dpo needs tuner lora or qlora: what the model was before is itself without its adapter; "
    "full would need a second copy of it",
    (
        Objective.REWARD,
        Tuner.QLORA,
    ): "objective reward needs tuner lora or full: a reward model is published whole, over weights that are not in 4 bits",
}

# Fields of `method` that hold options, and the objectives that these are for.
OPTIONS: Final[dict[str, tuple[Objective, ...]]] = {"dpo": (Objective.DPO,), "reward": (Objective.REWARD,)}


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def misplaced(field: str) -> str:
    """What is said of options of another objective than the job's."""
    names = either(OPTIONS[field])
    return f"{field} holds options of objective {names}: set objective: {OPTIONS[field][0]}, or leave them out"


class Method(Part):
    """How the model is tuned.

    The tuner decides which weights change. lora, the default, trains a small adapter beside the frozen base; the base is shared by
    all adapters where they are served. qlora does the same over a base held in 4 bits, for models that would not fit otherwise; it
    needs a GPU. full trains every weight, needs about eight times the memory, and publishes a whole model.

    lora.rank sets the adapter's size and lora.alpha / lora.rank its scale: more rank for tasks far from what the base knows.
    lora.targetModules takes all linear layers but the output head; lora.dropout helps against small data being learned by heart.
    The objective is what is optimised. sft, supervised fine-tuning: the responses are learned, the prompts only read (see
    spec.dataset.trainOn). dpo, direct preference optimisation: from pairs of a chosen and a rejected answer to one prompt, to prefer the chosen
    one, without going further than need be from what the model was; usually done with a model that sft has tuned. reward: from such pairs, to judge
    answers by a number, the higher the better; what comes of it is no language model but a judge, which reinforcement learning asks.
    """

    objective: Objective = Field(
        Objective.SFT,
        description="What is optimised: sft (supervised fine-tuning on the responses), dpo (preferring the chosen answer of a pair to the rejected one; lora and qlora only), or reward (a model that judges answers, from the same pairs; full and lora only).",
    )
    tuner: Tuner = Field(
        Tuner.LORA,
        description="Which weights change: full (all), lora (an adapter), qlora (an adapter over a base in 4 bits; needs a GPU).",
    )
    lora: Lora = Field(default_factory=Lora, description="Options of lora and qlora.")
    dpo: Dpo = Field(default_factory=Dpo, description="Options of objective dpo.")
    reward: Reward = Field(default_factory=Reward, description="Options of objective reward.")

    @model_validator(mode="after")
    def _fit_together(self) -> "Method":
        for field, objectives in OPTIONS.items():
            if self.objective not in objectives and (options := getattr(self, field)) != type(options)():
                raise ValueError(misplaced(field))
        if unfit := UNFIT.get((self.objective, self.tuner)):
            raise ValueError(unfit)
        return self

    @property
    def examples(self) -> Examples:
        """What the objective learns from."""
        return LEARNS_FROM[self.objective]
