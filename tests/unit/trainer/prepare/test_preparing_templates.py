"""Rows of any data set by a Jinja template: classes, inverted tasks, several right answers, and templates that are none."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.dialogue import lines
from tests.support.preparing import a_data_job, examples, prepare_here, report, write_lines
from tunewright_crds.errors import FailureCode, Refusal

REVIEWS = [{"text": "Great.", "label": 1}, {"text": "Bad.", "label": 0}]

# what is tried: (rows, the source's keys, the conversations that come of it)
TEMPLATES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[list[str]]]] = {
    "classification with the names of the classes": (
        REVIEWS,
        {"template": "Is it good? {{text}} ||| {{choices[label]}}", "choices": ["no", "yes"]},
        [["user: Is it good? Great.", "assistant! yes"], ["user: Is it good? Bad.", "assistant! no"]],
    ),
    "choices in the question, as PromptSource names them": (
        REVIEWS[:1],
        {"template": "{{text}} Choose: {{answer_choices | join(', ')}}.|||{{answer_choices[label]}}", "choices": ["no", "yes"]},
        [["user: Great. Choose: no, yes.", "assistant! yes"]],
    ),
    "inverted: the question from the answer": (
        [{"instruction": "Add 1 and 2.", "output": "3"}],
        {"template": "Write an exercise whose answer is {{output}}. ||| {{instruction}}"},
        [["user: Write an exercise whose answer is 3.", "assistant! Add 1 and 2."]],
    ),
    "question answering with a list of right answers": (
        [{"question": "Capital?", "answers": {"text": ["Paris", "Paris, France"]}}],
        {"template": "{{question}} ||| {{answers.text | join(' ||| ')}}"},
        [["user: Capital?", "assistant! Paris"], ["user: Capital?", "assistant! Paris, France"]],
    ),
    "the first of several right answers": (
        [{"question": "Capital?", "answers": ["Paris", "Paris, France"]}],
        {"template": "{{question}} ||| {{answers | join(' ||| ')}}", "targets": "first"},
        [["user: Capital?", "assistant! Paris"]],
    ),
    "slot filling": (
        [{"tokens": ["fly", "to", "Rome"], "tags": ["O", "O", "B-city"]}],
        {
            "template": "Find the cities: {{tokens | join(' ')}} ||| "
            "{% for tag in tags %}{% if tag == 'B-city' %}{{tokens[loop.index0]}}{% endif %}{% endfor %}"
        },
        [["user: Find the cities: fly to Rome", "assistant! Rome"]],
    ),
    "the first right answer of a format": (
        [{"inputs": "Hi?", "targets": ["Hello", "Hey"]}],
        {"targets": "first"},
        [["user: Hi?", "assistant! Hello"]],
    ),
}


@pytest.mark.parametrize(("data", "source", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_says_what_a_row_asks_and_answers(
    tmp_path: Path, data: list[dict[str, Any]], source: dict[str, Any], expected: list[list[str]]
) -> None:
    file = write_lines(tmp_path / "data.jsonl", data)
    prepare_here(a_data_job({"uri": str(file), **source}), tmp_path)
    assert [lines(told) for told in examples(tmp_path)] == expected


def test_a_row_that_the_template_leaves_empty_is_dropped_and_told(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", REVIEWS)
    source = {"uri": str(file), "template": "{{text}} ||| {% if label %}good{% endif %}"}
    prepare_here(a_data_job(source), tmp_path)
    assert report(tmp_path)["dropped"] == {"left empty by the template": 1}
    assert report(tmp_path)["droppedAt"] == {"left empty by the template": ["data.jsonl:2"]}


REFUSED: dict[str, tuple[str, FailureCode, str]] = {
    "no separator": ("{{text}}", FailureCode.CONFIG_INVALID, "needs ||| between the question and its answer"),
    "broken Jinja": ("{{text ||| {{label}}", FailureCode.CONFIG_INVALID, "is no Jinja template"),
    "a key that no row has": (
        "{{body}} ||| x",
        FailureCode.DATA_INVALID,
        "data.jsonl:1: does not have what the template asks for: 'body' is undefined",
    ),
    "Python's inside": (
        "{{ text.__class__.__mro__ }} ||| x",
        FailureCode.DATA_INVALID,
        "data.jsonl:1: cannot be put into the template: SecurityError",
    ),
    "a range without end": (
        "{% for i in range(10**9) %}{% endfor %} ||| x",
        FailureCode.DATA_INVALID,
        "data.jsonl:1: cannot be put into the template",
    ),
}


@pytest.mark.parametrize(("template", "code", "said"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_cannot_be_used_is_refused(tmp_path: Path, template: str, code: FailureCode, said: str) -> None:
    file = write_lines(tmp_path / "data.jsonl", REVIEWS)
    with pytest.raises(Refusal) as caught:
        prepare_here(a_data_job({"uri": str(file), "template": template}), tmp_path)
    assert caught.value.code is code
    assert said in caught.value.message
    assert caught.value.param.startswith("spec.dataset.sources[0].")


@pytest.mark.parametrize(
    "source", [{"template": "a ||| b", "format": "alpaca"}, {"template": "a ||| b", "columns": {"a": "b"}}, {"choices": ["a"]}]
)
def test_options_that_would_say_nothing_are_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"template"):
        a_data_job({"uri": "data.jsonl", **source})
