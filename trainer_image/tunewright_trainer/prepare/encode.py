"""From conversations to token ids and labels: a label where a token is learned, `IGNORED` elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import TrainOn
from tunewright_trainer.prepare.convert import Conversation
from tunewright_trainer.prepare.template import Unrenderable, needs_end_of_text, render, tokenize

IGNORED: Final = -100

Ints = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one conversation, of one length."""

    input_ids: Ints
    labels: Ints


@dataclass(frozen=True)
class _Rendered:
    """The text of a conversation and the spans of it that are learned."""

    text: str
    spans: Sequence[tuple[int, int]]

    @property
    def cuts(self) -> list[int]:
        """Where the text changes between learned and not."""
        return sorted({cut for span in self.spans for cut in span if 0 < cut < len(self.text)})


class Encoder:
    """Encodes conversations with one tokenizer and template.

    The ids of each learned answer's prompt are those that `render_prompt_ids` gives, so that a served model sees what it was trained on.
    """

    def __init__(self, tokenizer: Any, template: str, *, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._ends_text = needs_end_of_text(tokenizer, template)

    def encode(self, conversations: Sequence[Conversation]) -> list[Example | None]:
        """An example for each conversation, None where the template refuses it."""
        rendered = [self._rendered(messages) for messages in conversations]
        # All texts go to the tokenizer at once: it works on many in parallel.
        texts = [text for found in rendered if found for text in (found.text, *(found.text[:cut] for cut in found.cuts))]
        ids = iter(tokenize(self._tokenizer, texts) if texts else [])
        return [self._example(found, [next(ids) for _ in (found.text, *found.cuts)]) if found else None for found in rendered]

    def _rendered(self, messages: Conversation) -> _Rendered | None:
        try:
            text = render(self._tokenizer, messages, self._template, generation_prompt=False)
            spans = (
                [(0, len(text))] if self._train_on is TrainOn.ALL else [self._span(messages, at, text) for at in self._learned(messages)]
            )
        except Unrenderable:
            return None
        if messages[-1]["role"] == "assistant" and spans:
            text = text[: max(spans[-1][1], 1)]
            if self._ends_text:
                text += self._tokenizer.eos_token
                spans[-1] = (spans[-1][0], len(text))
        return _Rendered(text, spans)

    def _learned(self, messages: Conversation) -> list[int]:
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        return answers[-1:] if self._train_on is TrainOn.LAST_RESPONSE else answers

    def _span(self, messages: Conversation, at: int, text: str) -> tuple[int, int]:
        """Where in `text` answer `at` begins and where its end-of-turn ends."""
        prompt = render(self._tokenizer, messages[:at], self._template, generation_prompt=True)
        last = at == len(messages) - 1
        through = text if last else render(self._tokenizer, messages[: at + 1], self._template, generation_prompt=False)
        if not (text.startswith(prompt) and text.startswith(through)):
            raise Refusal(
                FailureCode.CONFIG_INVALID,
                "the chat template writes a conversation's beginning differently once more messages follow, so that the prompt of training would "
                "not be that of serving; give a template that does not, or set dataset.trainOn: last-response",
                param="spec.model.chatTemplate",
            )
        # White space after the end-of-turn is the template's, not the model's to write.
        end = len(through.rstrip())
        return len(prompt), end if end > len(prompt) else len(through)

    def _example(self, rendered: _Rendered, ids: Sequence[list[int]]) -> Example:
        whole, prefixes = ids[0], ids[1:]
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            places = dict(zip(rendered.cuts, map(len, prefixes), strict=True)) | {0: 0, len(rendered.text): len(whole)}
        else:
            whole, places = self._piecewise(rendered, prefixes)
        input_ids = np.array(whole, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORED)
        for start, end in rendered.spans:
            labels[places[start] : places[end]] = input_ids[places[start] : places[end]]
        labels[:1] = IGNORED  # nothing predicts the first token
        return Example(input_ids, labels)

    def _piecewise(self, rendered: _Rendered, prefixes: Sequence[list[int]]) -> tuple[list[int], dict[int, int]]:
        """Ids where a token would reach over a cut: the text goes on from the prompt's own ids wherever these go on from what is there."""
        starts = {start for start, _ in rendered.spans}
        ids: list[int] = []
        places = {0: 0}
        done = 0
        for cut, prefix in zip(rendered.cuts, prefixes, strict=True):
            if cut in starts and prefix[: len(ids)] == ids:
                ids = list(prefix)
            else:
                ids += tokenize(self._tokenizer, [rendered.text[done:cut]])[0]
            places[cut], done = len(ids), cut
        ids += tokenize(self._tokenizer, [rendered.text[done:]])[0]
        return ids, places | {len(rendered.text): len(ids)}
