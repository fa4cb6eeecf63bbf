"""What an answer is rewarded for: rules on its text."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.reinforcement import RewardTerm
from tunewright_crds.rules import AnswerRule, LengthUnit, RuleType
from tunewright_trainer.train.rollouts import Sample

PATTERN_SECONDS: Final = 5.0  # for one answer, where a sound pattern takes well below a millisecond

Rule = Callable[[str, str], bool]
"""Whether an answer, compared with that of the data where there is one, is as it should be."""


class Rewards:
    """The rewards of a job. Raises `Refusal` where one of them is none."""

    def __init__(self, wanted: Sequence[RewardTerm]) -> None:
        self._weights = [reward.weight for reward in wanted]
        self._names = names_of(wanted)
        self._rules = [rule(reward, f"spec.method.rewards[{number}]") for number, reward in enumerate(wanted)]
        self._negated = [reward.negate for reward in wanted]

    def of(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What each answer gets in all [samples], and by name what for, before it is weighted [samples]."""
        each = [
            torch.tensor([float(rule(sample.text, sample.reference) != negated) for sample in samples])
            for rule, negated in zip(self._rules, self._negated, strict=True)
        ]
        total = sum((weight * found for weight, found in zip(self._weights, each, strict=True)), torch.zeros(len(samples)))
        return total, dict(zip(self._names, each, strict=True))


def names_of(wanted: Sequence[AnswerRule]) -> list[str]:
    """The types, and behind those that occurred before a number."""
    seen: list[RuleType] = []
    names = []
    for one in wanted:
        seen.append(one.type)
        times = seen.count(one.type)
        names.append(one.type.value if times == 1 else f"{one.type.value}-{times}")
    return names


def rule(reward: AnswerRule, param: str) -> Rule:
    """The rule, not yet negated. ``param``: the field that it is."""
    match reward.type:
        case RuleType.EXACT_MATCH:
            plain = _folded if reward.ignore_case else _spaced
            return lambda answer, reference: bool(reference) and plain(answer) == plain(reference)
        case RuleType.REGEX:
            found = finder(reward.pattern, f"{param}.pattern", ignore_case=reward.ignore_case)
            return lambda answer, _: found(answer)
        case RuleType.JSON_SCHEMA:
            fits = _fitting(reward.json_schema, f"{param}.schema")
            return lambda answer, _: fits(answer)
        case RuleType.LENGTH:
            least, most = reward.least or 0, float("inf") if reward.most is None else reward.most
            count: Callable[[str], int] = (lambda text: len(text.split())) if reward.unit is LengthUnit.WORDS else len
            return lambda answer, _: least <= count(answer) <= most
        case _:
            change: Callable[[str], str] = str.casefold if reward.ignore_case else str
            text, says = change(reward.text), _SAYS[reward.type]
            return lambda answer, _: says(change(answer), text)


_SAYS: Final[dict[RuleType, Callable[[str, str], bool]]] = {
    RuleType.CONTAINS: str.__contains__,
    RuleType.STARTS_WITH: str.startswith,
    RuleType.ENDS_WITH: str.endswith,
}


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _folded(text: str) -> str:
    return _spaced(text).casefold()


def finder(pattern: str, param: str, *, ignore_case: bool = False, seconds: float = PATTERN_SECONDS) -> Callable[[str], bool]:
    """Whether a text has a match. A pattern that takes longer than this is refused, since some take exponential time at unlucky texts."""
    import regex

    try:
        compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except (regex.error, RecursionError, OverflowError) as error:
        raise Refusal(FailureCode.CONFIG_INVALID, f"no regular expression: {error}", param=param) from error

    def found(text: str) -> bool:
        try:
            return compiled.search(text, timeout=seconds) is not None
        except TimeoutError as error:
            what = f"the pattern takes more than {seconds:g} s for an answer of {len(text)} characters: it has too many ways to match, as (a|aa)+ has"
            raise Refusal(FailureCode.CONFIG_INVALID, what, param=param) from error

    return found


def _fitting(schema: str, param: str) -> Callable[[str], bool]:
    """Whether a text is JSON that fits the schema. No reference leads out of it: nothing is fetched."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, ValidationError
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    def pattern(_: Any, wanted: str, value: Any, __: Any) -> Iterator[Exception]:
        if isinstance(value, str) and not finder(wanted, param)(value):
            yield ValidationError("does not match")

    wanted = json.loads(schema or "true")
    try:
        Draft202012Validator.check_schema(wanted)
    except (SchemaError, RecursionError) as error:
        raise Refusal(FailureCode.CONFIG_INVALID, f"no JSON schema: {str(error).splitlines()[0][:200]}", param=param) from error
    for key, value in _members(wanted):
        if key == "patternProperties":
            raise Refusal(FailureCode.CONFIG_INVALID, "patternProperties is not supported: name the properties", param=param)
        if key == "pattern" and isinstance(value, str):
            finder(value, param)
    validator = extend(Draft202012Validator, {"pattern": pattern})(wanted, registry=Registry())

    def fits(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError, OverflowError):
            return False
        except Unresolvable as error:
            raise Refusal(FailureCode.CONFIG_INVALID, f"the schema has nothing at {str(error)[:200]}", param=param) from error

    return fits


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _members(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _members(inner)
