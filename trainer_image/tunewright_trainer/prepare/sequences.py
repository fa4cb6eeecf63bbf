"""Examples for encoder-decoders: a source, which is everything before an answer, and a target, which is the answer and the end-of-text token."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tunewright_crds.dataset import Overlong, TrainOn
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.encode import IGNORED, OVERLONG, Encoded, Encoder
from tunewright_trainer.prepare.near import signatures
from tunewright_trainer.prepare.template import ID_BYTES, as_bytes, end_of_turn

NO_PROMPT: Final = "a text without a prompt, which an encoder-decoder cannot learn"
NOTHING: Final = "nothing to learn"


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
        self._turn = end_of_turn(tokenizer, template)
        self._begin = as_bytes(_begin(tokenizer))

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Sources and targets of at most the longest length each, a target behind its source. What is left out, as `Encoder` says."""
        drops: dict[int, str] = {}
        texts: list[str] = []
        numbers: list[int] = []
        for number, conversation in enumerate(conversations):
            found = self._source_and_target(conversation)
            if isinstance(found, Drop):
                drops[number] = found.reason
            else:
                numbers.append(number)
                texts += found
        ids = [ids for ids, _ in self._told(texts, [[] for _ in texts])] if texts else []
        kept: dict[int, tuple[bytes, bytes]] = {}
        truncated = 0
        room = self._longest * ID_BYTES
        for at, number in enumerate(numbers):
            source, target = ids[2 * at], self._begin + ids[2 * at + 1]
            long = max(len(source), len(target)) > room
            if long and self._overlong is not Overlong.TRUNCATE:
                drops[number] = OVERLONG
                continue
            truncated += long
            kept[number] = source[:room], target[:room]
        lengths = np.array([(len(source), len(target)) for source, target in kept.values()], dtype=np.int64).reshape(-1, 2) // ID_BYTES
        return Encoded(
            ids=np.frombuffer(b"".join(part for both in kept.values() for part in both), np.int32),
            labels=np.frombuffer(
                b"".join(as_bytes([IGNORED]) * (len(source) // ID_BYTES) + target for source, target in kept.values()), np.int32
            ),
            lengths=lengths.sum(axis=1),
            chosen=np.empty(0, dtype=np.int64),
            sources=lengths[:, 0],
            kept=np.array(list(kept), dtype=np.int64),
            drops=drops,
            truncated=truncated,
            signatures=signatures(["\n".join(conversations[number].texts) for number in kept]) if self._near and kept else None,
        )

    def _source_and_target(self, conversation: Conversation) -> tuple[str, str] | Drop:
        if conversation.text:
            return Drop(NO_PROMPT)
        found = self._renderer.rendered(conversation)
        if isinstance(found, Drop):
            return found
        if not found.spans or not found.spans[-1][0]:
            return Drop(NOTHING if not found.spans else NO_PROMPT)
        start, end = found.spans[-1]
        answer = found.text[start:end].removesuffix(self._tokenizer.eos_token).removesuffix(self._turn)
        return found.text[:start], answer + self._tokenizer.eos_token


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text that a decoder shall write: nothing for T5, `<s>` for BART."""
    around = list(tokenizer("").input_ids)
    return around[: around.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in around else []
