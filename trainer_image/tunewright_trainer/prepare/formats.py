"""The shapes in which instruction data is published: how each is recognised by its keys, and what its rows say.

Sources of the shapes: the papers and cards of the data sets that the survey of instruction tuning lists (Zhang et al. 2023, arXiv:2308.10792).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from tunewright_crds.dataset import DataFormat
from tunewright_trainer.prepare import chat, trees
from tunewright_trainer.prepare.conversation import (
    Conversation,
    Drop,
    Message,
    RowError,
    assistant,
    exchange,
    instructed,
    paragraphs,
    system,
    user,
)
from tunewright_trainer.prepare.fields import Fields

Found = Iterable[Conversation | Drop]

_TURN: Final = re.compile(r"\[\|(Human|AI)\|\]|<(human|bot)>:", re.IGNORECASE)
_OPTIONAL_PROMPTS: Final = frozenset({"", "-", "none", "none.", "n/a"})


@dataclass(frozen=True)
class Format:
    """A shape of rows. `fits` recognises it, given that none of those before it in `FORMATS` does."""

    name: DataFormat
    keys: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields], Found]


def _alpaca(fields: Fields) -> Found:
    """Stanford Alpaca's keys, with `system` and `history` as LLaMA-Factory has them: history is a list of [question, answer]."""
    instruction, given = fields.text("instruction"), fields.optional("input")
    if not paragraphs(instruction, given):
        raise RowError(fields.name("instruction"), "is empty")
    before = (*_system(fields), *_history(fields))
    return [instructed(instruction, given, answer, before=before) for answer in fields.several("output")]


def _history(fields: Fields) -> Iterator[Message]:
    name = fields.name("history")
    history = fields.find("history") or []
    if not isinstance(history, list):
        raise RowError(name, "must be a list of [question, answer]")
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError(f"{name}[{index}]", "must be [question, answer]")
        yield from (user(turn[0]), assistant(turn[1]))


def _dolly(fields: Fields) -> Found:
    yield instructed(fields.filled("instruction"), fields.optional("context"), fields.text("response"))


def _prompt_completion(fields: Fields) -> Found:
    return [exchange(fields.filled("prompt"), answer, before=tuple(_system(fields))) for answer in fields.several("completion")]


def _inputs_targets(fields: Fields) -> Found:
    """P3, xP3 and Flan. P3 holds token ids beside the texts, and for ranking also wrong answers, marked as such."""
    if fields.find("is_correct") is False:
        return [Drop("a wrong answer, marked as such")]
    question, answer = (f"{key}_pretokenized" if fields.has(f"{key}_pretokenized") else key for key in ("inputs", "targets"))
    return [exchange(fields.filled(question), target.strip()) for target in fields.several(answer)]


def _seq_in_out(fields: Fields) -> Found:
    """UnifiedSKG: a request, and the table, graph or schema that it is about."""
    question = fields.optional("seq_in") or paragraphs(fields.optional("text_in"), fields.optional("struct_in"))
    if not question:
        raise RowError(fields.name("seq_in"), "is missing")
    return [exchange(question, answer) for answer in fields.several("seq_out")]


def _text_to_text(fields: Fields) -> Found:
    """UnifiedQA: question, choices and context in one line, with a backslash and an n between them."""
    question = "\n".join(part.strip() for part in fields.filled("input").split("\\n"))
    return [exchange(question, answer) for answer in fields.several("output")]


def _natural_instructions(fields: Fields) -> Found:
    """A task of (Super-)Natural Instructions: one definition, many instances with one or several right outputs."""
    parts = ["\n".join(fields.several("Definition"))]
    for key in ("Prompt", "Emphasis & Caution", "Things to Avoid"):
        said = fields.optional(key)
        if said.strip().lower() not in _OPTIONAL_PROMPTS:
            parts.append(said if key == "Prompt" else f"{key}: {said}")
    for instance in fields.objects("Instances"):
        given = instance.optional("input")
        yield from (instructed(paragraphs(*parts), given, answer) for answer in instance.several("output"))


def _instances(fields: Fields) -> Found:
    """Self-Instruct and Unnatural Instructions: an instruction with instances, and in the full set the same in other words."""
    instruction = fields.filled("instruction")
    for instance in fields.objects("instances"):
        yield _instance(instance, instruction)
    if fields.find("reformulations"):
        for other in fields.objects("reformulations"):
            yield _instance(other, other.text("instruction"))


def _instance(instance: Fields, instruction: str) -> Conversation:
    question = instance.optional("instruction_with_input") or paragraphs(instruction, instance.optional("input"))
    limits = instance.optional("constraints")
    limits = "" if limits.strip().lower() in _OPTIONAL_PROMPTS else limits
    return exchange(
        paragraphs(question, limits), instance.text("output"), instruction=instruction if question.startswith(instruction) else ""
    )


def _exam(fields: Fields) -> Found:
    """COIG's exam questions: the answer, and behind it why."""
    question = paragraphs(
        fields.optional("textbox_q_instruction", "instruction"),
        fields.optional("textbox_q_context", "question_context", "question context"),
        fields.filled("textbox_question" if fields.has("textbox_question") else "question"),
    )
    answer = fields.filled("textbox_answer" if fields.has("textbox_answer") else "answer")
    return [exchange(question, paragraphs(answer, fields.optional("textbox_answer_analysis", "analysis")))]


def _questions_answers(fields: Fields) -> Found:
    """COIG's rounds of question and answer, the first one behind the instruction."""
    messages: list[Message] = []
    for turn in fields.objects("conversations"):
        question = turn.text("question")
        messages += [user(question if messages else paragraphs(fields.optional("instruction"), question)), assistant(turn.text("answer"))]
    return [Conversation(tuple(messages))]


def _transcript(key: str) -> Callable[[Fields], Found]:
    """Turns in one text: Baize's `[|Human|]` and `[|AI|]`, OIG's `<human>:` and `<bot>:`. What comes before the first is a system message."""

    def read(fields: Fields) -> Found:
        before, *turns = _TURN.split(fields.filled(key))
        messages: list[Message] = [system(before.strip())] if before.strip() else []
        for bracketed, plain, text in zip(turns[::3], turns[1::3], turns[2::3], strict=True):
            speaker = user if (bracketed or plain).lower() == "human" else assistant
            if text.strip():
                messages.append(speaker(text.strip()))
        while messages and messages[-1]["role"] != "assistant":  # a transcript often ends with a marker, or a question that nobody answered
            messages.pop()
        yield Conversation(tuple(messages))

    return read


def _text(fields: Fields) -> Found:
    yield Conversation(text=fields.filled("text"))


def _prompt(fields: Fields) -> Found:
    """`prompt`, a text or a list of messages, which is what there is to answer; beside it `system` and `tools`."""
    yield Conversation(chat.with_system(fields, *chat.prompt(fields)), tools=chat.tools_of(fields))


def _tree(fields: Fields) -> Found:
    return trees.whole_tree(fields, trees.threads)


def _system(fields: Fields) -> Iterator[Message]:
    if text := fields.optional("system"):
        yield system(text)


def _one(read: Callable[[Fields], Conversation]) -> Callable[[Fields], Found]:
    return lambda fields: [read(fields)]


def _list_of(fields: Fields, key: str, *parts: str) -> bool:
    """Whether a key holds a list whose first entry has the parts."""
    value = fields.find(key)
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and all(part in value[0] for part in parts)


def _says(fields: Fields, key: str, markers: str) -> bool:
    value = fields.find(key)
    found = _TURN.search(value) if isinstance(value, str) else None
    return found is not None and found.group()[0] == markers


FORMATS: Final = (
    Format(DataFormat.CHAT, "messages", lambda row: row.has("messages"), _one(chat.chat)),
    Format(
        DataFormat.COIG, "conversations of question, answer", lambda row: _list_of(row, "conversations", "question"), _questions_answers
    ),
    Format(DataFormat.SHAREGPT, "conversations", lambda row: row.has("conversations"), _one(chat.chat)),
    Format(DataFormat.ULTRACHAT, "data", lambda row: isinstance(row.find("data"), list), _one(lambda row: chat.alternating(row, "data"))),
    Format(DataFormat.NATURAL_INSTRUCTIONS, "Definition, Instances", lambda row: row.has("Definition", "Instances"), _natural_instructions),
    Format(DataFormat.SELF_INSTRUCT, "instruction, instances", lambda row: row.has("instruction", "instances"), _instances),
    Format(DataFormat.OASST, "message_tree_id, prompt", lambda row: isinstance(row.find("prompt"), dict), _tree),
    Format(DataFormat.ALPACA, "instruction, output", lambda row: row.has("instruction", "output"), _alpaca),
    Format(DataFormat.COIG_EXAM, "question, answer", lambda row: row.has("textbox_question") or row.has("question", "answer"), _exam),
    Format(DataFormat.DOLLY, "instruction, response", lambda row: row.has("instruction", "response"), _dolly),
    Format(DataFormat.ALPACA, "instruction, output", lambda row: row.has("instruction"), _alpaca),  # which says that the output is missing
    Format(DataFormat.P3, "inputs, targets", lambda row: row.has("inputs"), _inputs_targets),
    Format(DataFormat.UNIFIEDSKG, "seq_in, seq_out", lambda row: row.has("seq_out"), _seq_in_out),
    Format(DataFormat.PROMPT_COMPLETION, "prompt, completion", lambda row: row.has("prompt"), _prompt_completion),
    Format(DataFormat.BAIZE, "input with [|Human|]", lambda row: _says(row, "input", "["), _transcript("input")),
    Format(DataFormat.UNIFIEDQA, "input, output", lambda row: row.has("input", "output"), _text_to_text),
    Format(DataFormat.OIG, "text with <human>:", lambda row: _says(row, "text", "<"), _transcript("text")),
    Format(DataFormat.TEXT, "text", lambda row: row.has("text"), _text),
)
# Shapes that only other objectives learn from, and what to say of them.
_OTHERS: Final[tuple[tuple[Callable[[Fields], bool], str], ...]] = (
    (
        lambda row: (row.has("rejected") or row.has("completion_b")) and not row.has("completion") and row.name("messages") == "messages",
        "holds preferences: set method.objective: dpo to learn from them, or name the column of the answer, as in columns: {completion: chosen} "
        "({messages: chosen} where it holds messages)",
    ),
    (
        lambda row: row.has("prompt", "completion") and isinstance(row.find("label"), bool),
        "has a label that marks its answer as good or bad, which objective sft does not learn from; set method.objective: kto, or remove it, or the bad rows",
    ),
)
READERS: Final = {one.name: one.read for one in FORMATS}
PROMPT_READERS: Final = READERS | {DataFormat.PROMPT: _prompt}


def recognised(fields: Fields, *, prompts: bool) -> Callable[[Fields], Found]:
    """How to read a row whose format nobody named, which ``prompts`` may hold no answer; raises `RowError`."""
    for fits, what in _OTHERS:
        if fits(fields):
            raise RowError("", what)
    if prompts and isinstance(fields.find("prompt"), str | list) and not fields.has("completion"):
        return _prompt
    for one in FORMATS:
        if one.fits(fields):
            return one.read
    known = "; ".join(dict.fromkeys(one.keys for one in FORMATS))
    raise RowError("", f"has none of the keys that tell its format ({known}); name others by `columns`, or give a `template`")
