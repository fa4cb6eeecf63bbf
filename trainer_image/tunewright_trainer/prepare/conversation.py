"""The one form that every row takes before it meets a template."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

Message = Mapping[str, Any]
"""As chat templates take them: `role` (system, user, assistant, tool), `content`, an assistant's `tool_calls`, a tool's `name` and `tool_call_id`."""

_UNCLEAN: Final = bytes(set(range(0x20)) - set(b"\t\n") | {0x7F})
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no tokenizer of instruction data needs them

SAME: Final = "chosen and rejected are the same"
"""Why a pair is dropped."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, of which the assistant's are learned; or, without any, a plain `text`, which is learned whole."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    read_only: frozenset[int] = frozenset()
    """Numbers of assistant messages that are read and not learned."""
    text: str = ""
    group: str = ""
    """Conversations of one group never part: all are trained on, or none is."""
    rejected: tuple[Message, ...] = ()
    """In a pair of preferences: what was found worse than `messages` from number `shared` on. What comes before is the prompt of both, and only read."""
    shared: int = 0
    instruction: str = field(default="", compare=False)
    """The beginning of the last question, where it says what is to be done, and an empty line and the input follow; empty where nobody knows."""
    desirable: bool | None = None
    """Whether the last answer is marked as a good one; None where nobody says."""
    unanswered: bool = False
    """Whether all of it is a prompt, for the model to answer itself."""

    @property
    def documents(self) -> "tuple[Conversation, ...]":
        """What the model reads, each by itself: the conversation, or of a pair the prompt with the chosen answer, and with the rejected one."""
        if not self.rejected:
            return (self,)
        sides = (self.messages, (*self.messages[: self.shared], *self.rejected))
        return tuple(Conversation(messages, self.tools, self.read_only, group=self.group) for messages in sides)

    def exchanges(self, *, last: bool) -> "tuple[Conversation, ...]":
        """Each answer that is learned with all that comes before it, of which nothing is learned; or the last one only."""
        found = []
        for at in self.answers[-1:] if last else self.answers:
            before = frozenset(number for number in range(at) if self.messages[number]["role"] == "assistant")
            found.append(Conversation(self.messages[: at + 1], self.tools, before, group=self.group, instruction=self.instruction))
        return tuple(found) or (self,)

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's messages that are to be learned."""
        return [at for at, message in enumerate(self.messages) if message["role"] == "assistant" and at not in self.read_only]

    @property
    def texts(self) -> Iterator[str]:
        """Everything that somebody says in it."""
        if self.text:
            yield self.text
        for message in (*self.messages, *self.rejected):
            yield message["content"]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What comes before the first answer."""
        first = next((at for at, message in enumerate(self.messages) if message["role"] == "assistant"), len(self.messages))
        return self.messages[:first]

    def content(self) -> bytes:
        """The same bytes for the same conversation, whatever it was read from."""
        pair: list[Any] = [self.rejected, self.shared] if self.rejected else []
        pair += [self.desirable] if self.desirable is not None else []
        return orjson.dumps([self.messages, self.tools, sorted(self.read_only), self.text, *pair], option=orjson.OPT_SORT_KEYS)

    def cleaned(self) -> "Conversation":
        """Windows line ends as plain ones, and no control characters but tab and line feed."""
        if not any(map(_is_unclean, self.texts)):
            return self
        messages, rejected = (
            tuple({**message, "content": clean_text(message["content"])} for message in part) for part in (self.messages, self.rejected)
        )
        instruction = clean_text(self.instruction)
        text = clean_text(self.text)
        return replace(self, messages=messages, text=text, rejected=rejected, instruction=instruction)

    def every_text(self) -> list[str]:
        """Everything that a template may show, names of roles among it: also the calls of tools, and what describes these."""
        return [text for part in (self.text, self.messages, self.rejected, self.tools) for text in texts_of(part)]

    def rewritten(self, change: Callable[[str], str]) -> "Conversation":
        """Each of `every_text` changed."""
        messages, rejected, tools = (tuple(_rewritten(one, change) for one in part) for part in (self.messages, self.rejected, self.tools))
        # Where the instruction ends after a change nobody knows, unless there is none.
        kept = self.instruction if any(one["content"].startswith(self.instruction) for one in messages) else ""
        return replace(self, messages=messages, tools=tools, text=change(self.text), rejected=rejected, instruction=kept)


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is left out for a good reason, which is no mistake in it."""

    reason: str


class RowError(Exception):
    """What is wrong with a row, in terms of the file's own keys; never holds content."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(what)
        self.field = field
        self.what = what


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)


def _rewritten(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _rewritten(inner, change) for key, inner in value.items()}
    return [_rewritten(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def clean_text(text: str) -> str:
    """See `Conversation.cleaned`."""
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


def _is_unclean(text: str) -> bool:
    # Looking for characters of a set is ten times as fast in bytes, where they are the same.
    data = text.encode(errors="surrogatepass")
    return len(data.translate(None, _UNCLEAN)) < len(data)


def as_text(value: Any, name: str) -> str:
    """A value that must be text; raises `RowError`."""
    if not isinstance(value, str):
        raise RowError(name, "must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(name, "holds a lone surrogate, which is no character") from None
    return value


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def exchange(question: str, answer: str, *, before: tuple[Message, ...] = (), instruction: str = "") -> Conversation:
    """One question and its answer, after what was said before. The question may begin with an `instruction`."""
    return Conversation((*before, user(question), assistant(answer)), instruction=instruction)


def instructed(instruction: str, given: str, answer: str, *, before: tuple[Message, ...] = ()) -> Conversation:
    """An instruction with an input, which may be empty, and the answer."""
    return exchange(paragraphs(instruction, given), answer, before=before, instruction=instruction if instruction.strip() else "")


def pair(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], *, shared: int, tools: tuple[Mapping[str, Any], ...] = (), group: str = ""
) -> Conversation:
    """Two conversations that are the same up to message `shared`, of which the first goes on better."""
    prompt = frozenset(at for at in range(shared) if chosen[at]["role"] == "assistant")
    return Conversation(chosen, tools, prompt, group=group, rejected=rejected[shared:], shared=shared)


def paragraphs(*parts: str) -> str:
    """The parts that say something, an empty line between them."""
    return "\n\n".join(part for part in parts if part.strip())
