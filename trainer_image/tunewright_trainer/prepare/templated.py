"""Rows of any data set by a Jinja template, as PromptSource writes them: the question, `|||`, the answer."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.prepare.conversation import Conversation, Drop, RowError, as_text, exchange
from tunewright_trainer.prepare.rows import Row

SEPARATOR: Final = "|||"
MAX_CHARACTERS: Final = 4_000_000


class RowTemplate:
    """A template of a source, compiled. `choices` are the texts of the classes, for templates such as `{{ choices[label] }}`."""

    def __init__(self, source: str, choices: Sequence[str], *, param: str) -> None:
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        self._choices = list(choices)
        if SEPARATOR not in source:
            raise Refusal(FailureCode.CONFIG_INVALID, f"needs {SEPARATOR} between the question and its answer", param=param)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise Refusal(FailureCode.CONFIG_INVALID, f"is no Jinja template: {_first_line(error)}", param=param) from error

    def conversations(self, row: Row) -> Iterator[Conversation | Drop]:
        """One for each answer: behind a second `|||` follows another one that is right too."""
        try:
            told = self._template.render({**row, "choices": self._choices, "answer_choices": self._choices})
        except jinja2.UndefinedError as error:
            raise RowError("", f"does not have what the template asks for: {_first_line(error)}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise RowError("", f"cannot be put into the template: {type(error).__name__}") from error
        if len(told) > MAX_CHARACTERS:
            raise RowError("", f"becomes more than {MAX_CHARACTERS} characters by the template")
        question, *answers = (as_text(part, "").strip() for part in told.split(SEPARATOR))
        if not question or not any(answers):
            yield Drop("left empty by the template")
            return
        yield from (exchange(question, answer) for answer in answers if answer)


def _first_line(error: Any) -> str:
    """Jinja's texts name variables, positions and keywords; values of rows are not in them."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
