"""How often answers follow rules."""

from typing import Any

import pytest

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.evaluation import MetricName
from tunewright_crds.rules import AnswerRule
from tunewright_trainer.evaluate.rules import Checks, variants


def checks(*rules: dict[str, Any]) -> Checks:
    return Checks([AnswerRule.model_validate(rule) for rule in rules])


FOLLOWED: dict[str, tuple[dict[str, Any], str, bool, bool]] = {
    "as it is": ({"type": "exact-match"}, "plus", True, True),
    "behind a line of its own": ({"type": "exact-match"}, "Sure, here it is:\nplus", False, True),
    "with stars, and a last line": ({"type": "starts-with", "text": "plus"}, "**plus**\nDoes that help?", False, True),
    "between two lines": ({"type": "regex", "pattern": "^pl[a-z]s$"}, "well\nplus\nbye", False, True),
    "not at all": ({"type": "exact-match"}, "minus\nminus", False, False),
    "turned round": ({"type": "contains", "text": "plus", "negate": True}, "plus", False, False),
    "turned round, and cut": ({"type": "contains", "text": "plus", "negate": True}, "plus\nor so", False, True),
    "nothing said follows no rule": ({"type": "length", "max": 9}, " \n", False, False),
    "JSON within a fence is strictly none": (
        {"type": "json-schema", "schema": '{"type": "object"}'},
        '```json\n{"a": 1}\n```',
        False,
        True,
    ),
}


@pytest.mark.parametrize(("rule", "answer", "strict", "loose"), FOLLOWED.values(), ids=FOLLOWED)
def test_a_rule_is_followed_strictly_or_loosely(rule: dict[str, Any], answer: str, strict: bool, loose: bool) -> None:
    followed = checks(rule).of([answer], ["plus"])
    assert (bool(followed.strict[0, 0]), bool(followed.loose[0, 0])) == (strict, loose)


def test_answers_and_instructions_are_counted_apart() -> None:
    rules = checks({"type": "exact-match"}, {"type": "length", "max": 4}, {"type": "exact-match", "ignoreCase": True})
    followed = rules.of(["plus", "PLUS", "minus", "*plus*"], ["plus"] * 4)
    assert rules.names == ["exact-match", "length", "exact-match-2"]
    assert {name: metric.value for name, metric in followed.metrics().items()} == pytest.approx(
        {
            MetricName.PROMPT_LEVEL_STRICT: 1 / 4,
            MetricName.INST_LEVEL_STRICT: (3 + 2 + 0 + 0) / 12,
            MetricName.PROMPT_LEVEL_LOOSE: 2 / 4,
            MetricName.INST_LEVEL_LOOSE: (3 + 2 + 0 + 3) / 12,
        }
    )
    assert [followed.share(rule) for rule in range(3)] == [1 / 4, 2 / 4, 2 / 4]


def test_loosely_is_as_ifeval_has_it() -> None:
    assert variants("*a*\nb\nc") == ["*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_a_rule_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(Refusal) as refusal:
        checks({"type": "length", "max": 1}, {"type": "json-schema", "schema": '{"type": 3}'})
    assert (refusal.value.code, refusal.value.param) == (FailureCode.CONFIG_INVALID, "spec.evaluation.rules[1].schema")
