"""Learning from rewards: what is rewarded, and the options of the objectives that learn from it."""

from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, Rules
from tunewright_crds.rules import CEL, AnswerRule

MAX_REWARDS: Final = 16
_WEIGHTLESS: Final = "a reward of weight 0 rewards nothing: leave it out"


class RewardTerm(AnswerRule, json_schema_extra=Rules(*CEL, ("self.weight != 0.0", _WEIGHTLESS))):
    """Something that an answer is rewarded for. Rules give 1 where the answer follows them, and 0 where not; white space around an answer does not count."""

    weight: float = Field(1.0, ge=-1000, le=1000, description="What it is multiplied by before all are added up; below 0 it is a penalty.")

    @model_validator(mode="after")
    def _rewards_something(self) -> "RewardTerm":
        if not self.weight:
            raise ValueError(_WEIGHTLESS)
        return self


class Sampling(Part):
    """How a model's own answers are drawn."""

    max_new_tokens: int = Field(
        256,
        alias="maxNewTokens",
        ge=1,
        le=32_768,
        description="Longest answer, in tokens; the prompt (up to dataset.maxLength) comes on top.",
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="Temperature at which answers are drawn; validation takes the likeliest tokens."
    )


_CLIP: Final = "How far from 1 the ratio of new to old probabilities still counts (Schulman et al. 2017, arXiv:1707.06347)."


class Ppo(Sampling):
    """Options of objective ppo (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019 and Ouyang et al. 2022)."""

    epochs: int = Field(4, ge=1, le=100, description="Passes over the answers of a step.")
    mini_batches: int = Field(
        1,
        alias="miniBatches",
        ge=1,
        le=1024,
        description="Optimizer steps in each pass, each over its share of the answers; at most batchSize.",
    )
    clip: float = Field(0.2, gt=0, le=1, description=_CLIP)
    value_clip: float = Field(0.2, alias="valueClip", gt=0, le=1000, description="How far from what it was a value still counts.")
    value_coefficient: float = Field(0.1, alias="valueCoefficient", gt=0, le=100, description="Weight of the loss of the values.")
    gae_lambda: float = Field(
        0.95,
        alias="lambda",
        ge=0,
        le=1,
        description="Of generalised advantage estimation (Schulman et al. 2016): 1 looks at what an answer got, 0 at the next value only. Nothing is discounted.",
    )
    kl_coefficient: float = Field(
        0.05,
        alias="klCoefficient",
        ge=0,
        le=100,
        description="Penalty for each nat by which a token became likelier than by the model before training; where klTarget is set, that of the first step.",
    )
    kl_target: float = Field(
        6.0,
        alias="klTarget",
        ge=0,
        le=10_000,
        description="Divergence (KL) of a whole answer, in nats, that the coefficient is adapted towards (Ziegler et al. 2019, arXiv:1909.08593); 0 leaves it fixed.",
    )
    kl_horizon: int = Field(
        10_000,
        alias="klHorizon",
        ge=1,
        le=100_000_000,
        description="Answers within which the coefficient adapts: fewer, and it does so faster.",
    )
    kl_limit: float = Field(
        0.0,
        alias="klLimit",
        ge=0,
        le=1000,
        description="Ends the passes over the answers of a step once a token's probability has changed by more than this many nats in the mean; 0: none.",
    )
    missing_end_penalty: float = Field(
        0.0, alias="missingEndPenalty", ge=0, le=1000, description="Taken off the reward of an answer that did not end within maxNewTokens."
    )


class LossType(StrEnum):
    DAPO = "dapo"
    GRPO = "grpo"
    DR_GRPO = "dr-grpo"


class ScaleRewards(StrEnum):
    GROUP = "group"
    BATCH = "batch"
    NONE = "none"


class Grpo(Sampling):
    """Options of objective grpo (Shao et al. 2024, arXiv:2402.03300)."""

    generations: int = Field(8, ge=2, le=256, description="Answers drawn to each prompt, which are compared with one another.")
    beta: float = Field(
        0.0, ge=0, le=100, description="Weight of the divergence (KL) from what the model was, in the loss; 0 needs no reference."
    )
    clip: float = Field(0.2, gt=0, le=1, description=_CLIP)
    iterations: int = Field(1, ge=1, le=100, description="Optimizer steps on the same answers.")
    scale_rewards: ScaleRewards = Field(
        ScaleRewards.GROUP,
        alias="scaleRewards",
        description="What advantages are divided by: the standard deviation of the rewards of their group (of one prompt), of the batch, or nothing.",
    )
    loss_type: LossType = Field(
        LossType.DAPO,
        alias="lossType",
        description="What the loss is the mean over: dapo all tokens (Yu et al. 2025), grpo the tokens of each answer and then answers, dr-grpo "
        "maxNewTokens for each answer (Liu et al. 2025), so that length changes nothing.",
    )


class Rloo(Sampling):
    """Options of objective rloo (Ahmadian et al. 2024, arXiv:2402.14740)."""

    generations: int = Field(
        4, ge=2, le=256, description="Answers drawn to each prompt: each is compared with the mean reward of the others."
    )
    beta: float = Field(0.05, ge=0, le=100, description="Weight of the divergence (KL) from what the model was, in the reward.")
    clip: float = Field(0.2, gt=0, le=1, description=_CLIP)
    iterations: int = Field(1, ge=1, le=100, description="Optimizer steps on the same answers.")
