"""Rows that say which of two answers is the better one."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from tunewright_crds.dataset import DataFormat
from tunewright_trainer.prepare import chat, trees
from tunewright_trainer.prepare.conversation import SAME, Conversation, Drop, Message, RowError, assistant, pair
from tunewright_trainer.prepare.fields import Fields

_NO_MARKS: Final = (
    "holds no marked answers, which the objective learns from: neither {prompt, completion, label} nor preferences; "
    "name other keys by `columns`, or set method.objective: sft"
)
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
    before = () if whole else chat.prompt(fields)
    better, worse = (chat.with_system(fields, *before, *side) for side in (chosen, rejected))
    if better == worse:
        return [Drop(SAME)]
    shared = next((at for at, (one, other) in enumerate(zip(better, worse, strict=False)) if one != other), min(len(better), len(worse)))
    if not all(shared < len(side) and side[shared]["role"] == "assistant" for side in (better, worse)):
        raise RowError(fields.name("rejected"), f"must part from {fields.name('chosen')} with an answer: both are answers to one prompt")
    return [pair(better, worse, shared=shared, tools=chat.tools_of(fields))]


def _side(fields: Fields, key: str) -> tuple[Message, ...]:
    if not isinstance(fields.get(key), list):
        return (assistant(fields.text(key)),)
    read = [chat.message_of(entry) for entry in fields.objects(key)]
    if not read[-1][1]:
        raise RowError(f"{fields.name(key)}[{len(read) - 1}]", "is not to be learned (weight or train), and yet it is the answer of a pair")
    return tuple(message for message, _ in read)


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


def _unpaired(fields: Fields) -> Found:
    """`prompt` and `completion`, each a text or a list of messages, and `label`: whether the completion is a good one."""
    label = fields.get("label")
    if label not in (True, False):
        raise RowError(fields.name("label"), "must be true or false: whether the answer is a good one")
    before, answer = chat.with_system(fields, *chat.prompt(fields)), _side(fields, "completion")
    if answer[0]["role"] != "assistant":
        raise RowError(fields.name("completion"), "must begin with an answer: what comes before it belongs to the prompt")
    read = frozenset(at for at, message in enumerate(before) if message["role"] == "assistant")
    return [Conversation((*before, *answer), chat.tools_of(fields), read, desirable=bool(label))]


def _marked(fields: Fields) -> Found:
    if fields.has("label"):
        return _unpaired(fields)
    if not (fields.has("chosen") or fields.has("rejected") or isinstance(fields.find("prompt"), dict)):
        raise RowError("", _NO_MARKS)
    return recognised(fields)


def apart(found: Conversation | Drop) -> Found:
    """Of a pair, both answers by themselves, each with its mark."""
    if isinstance(found, Drop) or found.desirable is not None:
        return [found]
    return [replace(side, desirable=good) for side, good in zip(found.documents, (True, False), strict=True)]


UNPAIRED_READERS: Final[dict[DataFormat, Callable[[Fields], Found]]] = {
    **READERS,
    DataFormat.AUTO: _marked,
    DataFormat.UNPAIRED: _unpaired,
}
