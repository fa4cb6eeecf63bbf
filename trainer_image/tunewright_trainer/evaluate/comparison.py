"""What two models made of a task, side by side: values, intervals, and the interval of their difference."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tunewright_crds.evaluation import Classification, Measured, MetricName, lower_is_better
from tunewright_trainer.evaluate import scores
from tunewright_trainer.evaluate.harness import Put
from tunewright_trainer.evaluate.rules import Checks
from tunewright_trainer.evaluate.scores import Ranking, Ratio, Resampled

BASE, TUNED = "base", "tuned"
SAMPLES: Final = 20
MIN_JUDGED: Final = 0.9  # of the pairs
_DIGITS: Final = 6
_NORMAL: Final = 1.96  # standard errors to each side of a 95 % interval


@dataclass(frozen=True)
class Judged:
    """What a judge said: the tuned model's `judging.win` of each example that was asked, in order, as far as it went; ``why`` it went no further."""

    wins: list[float | None]
    why: str = ""

    @property
    def enough(self) -> bool:
        """Whether there are verdicts on nearly all pairs, so that those that lack change little."""
        return bool(self.wins) and not self.why and len(self.known) >= MIN_JUDGED * len(self.wins)

    @property
    def known(self) -> list[float]:
        return [one for one in self.wins if one is not None]

    def told(self) -> dict[str, Any]:
        """For the report."""
        counts = {name: self.known.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
        return counts | {"unjudged": len(self.wins) - len(self.known), "why": self.why}


@dataclass(frozen=True)
class Task:
    """``found``: of each model, by its name, what `measuring.Found` holds. ``expected`` and ``prompts`` are of the examples that were asked; None where
    the data has no answer."""

    name: str
    expected: list[str | None]
    prompts: list[str]
    found: dict[str, dict[str, Any]]
    judged: "Judged | None" = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every prompt with its right answer and those of the models."""
        for at, (prompt, expected) in enumerate(zip(self.prompts, self.expected, strict=True)):
            yield {"task": self.name, "prompt": prompt, "expected": expected} | {
                name: found["answers"][at] for name, found in self.found.items()
            }


def compare(task: Task, classification: Classification, checks: Checks, *, seed: int) -> dict[str, Any]:
    """The task's part of the report."""
    expected = [right for right in task.expected if right is not None]
    labels = scores.classes(expected, classification)
    followed = {
        name: checks.of(found["answers"], [right or "" for right in task.expected])
        for name, found in task.found.items()
        if checks and task.expected
    }
    said = {
        name: [one for one, right in zip(found["answers"], task.expected, strict=True) if right is not None]
        for name, found in task.found.items()
    }
    metrics = {name: _metrics(found, said[name], expected, labels) for name, found in task.found.items()}
    for name, found in followed.items():
        metrics[name] |= found.metrics()
    rows = [_row(metric, {name: of[metric] for name, of in metrics.items()}, seed=seed) for metric in metrics[TUNED]]
    if task.judged and task.judged.enough:
        wins = np.array(task.judged.known)
        rows.append(_row(MetricName.WIN_RATE, {BASE: Ratio.mean(1 - wins), TUNED: Ratio.mean(wins)}, seed=seed))
    by_class: dict[str, Any] = {}
    if labels:
        of_labels = {name: scores.of_labels(answers, expected, labels) for name, answers in said.items()}
        rows += [_plain_row(metric, {name: (of[1][metric],) for name, of in of_labels.items()}) for metric in of_labels[TUNED][1]]
        by_class = {name: of[2] for name, of in of_labels.items()}
    samples = [line for line, _ in zip(task.lines(), range(SAMPLES), strict=False)]
    return {
        "task": task.name,
        "asked": len(task.expected),
        "metrics": rows,
        "classes": by_class,
        "rules": [
            {"rule": rule} | {name: _rounded(found.share(at)) for name, found in followed.items()}
            for at, rule in enumerate(checks.names if followed else ())
        ],
        "rewards": [
            {"reward": term} | {name: _rounded(float(np.mean(found["terms"][term]))) for name, found in task.found.items()}
            for term in task.found[TUNED]["terms"]
        ],
        "judge": task.judged.told() if task.judged else None,
        "samples": samples,
    }


def _metrics(found: dict[str, Any], answers: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> dict[MetricName, Resampled]:
    tokens = np.asarray(found["tokens"], dtype=np.float64)
    losses = np.asarray(found["losses"], dtype=np.float64)
    metrics: dict[MetricName, Resampled] = {}
    if len(tokens):
        metrics[MetricName.LOSS] = Ratio(losses, tokens)
        metrics[MetricName.PERPLEXITY] = Ratio(losses, tokens, exponential=True)
        metrics[MetricName.TOKEN_ACCURACY] = Ratio(np.asarray(found["right"], dtype=np.float64), tokens)
    if found["preferred"]:
        metrics[MetricName.PREFERENCE_ACCURACY] = Ratio.mean(found["preferred"])
    if len({*found["good"]}) == 2:
        metrics[MetricName.PREFERENCE_ACCURACY] = Ranking(np.asarray(found["likelihoods"]), np.asarray(found["good"], dtype=np.bool_))
    if found["rewards"]:
        metrics[MetricName.REWARD] = Ratio.mean(found["rewards"])
    if expected:
        metrics |= scores.of_text(answers, expected) | scores.of_corpus(answers, expected)
    if labels:
        metrics[MetricName.ACCURACY] = scores.of_labels(answers, expected, labels)[0]
    return metrics


def _row(metric: MetricName, found: dict[str, Resampled], *, seed: int) -> dict[str, Any]:
    drawn = dict(zip(found, scores.resampled(list(found.values()), seed=seed), strict=True))
    row = _plain_row(metric, {name: (one.value, *scores.interval(drawn[name])) for name, one in found.items()})
    if BASE in drawn:
        row["difference"] = _interval(scores.interval(drawn[TUNED] - drawn[BASE]))
    return row


def _plain_row(metric: str, found: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    values = {
        name: {"value": _rounded(value[0])} | ({"interval": _interval(value[1:])} if value[1:] else {}) for name, value in found.items()
    }
    return {"metric": str(metric), "lowerIsBetter": lower_is_better(metric), **values}


def compare_put(name: str, found: dict[str, Put]) -> dict[str, Any]:
    """The part of the report of a task of lm_eval, with intervals from its standard errors."""
    rows = [_put_row(metric, {model: of.metrics[metric] for model, of in found.items()}) for metric in found[TUNED].metrics]
    samples = [line for line, _ in zip(put_lines(name, found), range(SAMPLES), strict=False)]
    return {
        "task": name,
        "asked": len(found[TUNED].lines),
        "metrics": rows,
        "classes": {},
        "rules": [],
        "rewards": [],
        "judge": None,
        "samples": samples,
    }


def _put_row(metric: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row = _plain_row(metric, {name: (one["value"], *_around(one["value"], one["stderr"])) for name, one in found.items()})
    if BASE in found:
        difference = _around(found[TUNED]["value"] - found[BASE]["value"], _stderr_of_difference(found[TUNED], found[BASE]))
        row |= {"difference": _interval(difference)} if difference else {}
    return row


def _around(value: float, stderr: float | None) -> tuple[float, ...]:
    """The interval of a number whose error is normal; none where nobody knows the error."""
    return () if stderr is None else (value - _NORMAL * stderr, value + _NORMAL * stderr)


def _stderr_of_difference(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """Over the same documents, pair by pair; where only the totals are known as if the errors were independent, which makes it larger."""
    if one["each"] and len(one["each"]) == len(other["each"]) > 1:
        differences = np.subtract(one["each"], other["each"])
        return float(differences.std(ddof=1) / math.sqrt(len(differences)))
    return None if one["stderr"] is None or other["stderr"] is None else math.hypot(one["stderr"], other["stderr"])


def put_lines(name: str, found: dict[str, Put]) -> Iterator[dict[str, Any]]:
    """Every document of a task of lm_eval, with the answers of the models."""
    for at, line in enumerate(found[TUNED].lines):
        answers = {model: of.lines[at]["answer"] for model, of in found.items()}
        yield {"task": name, "prompt": line["prompt"], "expected": line["expected"], **answers}


def _interval(ends: Sequence[float]) -> list[float]:
    return [_rounded(end) for end in ends]


def _rounded(value: float) -> float:
    """Six digits that count: what is told is what is judged."""
    return float(f"{value:.{_DIGITS}g}")


def measured(compared: Sequence[dict[str, Any]]) -> list[Measured]:
    """The numbers of every task for the status; those that are none are left out."""
    return [
        Measured(task=task["task"], metric=row["metric"], base=row[BASE]["value"] if BASE in row else None, tuned=row[TUNED]["value"])
        for task in compared
        for row in task["metrics"]
        if all(math.isfinite(row[name]["value"]) for name in (BASE, TUNED) if name in row)
    ]
