"""Rules on the text of an answer: what a model is rewarded for by them, and measured by."""

import json
import re
from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, Rules, cel_list

MAX_RULES: Final = 16
MAX_PATTERN: Final = 1024
MAX_SCHEMA: Final = 16_384


class RuleType(StrEnum):
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


_WITH_TEXT: Final = (RuleType.CONTAINS, RuleType.STARTS_WITH, RuleType.ENDS_WITH)
_WITH_CASE: Final = (RuleType.EXACT_MATCH, RuleType.REGEX, *_WITH_TEXT)
_PATTERN: Final = "pattern is for type regex, which needs one"
_TEXT: Final = f"text is for types {', '.join(_WITH_TEXT)}, which need one"
_SCHEMA: Final = "schema is for type json-schema"
_BOUNDS: Final = "min, max and unit are for type length, which needs min or max"
_ORDER: Final = "min is above max: no answer could follow the rule"
_CASE: Final = f"ignoreCase is for types {', '.join(_WITH_CASE)}"

CEL: Final = (
    ("(self.type == 'regex') == (self.pattern != '')", _PATTERN),
    (f"(self.type in {cel_list(_WITH_TEXT)}) == (self.text != '')", _TEXT),
    ("self.type == 'json-schema' || self.schema == ''", _SCHEMA),
    ("(self.type == 'length') == (has(self.min) || has(self.max)) && (self.type == 'length' || self.unit == 'characters')", _BOUNDS),
    ("!has(self.min) || !has(self.max) || self.min <= self.max", _ORDER),
    (f"self.type in {cel_list(_WITH_CASE)} || !self.ignoreCase", _CASE),
)


class AnswerRule(Part, json_schema_extra=Rules(*CEL)):
    """What the text of an answer shall be. White space around it does not count."""

    type: RuleType = Field(
        description="exact-match (the answer of the data, up to white space), regex (the pattern is found), json-schema (the answer is JSON that fits the "
        "schema), contains, starts-with, ends-with (the text), or length (within min and max)."
    )
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
    negate: bool = Field(False, description="Turn the rule round: answers shall not be so.")

    @model_validator(mode="after")
    def _fits_its_type(self) -> "AnswerRule":
        kind, bounds = self.type, [bound for bound in (self.least, self.most) if bound is not None]
        for wrong, what in (
            ((kind is RuleType.REGEX) != bool(self.pattern), _PATTERN),
            ((kind in _WITH_TEXT) != bool(self.text), _TEXT),
            (kind is not RuleType.JSON_SCHEMA and self.json_schema, _SCHEMA),
            ((kind is RuleType.LENGTH) != bool(bounds), _BOUNDS),
            (kind is not RuleType.LENGTH and self.unit is not LengthUnit.CHARACTERS, _BOUNDS),
            (bounds != sorted(bounds), _ORDER),
            (kind not in _WITH_CASE and self.ignore_case, _CASE),
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
