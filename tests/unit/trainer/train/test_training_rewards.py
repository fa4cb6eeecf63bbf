"""What answers are rewarded for."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.reinforcement import RewardTerm
from tunewright_trainer.train.rewards import Rewards, finder
from tunewright_trainer.train.rollouts import Sample

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}, "next": {"$ref": "#"}},
        "required": ["name"],
        "additionalProperties": False,
    }
)


def said(answer: str, reference: str = "") -> Sample:
    ids = np.zeros(1, dtype=np.int64)
    return Sample(ids, ids, [1], answer, reference, True)


def given(reward: dict[str, Any], answer: str, reference: str = "") -> float:
    total, _ = Rewards([RewardTerm.model_validate(reward)]).of([said(answer, reference)])
    return float(total)


RULES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "white space is all that may differ": ({"type": "exact-match"}, ["the answer", "the\n answer"], ["The answer", "the answer.", ""]),
    "case may differ, too": ({"type": "exact-match", "ignoreCase": True}, ["THE  answer"], ["an answer"]),
    "a pattern anywhere": ({"type": "regex", "pattern": "[0-9]{2}"}, ["it is 42", "1234"], ["4 2", ""]),
    "a pattern of the whole": ({"type": "regex", "pattern": "^yes|no$", "ignoreCase": True}, ["YES, but", "nO"], ["not yes"]),
    "a pattern that must not be there": ({"type": "regex", "pattern": "sorry", "negate": True}, ["here it is"], ["I am sorry"]),
    "any JSON": ({"type": "json-schema"}, ["{}", "[1, 2]", "null"], ["{", "yes", "", "1e999999)"]),
    "JSON of a schema": (
        {"type": "json-schema", "schema": SCHEMA},
        ['{"name": "ann"}', '{"name": "a", "next": {"name": "b"}}'],
        ['{"name": "Ann"}', '{"name": "a", "next": {}}', '{"name": "a", "age": 1}', "[" * 100_000],
    ),
    "a text in it": ({"type": "contains", "text": "Ärger"}, ["kein Ärger."], ["ärger"]),
    "a text in it, in any case": ({"type": "contains", "text": "Ärger", "ignoreCase": True}, ["ÄRGER"], ["arger"]),
    "a beginning": ({"type": "starts-with", "text": "Dear"}, ["Dear all"], ["My Dear"]),
    "an end": ({"type": "ends-with", "text": "."}, ["Done."], ["Done"]),
    "characters": ({"type": "length", "min": 2, "max": 3}, ["ab", "abc"], ["a", "abcd"]),
    "words": ({"type": "length", "max": 2, "unit": "words"}, ["one  two", ""], ["one two three"]),
}


@pytest.mark.parametrize(("reward", "rewarded", "others"), RULES.values(), ids=RULES)
def test_rules(reward: dict[str, Any], rewarded: list[str], others: list[str]) -> None:
    assert [given(reward, answer, "the answer") for answer in rewarded + others] == [1.0] * len(rewarded) + [0.0] * len(others)


def test_nothing_matches_an_answer_that_the_data_does_not_give() -> None:
    assert given({"type": "exact-match"}, "", "") == 0


def test_rewards_are_weighted_and_told_by_name() -> None:
    wanted = [
        {"type": "contains", "text": "a"},
        {"type": "contains", "text": "b", "weight": 2},
        {"type": "length", "max": 1, "weight": -0.5},
    ]
    total, each = Rewards([RewardTerm.model_validate(one) for one in wanted]).of([said("ab"), said("b"), said("")])
    assert total.tolist() == [3, 1.5, -0.5]
    assert {name: values.tolist() for name, values in each.items()} == {"contains": [1, 0, 0], "contains-2": [1, 1, 0], "length": [0, 1, 1]}
    assert total.dtype is torch.float32


UNFIT = {
    "a schema that is none": ({"type": "json-schema", "schema": '{"type": "strin"}'}, "schema"),
    "patterns of properties": ({"type": "json-schema", "schema": '{"patternProperties": {"a": {}}}'}, "patternProperties"),
    "a pattern in a schema that is none": ({"type": "json-schema", "schema": '{"pattern": "(?<a"}'}, "is not a 'regex'"),
}


@pytest.mark.parametrize(("reward", "said"), UNFIT.values(), ids=UNFIT)
def test_what_is_no_rule_is_refused(reward: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refusal:
        Rewards([RewardTerm.model_validate({"type": "length", "max": 1}), RewardTerm.model_validate(reward)])
    assert (refusal.value.code, refusal.value.param) == (FailureCode.CONFIG_INVALID, "spec.method.rewards[1].schema")


@pytest.mark.parametrize("address", ["#/$defs/none", "http://localhost:1/schema.json", "file:///etc/passwd"])
def test_a_reference_leads_nowhere_else(address: str) -> None:
    with pytest.raises(Refusal, match="the schema has nothing at") as refusal:
        given({"type": "json-schema", "schema": json.dumps({"$ref": address})}, "{}")
    assert refusal.value.code is FailureCode.CONFIG_INVALID


def test_a_pattern_that_takes_exponential_time_is_refused() -> None:
    found = finder("(a|aa)+$", "spec.method.rewards[0].pattern", seconds=0.2)
    assert found("aaa")
    with pytest.raises(Refusal, match=r"takes more than 0\.2 s for an answer of 61 characters") as refusal:
        found("a" * 60 + "!")
    assert (refusal.value.code, refusal.value.param) == (FailureCode.CONFIG_INVALID, "spec.method.rewards[0].pattern")
