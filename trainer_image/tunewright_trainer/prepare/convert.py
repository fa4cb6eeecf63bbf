"""From the rows of a file to conversations."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from tunewright_crds.dataset import DataFormat, Source, Targets
from tunewright_crds.method import Examples
from tunewright_trainer.prepare import preferences, trees
from tunewright_trainer.prepare.conversation import Conversation, Drop, Message, RowError, texts_of
from tunewright_trainer.prepare.fields import Fields
from tunewright_trainer.prepare.formats import PROMPT_READERS, READERS, recognised
from tunewright_trainer.prepare.rows import Numbered, Problem, Row
from tunewright_trainer.prepare.templated import RowTemplate

Found = tuple[int, Conversation | Drop | Problem]
"""What a row comes to, with its line."""

_TREE_KEYS: Final = ("message_tree_id", "message_id", "role", "text")


class Converter:
    """Reads the rows of one source as the examples that an objective learns from. Raises `Refusal` where its template is none; `param` names it then.

    ``answered``: of prompts only those count that come with an answer.
    """

    def __init__(self, source: Source, *, param: str, examples: Examples = Examples.CONVERSATIONS, answered: bool = False) -> None:
        self._source = source
        self._unpaired = examples is Examples.UNPAIRED
        self._pairs = examples is Examples.PREFERENCES or self._unpaired
        self._prompts = examples is Examples.PROMPTS
        self._answered = answered
        self._template = RowTemplate(source.template, source.choices, param=param) if source.template else None

    def conversations(self, rows: Iterable[Numbered]) -> Iterator[Found]:
        """What the rows of a file come to: each any number of conversations, or a problem. Flat messages of a tree are read together."""
        tree: list[tuple[int, Row]] = []
        for line, row in rows:
            if tree and not self._continues(tree, row):
                yield from self._together(tree)
                tree = []
            if isinstance(row, Problem):
                yield line, row
            elif self._is_flat(row):
                tree.append((line, row))
            else:
                yield from _told(line, self._read(row))
        if tree:
            yield from self._together(tree)

    def _read(self, row: Row) -> Iterator[Conversation | Drop]:
        yield from self._wanted(self._answers(row))

    def _wanted(self, answers: Iterable[Conversation | Drop]) -> Iterator[Conversation | Drop]:
        before: tuple[Message, ...] | None = None
        for found in answers:
            if self._prompts and isinstance(found, Conversation):
                found = self._prompt(found)
            if isinstance(found, Conversation) and self._source.targets is Targets.FIRST:
                prompt = found.messages if found.unanswered else found.messages[: found.shared or -1]
                if prompt == before:
                    continue
                before = prompt
            yield from preferences.apart(found) if self._unpaired else (found,)

    def _prompt(self, found: Conversation) -> Conversation:
        if found.text:
            raise RowError("", "holds a plain text, in which nothing is a prompt to answer")
        if not found.messages or found.messages[-1]["role"] not in ("user", "tool"):
            return found
        if self._answered:
            raise RowError("", "ends without an answer, which spec.method.rewards compares with (exact-match)")
        return replace(found, unanswered=True)

    def _answers(self, row: Row) -> Iterable[Conversation | Drop]:
        if self._template:
            return self._template.conversations(row)
        fields = Fields(row, self._source.columns)
        if self._pairs:
            readers = preferences.UNPAIRED_READERS if self._unpaired else preferences.READERS
            return readers[self._source.format](fields)
        readers = PROMPT_READERS if self._prompts else READERS
        read = recognised(fields, prompts=self._prompts) if self._source.format is DataFormat.AUTO else readers[self._source.format]
        return read(fields)

    def _is_flat(self, row: Row) -> bool:
        """Whether a row is one message of an OpenAssistant tree."""
        known = self._source.format in (DataFormat.AUTO, DataFormat.OASST) and not self._template
        return known and all(isinstance(row.get(key), str) for key in _TREE_KEYS)

    def _continues(self, tree: list[tuple[int, Row]], row: Row | Problem) -> bool:
        return (
            not isinstance(row, Problem)
            and self._is_flat(row)
            and row["message_tree_id"] == tree[0][1]["message_tree_id"]
            and len(tree) < trees.MOST_MESSAGES
        )

    def _together(self, tree: list[tuple[int, Row]]) -> Iterator[Found]:
        told = trees.pairs if self._pairs else trees.threads
        yield from _told(tree[0][0], self._wanted(trees.flat_tree([row for _, row in tree], told)))


class AnyShape(Converter):
    """Reads rows to compare with: one that is of no format counts by all its texts."""

    def _read(self, row: Row) -> Iterator[Conversation | Drop]:
        try:
            found = [one if isinstance(one, Drop) else _checked(one) for one in super()._read(row)]
        except RowError:
            found = [Conversation(text="\n".join(texts_of(row)))]
        yield from found


def _told(line: int, found: Iterable[Conversation | Drop]) -> Iterator[Found]:
    """The findings, up to a mistake."""
    try:
        for one in found:
            yield line, one if isinstance(one, Drop) else _checked(one)
    except RowError as error:
        yield line, Problem(error.field, error.what)
    except RecursionError:
        yield line, Problem("", "is nested too deeply")


def _checked(conversation: Conversation) -> Conversation:
    """The conversation, if there is something in it to learn and something that it follows from."""
    if conversation.text or conversation.unanswered:
        return conversation
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise RowError("", "holds no assistant message")
    if conversation.messages[0]["role"] == "assistant":
        raise RowError("", "begins with an answer; a system or user message must come first")
    return conversation
