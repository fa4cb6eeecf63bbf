"""How a tuned model is measured, what it must reach to be published, and what was found."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, Rules
from tunewright_crds.method import Objective, either
from tunewright_crds.rules import MAX_RULES, AnswerRule

MAX_METRICS: Final = 32
MAX_SHOTS: Final = 32
TEST: Final = "test"  # the task of answering the test rows, with no example shown before


class MetricName(StrEnum):
    """What can be measured on the test rows. Shares are from 0 to 1, bleu and chrf from 0 to 100."""

    LOSS = "loss"
    PERPLEXITY = "perplexity"
    TOKEN_ACCURACY = "token_accuracy"
    EXACT_MATCH = "exact_match"
    F1 = "f1"
    ROUGE_L = "rouge_l"
    BLEU = "bleu"
    CHRF = "chrf"
    ACCURACY = "accuracy"
    MACRO_PRECISION = "macro_precision"
    MACRO_RECALL = "macro_recall"
    MACRO_F1 = "macro_f1"
    PREFERENCE_ACCURACY = "preference_accuracy"
    PROMPT_LEVEL_STRICT = "prompt_level_strict_acc"
    INST_LEVEL_STRICT = "inst_level_strict_acc"
    PROMPT_LEVEL_LOOSE = "prompt_level_loose_acc"
    INST_LEVEL_LOOSE = "inst_level_loose_acc"


LOWER_IS_BETTER: Final = frozenset({MetricName.LOSS, MetricName.PERPLEXITY})

# What is measured of a model that was tuned for an objective; others are not measured.
MEASURES: Final[dict[Objective, tuple[MetricName, ...]]] = {
    Objective.SFT: tuple(name for name in MetricName if name is not MetricName.PREFERENCE_ACCURACY),
    Objective.DPO: tuple(MetricName),
    Objective.REWARD: (MetricName.PREFERENCE_ACCURACY,),
}

# Fields of `evaluation` without which some things are not measured.
MEASURED_WITH: Final[dict[str, tuple[MetricName, ...]]] = {
    "rules": (
        MetricName.PROMPT_LEVEL_STRICT,
        MetricName.INST_LEVEL_STRICT,
        MetricName.PROMPT_LEVEL_LOOSE,
        MetricName.INST_LEVEL_LOOSE,
    ),
}


class Classification(StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


_NO_BOUND: Final = "give min, max or betterThanBase: without any of them nothing is required"
_NO_ROOM: Final = "min must not be above max"


class Requirement(
    Part,
    json_schema_extra=Rules(
        ("has(self.min) || has(self.max) || self.betterThanBase", _NO_BOUND),
        ("!has(self.min) || !has(self.max) || self.min <= self.max", _NO_ROOM),
    ),
):
    """What the tuned model must reach."""

    metric: MetricName = Field(description="What is measured: shares (0 to 1), but loss, perplexity, and bleu and chrf (0 to 100).")
    few_shot: int = Field(
        0, alias="fewShot", ge=0, le=MAX_SHOTS, description="With so many examples shown before each prompt; one of evaluation.fewShot."
    )
    min: float | None = Field(None, description="The least that it may be.")
    max: float | None = Field(None, description="The most that it may be.")
    better_than_base: bool = Field(
        False, alias="betterThanBase", description="The tuned model must be better than the base model: lower in loss and perplexity."
    )

    @model_validator(mode="after")
    def _require_something(self) -> "Requirement":
        if self.min is None and self.max is None and not self.better_than_base:
            raise ValueError(_NO_BOUND)
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(_NO_ROOM)
        return self

    @property
    def task(self) -> str:
        """The task that it is measured in."""
        return task_name(self.few_shot)


_DISABLED: Final = "require is for an evaluation that is enabled"
_NO_BASE: Final = "betterThanBase needs compareWithBase: true"
_NO_SUCH_TASK: Final = "require takes a fewShot that is not measured: add it to evaluation.fewShot"


def _without(field: str) -> str:
    return f"require names {either(MEASURED_WITH[field])}, for which evaluation.{field} must be given"


def _cel(names: Iterable[str]) -> str:
    return f"[{', '.join(repr(str(name)) for name in names)}]"


class Evaluation(
    Part,
    json_schema_extra=Rules(
        # The server checks the default, an empty object, as it stands.
        ("!has(self.require) || self.require.size() == 0 || self.enabled", _DISABLED),
        ("!has(self.require) || self.compareWithBase || self.require.all(r, !r.betterThanBase)", _NO_BASE),
        ("!has(self.require) || self.require.all(r, r.fewShot in self.fewShot)", _NO_SUCH_TASK),
        *(
            (f"!has(self.require) || size(self.{field}) > 0 || self.require.all(r, !(r.metric in {_cel(names)}))", _without(field))
            for field, names in MEASURED_WITH.items()
        ),
    ),
):
    """How the tuned model is measured on the test rows before it is published as a TunedModel.

    Rows to test with come from dataset.testFraction or from a source with split: test; without any, the step is left out. Base and tuned
    model answer the same prompts: loss, perplexity and token_accuracy of the right answers; exact_match, f1, rouge_l, bleu and chrf of the
    model's own, greedy ones; accuracy and macro averages where answers are labels; preference_accuracy where rows are preferences. How often answers follow `rules` is
    counted in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911): prompt_level_*_acc, of the answers, those that follow all rules;
    inst_level_*_acc, of the rules over all answers, those that are followed; strict as the answer is, loose also without its first or last line, or without asterisks.

    A model that misses what `require` says is neither published as a TunedModel nor deployed; the job fails with code QualityTooLow, and the
    artefact stays in storage.
    """

    enabled: bool = Field(True, description="Measure the tuned model, where there are rows to test with.")
    max_examples: int = Field(
        200, alias="maxExamples", ge=1, le=100_000, description="Measure on at most so many test rows, drawn by the job's seed."
    )
    compare_with_base: bool = Field(True, alias="compareWithBase", description="Measure the base model beside the tuned one.")
    few_shot: list[Annotated[int, Field(ge=0, le=MAX_SHOTS)]] = Field(
        default_factory=lambda: [0],
        alias="fewShot",
        min_length=1,
        max_length=4,
        description="How many answered examples of the train rows are shown before each prompt; each number is a task of its own.",
    )
    max_new_tokens: int = Field(256, alias="maxNewTokens", ge=1, le=16_384, description="Longest answer that is generated, in tokens.")
    classification: Classification = Field(
        Classification.AUTO,
        description="Whether answers are labels, which are then counted by class: auto (where there are few, and they are short), always, never.",
    )
    rules: list[AnswerRule] = Field(
        default_factory=list,
        max_length=MAX_RULES,
        description="What answers shall be like: rules in the vocabulary of method.rewards. An empty answer follows none of them.",
    )
    require: list[Requirement] = Field(
        default_factory=list, max_length=16, description="What the tuned model must reach; otherwise it is not published as a TunedModel."
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> "Evaluation":
        if self.require and not self.enabled:
            raise ValueError(_DISABLED)
        if not self.compare_with_base and any(wanted.better_than_base for wanted in self.require):
            raise ValueError(_NO_BASE)
        if any(wanted.few_shot not in self.few_shot for wanted in self.require):
            raise ValueError(_NO_SUCH_TASK)
        for field, names in MEASURED_WITH.items():
            if not getattr(self, field) and any(wanted.metric in names for wanted in self.require):
                raise ValueError(_without(field))
        return self

    @property
    def tasks(self) -> dict[str, int]:
        """The tasks by name, with the number of examples that are shown."""
        return {task_name(shots): shots for shots in self.few_shot}


def task_name(shots: int) -> str:
    """The task of answering the test rows with so many examples shown before."""
    return f"{TEST}-{shots}-shot" if shots else TEST


class Measured(Part):
    """One number, of the tuned model and of its base."""

    task: str = Field(max_length=63, description="Where it was measured: test, or test-4-shot.")
    metric: str = Field(max_length=64, description="What was measured.")
    base: float | None = Field(None, description="Of the base model.")
    tuned: float = Field(description="Of the tuned model.")


class EvaluationStatus(Part):
    """What was measured."""

    metrics: list[Measured] = Field(default_factory=list, max_length=MAX_METRICS, description="Base and tuned model side by side.")
    examples: int = Field(0, ge=0, description="Test rows that were measured on.")
    report_uri: str = Field("", alias="reportUri", max_length=2048, description="The evaluation report, with intervals and answers.")


NO_TEST_ROWS: Final = "require needs rows to test with: set dataset.testFraction, or a source with split: test"


def unmeasured(objective: Objective) -> str:
    """What is said of requirements that no model of this objective is measured by."""
    if objective not in MEASURES:
        return f"the model of objective {objective} is not measured: leave evaluation.require out"
    if len(MEASURES[objective]) < len(MetricName) / 2:
        return f"of objective {objective}, evaluation.require can name {either(MEASURES[objective])}"
    return f"objective {objective} is not measured by {either([name for name in MetricName if name not in MEASURES[objective]])}"


def left_out(wanted: Evaluation, objective: Objective, *, test_examples: int) -> str:
    """Why there is nothing to measure, in words; empty where there is."""
    if not wanted.enabled:
        return "evaluation.enabled is false"
    if objective not in MEASURES:
        return f"the model of objective {objective} is not measured"
    if not test_examples:
        return "there are no rows to test with: set dataset.testFraction, or a source with split: test"
    return ""


def without_test_rows(wanted: Evaluation, *, test_examples: int) -> str:
    """Why nothing that is required can be measured with the data as it was prepared, in words; empty where it can."""
    if not wanted.require or test_examples:
        return ""
    return "require needs rows to test with, and the prepared data has none: raise dataset.testFraction, or give a source with split: test"


def unfit(wanted: Evaluation, objective: Objective) -> str:
    """Why what is required can never be met with this objective, in words; empty where it can."""
    measured = MEASURES.get(objective, ())
    return unmeasured(objective) if any(required.metric not in measured for required in wanted.require) else ""


def missed(required: Sequence[Requirement], found: Iterable[Measured]) -> list[str]:
    """Each requirement that is not met, in words that name metric, wanted and found."""
    by_name = {(measured.task, measured.metric): measured for measured in found}
    return [text for wanted in required if (text := _missed(wanted, by_name.get((wanted.task, wanted.metric.value))))]


def _missed(wanted: Requirement, found: Measured | None) -> str:
    name = wanted.metric.value if wanted.task == TEST else f"{wanted.metric.value} of {wanted.task}"
    if found is None:
        return f"{name} is required and was not measured"
    if wanted.min is not None and not found.tuned >= wanted.min:
        return f"{name} is {found.tuned:.4g}, and at least {wanted.min:g} is required"
    if wanted.max is not None and not found.tuned <= wanted.max:
        return f"{name} is {found.tuned:.4g}, and at most {wanted.max:g} is required"
    if wanted.better_than_base and (found.base is None or not _better(wanted.metric, found.tuned, found.base)):
        told = "not measured" if found.base is None else f"{found.base:.4g}"
        return f"{name} is {found.tuned:.4g}, and must be better than the base model's, which is {told}"
    return ""


def _better(metric: MetricName, tuned: float, base: float) -> bool:
    return tuned < base if metric in LOWER_IS_BETTER else tuned > base
