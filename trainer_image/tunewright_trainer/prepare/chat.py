"""Conversations that are written as lists of messages, in OpenAI's manner, ShareGPT's, or as bare texts that take turns."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tunewright_trainer.prepare.conversation import Conversation, Message, RowError, as_text, assistant, system, user
from tunewright_trainer.prepare.fields import Fields, within

ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_TOLD: Final = "system, user, assistant or tool (or human, gpt, function_call, observation)"


def chat(fields: Fields) -> Conversation:
    """`messages` of {role, content[, tool_calls, weight]} or `conversations` of {from, value}; beside them `system` and `tools`."""
    key = "messages" if fields.has("messages") else "conversations"
    if all(isinstance(entry, str) for _, entry in fields.items(key)):
        return alternating(fields, key)
    read = [message_of(entry) for entry in fields.objects(key)]
    messages = with_system(fields, *(message for message, _ in read))
    shift = len(messages) - len(read)
    unlearned = frozenset(at + shift for at, (_, learned) in enumerate(read) if not learned)
    return Conversation(messages, tools=tools_of(fields), read_only=unlearned)


def prompt(fields: Fields) -> tuple[Message, ...]:
    """`prompt`, a text or a list of messages."""
    if not isinstance(fields.get("prompt"), list):
        return (user(fields.filled("prompt")),)
    return tuple(message_of(entry)[0] for entry in fields.objects("prompt"))


def with_system(fields: Fields, *messages: Message) -> tuple[Message, ...]:
    """The messages behind the row's `system`, if it has one and they do not begin with their own."""
    instruction = fields.optional("system")
    return (system(instruction), *messages) if instruction and messages[0]["role"] != "system" else messages


def alternating(fields: Fields, key: str) -> Conversation:
    """A list of texts that user and assistant say in turn (LIMA, UltraChat)."""
    texts = [as_text(entry, name) for name, entry in fields.items(key)]
    return Conversation(tuple(assistant(text) if at % 2 else user(text) for at, text in enumerate(texts)))


def message_of(entry: Fields) -> tuple[Message, bool]:
    """A message and whether it is learned."""
    role_key, text_key = ("from", "value") if entry.has("from") else ("role", "content")
    said = entry.get(role_key)
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise RowError(entry.name(role_key), f"must be {_TOLD}")
    if said == "function_call":
        return {"role": role, "content": "", "tool_calls": _sharegpt_calls(entry.text(text_key), entry.name(text_key))}, _learned(entry)
    calls = _calls(entry) if entry.find("tool_calls") else []
    content = "" if calls and not entry.has(text_key) else _content(entry.get(text_key), entry.name(text_key))
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: entry.text(key) for key in ("name", "tool_call_id") if entry.has(key)}
    return message, _learned(entry)


def _content(value: Any, name: str) -> str:
    """A text, or OpenAI's list of parts, which must be texts."""
    if not isinstance(value, list):
        return as_text(value, name)
    parts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError(f"{name}[{index}]", "must be a part of type text; images and sound are not supported")
        parts.append(as_text(part.get("text"), f"{name}[{index}].text"))
    return "".join(parts)


def _learned(entry: Fields) -> bool:
    """OpenAI's `weight`, 0 or 1, or `train`, true or false; a message without either is learned."""
    for key, values in (("weight", (0, 1)), ("train", (False, True))):
        if entry.has(key):
            value = entry.find(key)
            if value not in values:
                raise RowError(entry.name(key), f"must be {values[0]} or {values[1]}")
            return bool(value)
    return True


def _calls(entry: Fields) -> Sequence[Mapping[str, Any]]:
    calls = []
    for call in entry.objects("tool_calls"):
        function = within(call.get("function"), call.name("function")) if call.has("function") else call
        told = {"type": "function", "function": {"name": function.filled("name"), "arguments": _arguments(function)}}
        calls.append({"id": call.text("id"), **told} if call.has("id") else told)
    return calls


def _sharegpt_calls(text: str, name: str) -> Sequence[Mapping[str, Any]]:
    """The value of a `function_call`: JSON of one {name, arguments}, or of a list of them."""
    found = _parsed(text, name)
    calls = (within(call, name) for call in (found if isinstance(found, list) else [found]))
    return [{"type": "function", "function": {"name": call.filled("name"), "arguments": _arguments(call)}} for call in calls]


def _arguments(function: Fields) -> Any:
    """Templates want the arguments as an object, OpenAI's files have them as JSON in a text."""
    value = function.find("arguments")
    found = _parsed(value, function.name("arguments")) if isinstance(value, str) else value
    if found is not None and not isinstance(found, dict):
        raise RowError(function.name("arguments"), "must be an object")
    return found or {}


def tools_of(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """Definitions of tools as chat templates take them, from a list or from JSON in a text."""
    value, name = fields.find("tools"), fields.name("tools")
    if value is None or value == "":
        return ()
    found = _parsed(value, name) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise RowError(name, "must be a list of tools")
    tools = [within(tool, f"{name}[{index}]") for index, tool in enumerate(found)]
    return tuple(tool.row if tool.has("function") else {"type": "function", "function": tool.row} for tool in tools)


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(name, "must be JSON") from None
