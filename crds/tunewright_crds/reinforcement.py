"""Learning from rewards: what is rewarded, and the options of the objectives that learn from it."""

import json
import re
from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, Rules

MAX_REWARDS: Final = 16
MAX_PATTERN: Final = 1024
MAX_SCHEMA: Final = 16_384


class RewardType(StrEnum):
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    JSON_SCHEMA = "json-schema"
    CONTAINS = "contains"
    STARTS_WITH = "starts-with"
    ENDS_WITH = "ends-with"
    LENGTH = "length"


class LengthUnit(StrEnum):
    CHARACTERS = "characters"
    WORDS = "words"


_WITH_TEXT: Final = (RewardType.CONTAINS, RewardType.STARTS_WITH, RewardType.ENDS_WITH)
_WITH_CASE: Final = (RewardType.EXACT_MATCH, RewardType.REGEX, *_WITH_TEXT)
_TEXT_TYPES: Final = f"[{', '.join(repr(kind.value) for kind in _WITH_TEXT)}]"
_CASE_TYPES: Final = f"[{', '.join(repr(kind.value) for kind in _WITH_CASE)}]"
_PATTERN: Final = "pattern is for type regex, which needs one"
_TEXT: Final = f"text is for types {', '.join(_WITH_TEXT)}, which need one"
_SCHEMA: Final = "schema is for type json-schema"
_BOUNDS: Final = "min, max and unit are for type length, which needs min or max"
_ORDER: Final = "min is above max: no answer could be rewarded"
_CASE: Final = f"ignoreCase is for types {', '.join(_WITH_CASE)}"
_WEIGHTLESS: Final = "a reward of weight 0 rewards nothing: leave it out"


class RewardTerm(
    Part,
    json_schema_extra=Rules(
        ("(self.type == 'regex') == (self.pattern != '')", _PATTERN),
        (f"(self.type in {_TEXT_TYPES}) == (self.text != '')", _TEXT),
        ("self.type == 'json-schema' || self.schema == ''", _SCHEMA),
        ("(self.type == 'length') == (has(self.min) || has(self.max)) && (self.type == 'length' || self.unit == 'characters')", _BOUNDS),
        ("!has(self.min) || !has(self.max) || self.min <= self.max", _ORDER),
        (f"self.type in {_CASE_TYPES} || !self.ignoreCase", _CASE),
        ("self.weight != 0.0", _WEIGHTLESS),
    ),
):
    """Something that an answer is rewarded for. Rules give 1 where the answer follows them, and 0 where not; white space around an answer does not count."""

    type: RewardType = Field(
        description="exact-match (the answer of the data, up to white space), regex (the pattern is found), json-schema (the answer is JSON that fits the "
        "schema), contains, starts-with, ends-with (the text), or length (within min and max)."
    )
    weight: float = Field(1.0, ge=-1000, le=1000, description="What it is multiplied by before all are added up; below 0 it is a penalty.")
    pattern: str = Field(
        "",
        max_length=MAX_PATTERN,
        description="Regular expression, found anywhere in the answer unless ^ or $ say otherwise. One that takes seconds for an answer fails the job.",
    )
    text: str = Field("", max_length=MAX_PATTERN, description="The text of contains, starts-with and ends-with.")
    json_schema: str = Field(
        "",
        alias="schema",
        max_length=MAX_SCHEMA,
        description="JSON Schema (draft 2020-12) as JSON text; empty: any JSON will do. References lead to the schema itself only.",
    )
    least: int | None = Field(None, alias="min", ge=0, le=10_000_000, description="Least length of the answer.")
    most: int | None = Field(None, alias="max", ge=0, le=10_000_000, description="Greatest length of the answer.")
    unit: LengthUnit = Field(LengthUnit.CHARACTERS, description="What min and max count: characters or words.")
    ignore_case: bool = Field(False, alias="ignoreCase", description="Whether small and capital letters are the same.")
    negate: bool = Field(False, description="Reward answers that do not follow the rule.")

    @model_validator(mode="after")
    def _fits_its_type(self) -> "RewardTerm":
        kind, bounds = self.type, [bound for bound in (self.least, self.most) if bound is not None]
        for wrong, what in (
            ((kind is RewardType.REGEX) != bool(self.pattern), _PATTERN),
            ((kind in _WITH_TEXT) != bool(self.text), _TEXT),
            (kind is not RewardType.JSON_SCHEMA and self.json_schema, _SCHEMA),
            ((kind is RewardType.LENGTH) != bool(bounds), _BOUNDS),
            (kind is not RewardType.LENGTH and self.unit is not LengthUnit.CHARACTERS, _BOUNDS),
            (bounds != sorted(bounds), _ORDER),
            (kind not in _WITH_CASE and self.ignore_case, _CASE),
            (not self.weight, _WEIGHTLESS),
        ):
            if wrong:
                raise ValueError(what)
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern is no regular expression: {error}") from error
        try:
            schema = json.loads(self.json_schema or "true")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"schema is not JSON: {error}") from error
        if not isinstance(schema, dict | bool):
            raise ValueError("schema is JSON, but no object")
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
