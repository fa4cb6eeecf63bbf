"""How often answers follow rules, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright_crds.evaluation import MetricName
from tunewright_crds.rules import AnswerRule
from tunewright_trainer.evaluate.scores import Floats, Ratio, Resampled
from tunewright_trainer.train.rewards import names_of, rule


@dataclass(frozen=True)
class Followed:
    """Which rules each answer follows, 0 or 1 [answers, rules]: ``strict`` as it is, ``loose`` in one of its `variants`."""

    strict: Floats
    loose: Floats

    def metrics(self) -> dict[MetricName, Resampled]:
        """Shares of the answers that follow all rules, and of the rules that are followed."""
        return {
            MetricName.PROMPT_LEVEL_STRICT: Ratio.mean(self.strict.min(axis=1)),
            MetricName.INST_LEVEL_STRICT: Ratio.mean(self.strict.mean(axis=1)),
            MetricName.PROMPT_LEVEL_LOOSE: Ratio.mean(self.loose.min(axis=1)),
            MetricName.INST_LEVEL_LOOSE: Ratio.mean(self.loose.mean(axis=1)),
        }

    def share(self, rule: int) -> float:
        """Of the answers, those that follow one rule strictly."""
        return float(self.strict[:, rule].mean())


class Checks:
    """The rules of a job's evaluation. Raises `Refusal` where one of them is none. False where there are none."""

    def __init__(self, wanted: Sequence[AnswerRule]) -> None:
        self.names = names_of(wanted)
        self._rules = [(rule(one, f"spec.evaluation.rules[{number}]"), one.negate) for number, one in enumerate(wanted)]

    def __len__(self) -> int:
        return len(self._rules)

    def of(self, answers: Sequence[str], expected: Sequence[str]) -> Followed:
        """``expected``: the answers of the data, which some rules compare with."""
        asked = list(zip(answers, expected, strict=True))
        return Followed(
            strict=np.array([self._followed([answer], right) for answer, right in asked]),
            loose=np.array([self._followed(variants(answer), right) for answer, right in asked]),
        )

    def _followed(self, texts: Sequence[str], expected: str) -> list[float]:
        """[rules]: 1 where one of the texts follows it."""
        said = [text.strip() for text in texts if text.strip()]
        return [float(any(follows(text, expected) != negated for text in said)) for follows, negated in self._rules]


def variants(answer: str) -> list[str]:
    """What loose accuracy looks at: the answer, without its first line, its last, or both, and each of these without asterisks."""
    lines = answer.split("\n")
    cut = [answer, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    return cut + [text.replace("*", "") for text in cut]
