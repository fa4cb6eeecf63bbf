"""Examples for encoder-decoders: a source, which is everything before an answer, and a target, which is the answer and the end-of-text token.

For a hypernetwork an instruction stands before both: the source is then the input without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tunewright_crds.dataset import Overlong, TrainOn
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.prepare.conversation import Conversation, Drop, paragraphs, user
from tunewright_trainer.prepare.encode import IGNORED, INSTRUCTION, OVERLONG, Encoded, Encoder
from tunewright_trainer.prepare.near import signatures
from tunewright_trainer.prepare.template import ID_BYTES, Unrenderable, as_bytes, end_of_turn, render

NO_PROMPT: Final = "a text without a prompt, which an encoder-decoder cannot learn"
NO_INSTRUCTION: Final = "no instruction apart from its input"
NOTHING: Final = "nothing to learn"


@dataclass(frozen=True, slots=True)
class _Texts:
    source: str
    target: str
    instruction: str = ""


class SequenceEncoder(Encoder):
    """Encodes conversations that end with the one answer that is learned (`Conversation.exchanges`).

    The ids of each source are those that `render_prompt_ids` gives, so that a served model reads what it was trained on.
    """

    def __init__(self, tokenizer: Any, template: str, *, longest: int, overlong: Overlong, near: bool) -> None:
        if tokenizer.eos_token is None:
            raise Refusal(
                FailureCode.MODEL_UNSUPPORTED,
                "the tokenizer has no end-of-text token, so that no end could be learned",
                param="spec.model.uri",
            )
        super().__init__(tokenizer, template, train_on=TrainOn.LAST_RESPONSE, longest=longest, overlong=overlong, near=near)
        self._template = template
        self._turn = end_of_turn(tokenizer, template)
        self._begin = as_bytes(_begin(tokenizer))

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Sources and targets of at most the longest length each, a target behind its source. What is left out, as `Encoder` says."""
        drops: dict[int, str] = {}
        found: dict[int, _Texts] = {}
        for number, conversation in enumerate(conversations):
            texts = self._texts(conversation)
            if isinstance(texts, Drop):
                drops[number] = texts.reason
            else:
                found[number] = texts
        kept: dict[int, tuple[bytes, bytes, bytes]] = {}
        truncated = 0
        room = self._longest * ID_BYTES
        instructions, sources, targets = (
            self._ids([getattr(one, name) for one in found.values()]) for name in ("instruction", "source", "target")
        )
        for number, instruction, source, target in zip(found, instructions, sources, targets, strict=True):
            parts = (instruction, source, self._begin + target)
            long = max(map(len, parts)) > room
            if long and self._overlong is not Overlong.TRUNCATE:
                drops[number] = OVERLONG
                continue
            truncated += long
            kept[number] = (parts[0][:room], parts[1][:room], parts[2][:room])
        lengths = np.array([[len(part) for part in parts] for parts in kept.values()], dtype=np.int64).reshape(-1, 3) // ID_BYTES
        read = (as_bytes([INSTRUCTION]), as_bytes([IGNORED]))
        labels = [
            read[0] * (len(instruction) // ID_BYTES) + read[1] * (len(source) // ID_BYTES) + target
            for instruction, source, target in kept.values()
        ]
        return Encoded(
            ids=np.frombuffer(b"".join(part for parts in kept.values() for part in parts), np.int32),
            labels=np.frombuffer(b"".join(labels), np.int32),
            lengths=lengths.sum(axis=1),
            chosen=np.empty(0, dtype=np.int64),
            parts=lengths.max(axis=1, initial=0),
            kept=np.array(list(kept), dtype=np.int64),
            drops=drops,
            truncated=truncated,
            signatures=signatures(["\n".join(conversations[number].texts) for number in kept]) if self._near and kept else None,
        )

    def _ids(self, texts: Sequence[str]) -> list[bytes]:
        """Token ids of each text; none of an empty one."""
        said = [text for text in texts if text]
        ids = iter([ids for ids, _ in self._told(said, [[] for _ in said])] if said else [])
        return [next(ids) if text else b"" for text in texts]

    def _texts(self, conversation: Conversation) -> _Texts | Drop:
        if conversation.text:
            return Drop(NO_PROMPT)
        found = self._renderer.rendered(conversation)
        if isinstance(found, Drop):
            return found
        if not found.spans or not found.spans[-1][0]:
            return Drop(NOTHING if not found.spans else NO_PROMPT)
        start, end = found.spans[-1]
        answer = found.text[start:end].removesuffix(self._tokenizer.eos_token).removesuffix(self._turn)
        return _Texts(found.text[:start], answer + self._tokenizer.eos_token)


class InstructedEncoder(SequenceEncoder):
    """Encodes single questions whose instruction is known. It is rendered as a question of its own, behind a system message; an input that is missing is empty."""

    def _texts(self, conversation: Conversation) -> _Texts | Drop:
        *before, question, answer = conversation.messages if len(conversation.messages) > 1 else (user(""), user(""))
        alone = question["role"] == "user" and all(message["role"] == "system" for message in before) and not conversation.tools
        if not (conversation.instruction and alone and question["content"].startswith(conversation.instruction)):
            return Drop(NO_INSTRUCTION)
        given = question["content"][len(conversation.instruction) :].removeprefix("\n\n")
        found = super()._texts(Conversation((user(given), answer), read_only=frozenset(n for n in conversation.read_only if n == 1)))
        told = paragraphs(*(message["content"] for message in before), conversation.instruction)
        if isinstance(found, Drop):
            return found
        try:
            read = render(self._tokenizer, [user(told)], self._template, generation_prompt=True)
        except Unrenderable as why:
            return Drop(why.reason)
        return _Texts(found.source, found.target, read)


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text that a decoder shall write: nothing for T5, `<s>` for BART."""
    around = list(tokenizer("").input_ids)
    return around[: around.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in around else []
