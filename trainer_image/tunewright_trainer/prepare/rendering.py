"""From conversations to texts, and which parts of them are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tunewright_crds.dataset import TrainOn
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.skeleton import Skeletons
from tunewright_trainer.prepare.template import Unrenderable, needs_end_of_text, render

CHECKED: Final = 64  # conversations whose text and tokens are made in any case, to see that what is quicker comes to the same


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and the spans of it that are learned."""

    text: str
    spans: Sequence[tuple[int, int]]

    @property
    def cuts(self) -> list[int]:
        """Where the text changes between learned and not."""
        return sorted({cut for span in self.spans for cut in span if 0 < cut < len(self.text)})


class Renderer:
    """Renders conversations with one template."""

    def __init__(self, tokenizer: Any, template: str, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._ends_text = needs_end_of_text(tokenizer, template)
        self._skeletons: Skeletons | None = Skeletons(tokenizer, template)
        self._unfilled = CHECKED

    def rendered(self, conversation: Conversation) -> Rendered | Drop:
        """The text; a `Drop` where the template refuses the conversation or leaves a part of it out."""
        if conversation.text:
            text = conversation.text + (self._tokenizer.eos_token or "")
            return Rendered(text, [(0, len(text))])
        try:
            text, spans = self._filled(conversation) or self._as_written(conversation)
        except Unrenderable as why:
            return Drop(why.reason)
        if conversation.messages[-1]["role"] == "assistant" and spans:
            text = text[: max(spans[-1][1], 1)]
            if self._ends_text:
                text += self._tokenizer.eos_token
                spans[-1] = (spans[-1][0], len(text))
        return Rendered(text, spans)

    def _filled(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]] | None:
        """The text and what is learned of it, where the template writes the same around any contents."""
        contents = [message["content"] for message in conversation.messages]
        plain = all(len(message) == 2 and message["role"] != "tool" for message in conversation.messages)
        if self._skeletons is None or conversation.tools or not plain or not self._skeletons.fits(contents):
            return None
        roles = tuple(message["role"] for message in conversation.messages)
        whole = self._skeletons.of(roles, generation_prompt=conversation.unanswered)
        if whole is None:
            return None
        text = whole.filled(contents)
        spans = [(0, len(text))] if self._train_on is TrainOn.ALL else []
        for at in [] if spans else self._learned(conversation):
            prompt = self._skeletons.of(roles[:at], generation_prompt=True)
            through = self._skeletons.of(roles[: at + 1], generation_prompt=False)
            if not (prompt and through and prompt.begins(whole) and through.begins(whole)):
                return None
            spans.append(_answer(text, prompt.length(contents), through.length(contents)))
        if self._unfilled:
            self._unfilled -= 1
            if (text, spans) != self._as_written(conversation):
                self._skeletons = None
                return None
        return text, spans

    def _as_written(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text and what is learned of it, as the template writes this conversation and its beginnings."""
        text = self._render(conversation)
        if self._train_on is TrainOn.ALL:
            return text, [(0, len(text))]
        return text, [self._span(conversation, at, text) for at in self._learned(conversation)]

    def _render(self, conversation: Conversation) -> str:
        """The whole text, in which everything that was said about tools must be found again."""
        asks, tools = conversation.unanswered, conversation.tools
        text = render(self._tokenizer, conversation.messages, self._template, generation_prompt=asks, tools=tools)
        for tool in conversation.tools:
            if str(tool["function"].get("name")) not in text:
                raise Unrenderable("the chat template leaves out the tools")
        for message in conversation.messages:
            if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
                raise Unrenderable("the chat template leaves out calls of tools")
            if message["role"] == "tool" and message["content"].strip() not in text:
                raise Unrenderable("the chat template leaves out answers of tools")
        return text

    def _learned(self, conversation: Conversation) -> list[int]:
        answers = [] if conversation.unanswered else conversation.answers
        return answers[-1:] if self._train_on is TrainOn.LAST_RESPONSE else answers

    def _span(self, conversation: Conversation, at: int, text: str) -> tuple[int, int]:
        """Where in `text` answer `at` begins and where its end-of-turn ends."""
        messages, tools = conversation.messages, conversation.tools
        prompt = render(self._tokenizer, messages[:at], self._template, generation_prompt=True, tools=tools)
        last = at == len(messages) - 1
        through = text if last else render(self._tokenizer, messages[: at + 1], self._template, generation_prompt=False, tools=tools)
        if not (text.startswith(prompt) and text.startswith(through)):
            raise Refusal(
                FailureCode.CONFIG_INVALID,
                "the chat template writes a conversation's beginning differently once more messages follow, so that the prompt of training would "
                "not be that of serving; give a template that does not, or set dataset.trainOn: last-response",
                param="spec.model.chatTemplate",
            )
        return _answer(text, len(prompt), len(through))


def _answer(text: str, start: int, end: int) -> tuple[int, int]:
    """White space after the end-of-turn is the template's, not the model's to write."""
    stripped = len(text[:end].rstrip())
    return start, stripped if stripped > start else end
