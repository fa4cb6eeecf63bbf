"""Rows of the formats in use, as conversations."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tunewright_crds.job import DataFormat
from tunewright_trainer.prepare.rows import Row
from tunewright_trainer.prepare.template import Message

ROLES: Final = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no tokenizer of instruction data needs them

Conversation = list[Message]


class RowError(Exception):
    """What is wrong with a row, in terms of the file's own keys; never holds content."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(what)
        self.field = field
        self.what = what


def conversation(row: Row, *, format: DataFormat, columns: Mapping[str, str]) -> Conversation:
    """The conversation that a row tells, which begins with a system or user message and holds an assistant's; raises `RowError`.

    `columns` maps our keys to the file's.
    """
    fields = _Fields(row, columns)
    kind = _recognised(fields) if format is DataFormat.AUTO else format
    messages = _READERS[kind](fields)
    if messages and messages[0]["role"] == "assistant":
        raise RowError(fields.name(_FIRST_KEY[kind]), "begins with an answer; a system or user message must come first")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(fields.name(_FIRST_KEY[kind]), "holds no assistant message")
    return messages


class _Fields:
    """A row by our keys."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        self._row = row
        self._columns = columns

    def name(self, key: str) -> str:
        """The file's name of a key of ours."""
        return self._columns.get(key, key)

    def has(self, key: str) -> bool:
        return self._row.get(self.name(key)) is not None

    def get(self, key: str) -> Any:
        if not self.has(key):
            raise RowError(self.name(key), "is missing")
        return self._row[self.name(key)]

    def text(self, key: str) -> str:
        return _text(self.get(key), self.name(key))

    def optional(self, key: str) -> str:
        return self.text(key) if self.has(key) else ""


def _recognised(fields: _Fields) -> DataFormat:
    if fields.has("messages") or fields.has("conversations"):
        return DataFormat.CHAT
    if fields.has("instruction"):
        return DataFormat.ALPACA
    if fields.has("prompt"):
        return DataFormat.PROMPT_COMPLETION
    raise RowError("", "has none of the keys that tell its format (instruction, messages, conversations, prompt); name others by `columns`")


def _alpaca(fields: _Fields) -> Conversation:
    """Stanford Alpaca's keys, with `system` and `history` as LLaMA-Factory has them: history is a list of [question, answer]."""
    messages = [_message("system", fields.optional("system"))] if fields.optional("system") else []
    history = fields.get("history") if fields.has("history") else []
    name = fields.name("history")
    if not isinstance(history, list):
        raise RowError(name, "must be a list of [question, answer]")
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(f"{name}[{index}]", "must be [question, answer]")
        messages += [_message("user", _text(turn[0], f"{name}[{index}]")), _message("assistant", _text(turn[1], f"{name}[{index}]"))]
    question = "\n\n".join(part for part in (fields.text("instruction"), fields.optional("input")) if part)
    if not question:
        raise RowError(fields.name("instruction"), "is empty")
    return [*messages, _message("user", question), _message("assistant", fields.text("output"))]


def _prompt_completion(fields: _Fields) -> Conversation:
    prompt = fields.text("prompt")
    if not prompt:
        raise RowError(fields.name("prompt"), "is empty")
    return [_message("user", prompt), _message("assistant", fields.text("completion"))]


def _chat(fields: _Fields) -> Conversation:
    key = "messages" if fields.has("messages") else "conversations"
    entries = fields.get(key)
    name = fields.name(key)
    if not isinstance(entries, list) or not entries:
        raise RowError(name, "must be a list of messages")
    system = fields.optional("system")
    messages = [_chat_message(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]
    return [_message("system", system), *messages] if system and messages[0]["role"] != "system" else messages


def _chat_message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise RowError(where, "must be an object with role and content")
    role_key, text_key = ("from", "value") if "from" in entry else ("role", "content")
    for key in (role_key, text_key):
        if entry.get(key) is None:
            raise RowError(f"{where}.{key}", "is missing")
    role = ROLES.get(entry[role_key].lower()) if isinstance(entry[role_key], str) else None
    if role is None:
        raise RowError(f"{where}.{role_key}", "must be system, user or assistant (or human, gpt)")
    return _message(role, _text(entry[text_key], f"{where}.{text_key}"))


_READERS: Final = {DataFormat.ALPACA: _alpaca, DataFormat.CHAT: _chat, DataFormat.PROMPT_COMPLETION: _prompt_completion}
_FIRST_KEY: Final = {DataFormat.ALPACA: "instruction", DataFormat.CHAT: "messages", DataFormat.PROMPT_COMPLETION: "prompt"}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(name, "must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(name, "holds a lone surrogate, which is no character") from None
    return value


def without_control_characters(messages: Sequence[Message]) -> Conversation:
    """The conversation with Windows line ends as plain ones and without control characters but tab and line feed."""
    return [_message(message["role"], _CONTROL.sub("", message["content"].replace("\r\n", "\n"))) for message in messages]
