"""Rows that say which of two answers is the better one."""

from collections.abc import Callable, Iterable
from typing import Final

from tunewright_crds.dataset import DataFormat
from tunewright_trainer.prepare import trees
from tunewright_trainer.prepare.chat import message_of, tools_of
from tunewright_trainer.prepare.conversation import SAME, Conversation, Drop, Message, RowError, assistant, pair, system, user
from tunewright_trainer.prepare.fields import Fields

Found = Iterable[Conversation | Drop]

_NEITHER: Final = (
    "holds no preferences, which the objective learns from: neither {prompt, chosen, rejected} nor a tree of ranked answers; "
    "name other keys by `columns`, or set method.objective: sft"
)


def preference(fields: Fields) -> Found:
    """`chosen` and `rejected`, each a text, a list of the messages that follow `prompt`, or a whole conversation; beside them `system` and `tools`.

    The prompt of whole conversations is their common beginning, and a `prompt` beside them says it once more.
    """
    chosen, rejected = _side(fields, "chosen"), _side(fields, "rejected")
    whole = chosen[0]["role"] != "assistant"
    if (rejected[0]["role"] != "assistant") != whole:
        raise RowError(
            fields.name("rejected"), f"must begin as {fields.name('chosen')} does: both with the prompt, or both with the answer"
        )
    before = () if whole else _prompt(fields)
    if (instruction := fields.optional("system")) and (*before, *chosen)[0]["role"] != "system":
        before = (system(instruction), *before)
    better, worse = (*before, *chosen), (*before, *rejected)
    if better == worse:
        return [Drop(SAME)]
    shared = next((at for at, (one, other) in enumerate(zip(better, worse, strict=False)) if one != other), min(len(better), len(worse)))
    if not all(shared < len(side) and side[shared]["role"] == "assistant" for side in (better, worse)):
        raise RowError(fields.name("rejected"), f"must part from {fields.name('chosen')} with an answer: both are answers to one prompt")
    return [pair(better, worse, shared=shared, tools=tools_of(fields))]


def _side(fields: Fields, key: str) -> tuple[Message, ...]:
    if not isinstance(fields.get(key), list):
        return (assistant(fields.text(key)),)
    read = [message_of(entry) for entry in fields.objects(key)]
    if not read[-1][1]:
        raise RowError(f"{fields.name(key)}[{len(read) - 1}]", "is not to be learned (weight or train), and yet it is the answer of a pair")
    return tuple(message for message, _ in read)


def _prompt(fields: Fields) -> tuple[Message, ...]:
    if not isinstance(fields.get("prompt"), list):
        return (user(fields.filled("prompt")),)
    return tuple(message_of(entry)[0] for entry in fields.objects("prompt"))


def _tree(fields: Fields) -> Found:
    return trees.whole_tree(fields, trees.pairs)


def recognised(fields: Fields) -> Found:
    """The pairs of a row whose format nobody named; raises `RowError`."""
    if fields.has("chosen") or fields.has("rejected"):
        return preference(fields)
    if isinstance(fields.find("prompt"), dict):
        return _tree(fields)
    raise RowError("", _NEITHER)


READERS: Final[dict[DataFormat, Callable[[Fields], Found]]] = {
    DataFormat.AUTO: recognised,
    DataFormat.PREFERENCE: preference,
    DataFormat.OASST: _tree,
}
