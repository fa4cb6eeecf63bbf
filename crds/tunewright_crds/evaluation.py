"""How a tuned model is measured, what it must reach to be published, and what was found."""

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, Rules, SecretName, TaskUri, cel_list
from tunewright_crds.method import REINFORCED, Objective, either
from tunewright_crds.rules import MAX_RULES, AnswerRule

MAX_METRICS: Final = 32
MAX_SHOTS: Final = 32
MAX_TASKS: Final = 8
MAX_TASK_NAME: Final = 48
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
    WIN_RATE = "win_rate"
    REWARD = "reward"


# The metrics of lm_eval's tasks, and whether more is better.
HARNESS_METRICS: Final[dict[str, bool]] = {
    "acc": True,
    "acc_norm": True,
    "acc_bytes": True,
    "acc_mutual_info": True,
    "exact_match": True,
    "f1": True,
    "mcc": True,
    "bleu": True,
    "chrf": True,
    "ter": False,
    "likelihood": True,
    "brier_score": False,
    "perplexity": False,
    "word_perplexity": False,
    "byte_perplexity": False,
    "bits_per_byte": False,
}
LOWER_IS_BETTER: Final = frozenset(
    {MetricName.LOSS.value, MetricName.PERPLEXITY.value, *(name for name, more in HARNESS_METRICS.items() if not more)}
)

_OF_ANSWERS: Final = tuple(name for name in MetricName if name not in (MetricName.PREFERENCE_ACCURACY, MetricName.REWARD))

# What is measured of a model that was tuned for an objective.
MEASURES: Final[dict[Objective, tuple[MetricName, ...]]] = {
    Objective.SFT: _OF_ANSWERS,
    Objective.DPO: (*_OF_ANSWERS, MetricName.PREFERENCE_ACCURACY),
    Objective.KTO: (*_OF_ANSWERS, MetricName.PREFERENCE_ACCURACY),
    Objective.REWARD: (MetricName.PREFERENCE_ACCURACY,),
    **dict.fromkeys(REINFORCED, (*_OF_ANSWERS, MetricName.REWARD)),
}

# Fields of `evaluation` without which some things are not measured.
MEASURED_WITH: Final[dict[str, tuple[MetricName, ...]]] = {
    "rules": (
        MetricName.PROMPT_LEVEL_STRICT,
        MetricName.INST_LEVEL_STRICT,
        MetricName.PROMPT_LEVEL_LOOSE,
        MetricName.INST_LEVEL_LOOSE,
    ),
    "judge": (MetricName.WIN_RATE,),
}
_GIVEN: Final = {"rules": "size(self.rules) > 0", "judge": "(has(self.judge) && has(self.judge.endpoint) && self.judge.endpoint != '')"}


class Classification(StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def lower_is_better(metric: str) -> bool:
    """``metric`` as it is reported: of a task of lm_eval with the filter behind a comma, where there is one."""
    return metric.partition(",")[0] in LOWER_IS_BETTER


_NO_BOUND: Final = "give min, max or betterThanBase: without any of them nothing is required"
_NO_ROOM: Final = "min must not be above max"
_UNKNOWN: Final = f"on the test rows a metric is one of {', '.join(MetricName)}; those of one of evaluation.tasks need its name in task"


class Requirement(
    Part,
    json_schema_extra=Rules(
        ("has(self.min) || has(self.max) || self.betterThanBase", _NO_BOUND),
        ("!has(self.min) || !has(self.max) || self.min <= self.max", _NO_ROOM),
        (f"self.task != '' || self.metric in {cel_list(MetricName)}", _UNKNOWN),
    ),
):
    """What the tuned model must reach."""

    metric: str = Field(
        max_length=64,
        pattern=r"^[A-Za-z0-9_.+-]+(,[A-Za-z0-9_.+-]+)?$",
        description="What is measured on the test rows: shares (0 to 1), but loss, perplexity, and bleu and chrf (0 to 100). Of a task, "
        "what it measures, by lm_eval's name: acc, or `exact_match,strict-match` for one behind a filter.",
    )
    task: str = Field("", max_length=MAX_TASK_NAME, description="Name of one of evaluation.tasks. Default: the job's own test rows.")
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
        if not self.task and self.metric not in list(MetricName):
            raise ValueError(_UNKNOWN)
        return self

    @property
    def place(self) -> str:
        """Where it is measured, as `Measured.task` tells it."""
        return task_name(self.task or TEST, self.few_shot)


_RESERVED: Final = "a task of lm_eval is not called test, nor does its name end in -<number>-shot"


class EvaluationTask(Part, json_schema_extra=Rules(("!self.name.matches('(^test|-[0-9]+-shot)$')", _RESERVED))):
    """A task of lm_eval: a folder with its YAML file, and its data beside that. Nothing is fetched from the hub, and no code of it is run."""

    name: str = Field(
        min_length=1,
        max_length=MAX_TASK_NAME,
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$",
        description="The name that the task's YAML file gives it (`task: ...`).",
    )
    uri: TaskUri = Field(description="Folder of the task, s3://bucket/path/, read with dataset.credentialsSecret.")
    chat: bool = Field(
        True,
        description="Ask in the turns of the model's chat template, as the test rows do; otherwise as bare text, as lm_eval does by itself.",
    )

    @model_validator(mode="after")
    def _told_apart(self) -> "EvaluationTask":
        if re.search(r"(^test|-[0-9]+-shot)$", self.name):
            raise ValueError(_RESERVED)
        return self


_NO_JUDGE: Final = "a judge needs endpoint and model; without them there is none, and nothing to tell it"


class Judge(
    Part,
    json_schema_extra=Rules(
        # The server checks the default, an empty object, as it stands.
        ("(has(self.endpoint) && self.endpoint != '') == (has(self.model) && self.model != '')", _NO_JUDGE),
        (
            "(has(self.endpoint) && self.endpoint != '') || ((!has(self.criteria) || self.criteria == '') "
            "&& (!has(self.apiKeySecret) || self.apiKeySecret == ''))",
            _NO_JUDGE,
        ),
    ),
):
    """Another model that compares the answers to the test rows, behind any endpoint with OpenAI's chat API.

    It is asked about each pair twice, each answer once the first to be read; one wins only if both verdicts are for it, all else is a tie. What comes of it
    is win_rate: wins, and ties by half, of the pairs. A judge that cannot be reached fails no job, unless win_rate is required.
    """

    endpoint: str = Field(
        "",
        max_length=1024,
        pattern=r"^$|^https?://[^\s@/?#]+(/[^\s?#@]*)?$",
        description="Address that /chat/completions is below, such as https://api.example.com/v1. Prompts and answers are sent there. Default: no judge.",
    )
    model: str = Field("", max_length=256, description="Name of the judging model there.")
    api_key_secret: SecretName = Field(
        "",
        alias="apiKeySecret",
        description="Secret of this namespace with OPENAI_API_KEY, which is sent as a bearer token. Default: none.",
    )
    criteria: str = Field("", max_length=2048, description="What else makes an answer better, in words that the judge is told.")
    timeout_seconds: int = Field(120, alias="timeoutSeconds", ge=1, le=3600, description="Patience with one reply.")
    parallel: int = Field(4, ge=1, le=64, description="Questions at a time.")

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Judge":
        if bool(self.endpoint) != bool(self.model) or (not self.endpoint and (self.criteria or self.api_key_secret)):
            raise ValueError(_NO_JUDGE)
        return self


_DISABLED: Final = "require is for an evaluation that is enabled"
_NO_BASE: Final = "betterThanBase needs compareWithBase: true"
_NO_SUCH_TASK: Final = "require takes a fewShot that is not measured: add it to evaluation.fewShot"
_UNKNOWN_TASK: Final = "require names a task that is none of evaluation.tasks"
_JUDGED_ALONE: Final = "a judge compares the tuned model with its base: it needs compareWithBase: true"
_TWICE: Final = "two of evaluation.tasks have one name"


def _without(field: str) -> str:
    return f"require names {either(MEASURED_WITH[field])}, for which evaluation.{field} must be given"


class Evaluation(
    Part,
    json_schema_extra=Rules(
        # The server checks the default, an empty object, as it stands.
        ("!has(self.require) || self.require.size() == 0 || self.enabled", _DISABLED),
        ("!has(self.require) || self.compareWithBase || self.require.all(r, !r.betterThanBase)", _NO_BASE),
        ("!has(self.require) || self.require.all(r, r.fewShot in self.fewShot)", _NO_SUCH_TASK),
        ("!has(self.require) || self.require.all(r, r.task == '' || self.tasks.exists(t, t.name == r.task))", _UNKNOWN_TASK),
        (f"!{_GIVEN['judge']} || self.compareWithBase", _JUDGED_ALONE),
        ("!has(self.tasks) || self.tasks.all(t, self.tasks.exists_one(other, other.name == t.name))", _TWICE),
        *(
            (
                f"!has(self.require) || {_GIVEN[field]} || self.require.all(r, r.task != '' || !(r.metric in {cel_list(names)}))",
                _without(field),
            )
            for field, names in MEASURED_WITH.items()
        ),
    ),
):
    """How the tuned model is measured on the test rows before it is published as a TunedModel.

    Rows to test with come from dataset.testFraction or from a source with split: test; without any, the step is left out. Base and tuned
    model answer the same prompts: loss, perplexity and token_accuracy of the right answers; exact_match, f1, rouge_l, bleu and chrf of the
    model's own, greedy ones; accuracy and macro averages where answers are labels; preference_accuracy where rows are preferences, or answers marked as
    good or bad; reward, by the job's own rewards, where it learned from them. How often answers follow `rules` is
    counted in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911): prompt_level_*_acc, of the answers, those that follow all rules;
    inst_level_*_acc, of the rules over all answers, those that are followed; strict as the answer is, loose also without its first or last line, or without asterisks.

    `tasks` are those of lm_eval (EleutherAI's harness), measured as it does. They need no rows to test with.

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
    tasks: list[EvaluationTask] = Field(
        default_factory=list,
        max_length=MAX_TASKS,
        description="Tasks of lm_eval that the models are put to beside the test rows, with as many examples shown as fewShot says.",
    )
    judge: Judge = Field(default_factory=Judge, description="Another model that compares the answers of base and tuned model.")
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
        if self.judge.endpoint and not self.compare_with_base:
            raise ValueError(_JUDGED_ALONE)
        names_of_tasks = [task.name for task in self.tasks]
        if len(set(names_of_tasks)) < len(names_of_tasks):
            raise ValueError(_TWICE)
        if any(wanted.task not in ("", *names_of_tasks) for wanted in self.require):
            raise ValueError(_UNKNOWN_TASK)
        given = {"rules": bool(self.rules), "judge": bool(self.judge.endpoint)}
        for field, names in MEASURED_WITH.items():
            if not given[field] and any(wanted.metric in names and not wanted.task for wanted in self.require):
                raise ValueError(_without(field))
        return self

    @property
    def rounds(self) -> dict[str, int]:
        """The tasks of answering the test rows by name, with the number of examples that are shown."""
        return {task_name(TEST, shots): shots for shots in self.few_shot}

    @property
    def needs_rows(self) -> bool:
        """Whether something is required that is measured on the test rows."""
        return any(not wanted.task for wanted in self.require)


def task_name(task: str, shots: int) -> str:
    """The task with so many examples shown before."""
    return f"{task}-{shots}-shot" if shots else task


class Measured(Part):
    """One number, of the tuned model and of its base."""

    task: str = Field(max_length=63, description="Where it was measured: test, or test-4-shot, or a task of lm_eval.")
    metric: str = Field(max_length=64, description="What was measured.")
    base: float | None = Field(None, description="Of the base model.")
    tuned: float = Field(description="Of the tuned model.")


class EvaluationStatus(Part):
    """What was measured."""

    metrics: list[Measured] = Field(default_factory=list, max_length=MAX_METRICS, description="Base and tuned model side by side.")
    examples: int = Field(0, ge=0, description="Test rows that were measured on.")
    report_uri: str = Field("", alias="reportUri", max_length=2048, description="The evaluation report, with intervals and answers.")


NO_ANSWERS: Final = "evaluation.rules, tasks and judge are for models that answer: leave them out with objective reward"
NO_TEST_ROWS: Final = "require needs rows to test with: set dataset.testFraction, or a source with split: test"


def unmeasured(objective: Objective) -> str:
    """What is said of requirements that no model of this objective is measured by."""
    if len(MEASURES[objective]) < len(MetricName) / 2:
        return f"of objective {objective}, evaluation.require can name {either(MEASURES[objective])}"
    return f"objective {objective} is not measured by {either([name for name in MetricName if name not in MEASURES[objective]])}"


def left_out(wanted: Evaluation, objective: Objective, *, test_examples: int) -> str:
    """Why there is nothing to measure, in words; empty where there is."""
    if not wanted.enabled:
        return "evaluation.enabled is false"
    if not test_examples and not wanted.tasks:
        return "there are no rows to test with: set dataset.testFraction, or a source with split: test"
    return ""


def without_test_rows(wanted: Evaluation, *, test_examples: int) -> str:
    """Why nothing that is required can be measured with the data as it was prepared, in words; empty where it can."""
    if not wanted.needs_rows or test_examples:
        return ""
    return "require needs rows to test with, and the prepared data has none: raise dataset.testFraction, or give a source with split: test"


def unfit(wanted: Evaluation, objective: Objective) -> str:
    """Why what is required can never be met with this objective, in words; empty where it can."""
    measured = MEASURES[objective]
    if objective is Objective.REWARD and (wanted.rules or wanted.tasks or wanted.judge.endpoint):
        return NO_ANSWERS
    return unmeasured(objective) if any(not required.task and required.metric not in measured for required in wanted.require) else ""


def missed(required: Sequence[Requirement], found: Iterable[Measured]) -> list[str]:
    """Each requirement that is not met, in words that name metric, wanted and found."""
    by_name = {(measured.task, measured.metric): measured for measured in found}
    return [text for wanted in required if (text := _missed(wanted, by_name.get((wanted.place, wanted.metric))))]


def _missed(wanted: Requirement, found: Measured | None) -> str:
    name = wanted.metric if wanted.place == TEST else f"{wanted.metric} of {wanted.place}"
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


def _better(metric: str, tuned: float, base: float) -> bool:
    return tuned < base if lower_is_better(metric) else tuned > base
