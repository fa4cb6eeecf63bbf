"""From conversations to token ids and labels: a label where a token is learned, `IGNORED` elsewhere. A pair of preferences is one example of two documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from tunewright_crds.dataset import Overlong, TrainOn
from tunewright_trainer.prepare.boundaries import Boundaries
from tunewright_trainer.prepare.conversation import SAME, Conversation, Drop
from tunewright_trainer.prepare.near import Signatures, signatures
from tunewright_trainer.prepare.rendering import CHECKED, Rendered, Renderer
from tunewright_trainer.prepare.template import ID_BYTES, as_bytes, tokenize
from tunewright_trainer.prepare.words import words

IGNORED: Final = -100
INSTRUCTION: Final = -101  # the same, of the tokens that a hypernetwork reads and not the model itself

OVERLONG: Final = "longer than maxLength"

Ints = np.ndarray[Any, np.dtype[np.int32]]
Longs = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Encoded:
    """What a batch of conversations came to: examples end to end, and why the others are none."""

    ids: Ints
    """[tokens]"""
    labels: Ints
    """[tokens], `IGNORED` where nothing is learned."""
    lengths: Longs
    """[examples], in tokens."""
    chosen: Longs
    """[examples], in tokens: of a pair, the document with the chosen answer, which comes first; of a marked answer all or nothing, as it is good or bad; empty where there are neither."""
    kept: Longs
    """[examples]: numbers of their conversations in the batch."""
    drops: dict[int, str]
    """Reasons, by the number of the conversation."""
    truncated: int
    signatures: Signatures | None = None
    """[examples, PERMUTATIONS], where near duplicates are looked for."""
    parts: Longs = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[examples], in tokens: of what an encoder-decoder learns, the longest of source, target and instruction; empty for other models."""

    @property
    def longest(self) -> Longs:
        """[examples], in tokens: the longest part of each that the model reads by itself."""
        if len(self.parts):
            return self.parts
        return np.maximum(self.chosen, self.lengths - self.chosen) if len(self.chosen) else self.lengths

    def example(self, number: int) -> tuple[Ints, Ints]:
        """Ids and labels of an example, by its number among those that are kept."""
        end = int(self.lengths[: number + 1].sum())
        start = end - int(self.lengths[number])
        return self.ids[start:end], self.labels[start:end]


Told = tuple[bytes, Mapping[int, int] | None]
"""Token ids of a text, and by cut the number of tokens before it; None where the text's tokens do not begin with those of each beginning."""


class Teller(Protocol):
    """Tells of texts what the tokenizer would make of them, and of their beginnings up to each cut."""

    def told(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Told]: ...


class Encoder:
    """Encodes conversations with one tokenizer and template.

    The ids of each learned answer's prompt are those that `render_prompt_ids` gives, so that a served model sees what it was trained on.
    """

    def __init__(self, tokenizer: Any, template: str, *, train_on: TrainOn, longest: int, overlong: Overlong, near: bool) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, template, train_on)
        self._longest = longest
        self._overlong = overlong
        self._near = near
        self._tellers: list[Teller] = [teller for teller in (words(tokenizer), Boundaries(tokenizer), _Plain(tokenizer)) if teller]
        self._unchecked = CHECKED

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Examples of at most the longest length. Those that are left out: refused by the template, too long, or with nothing to learn."""
        rendered = [[self._renderer.rendered(document) for document in conversation.documents] for conversation in conversations]
        kept: dict[int, list[_Example]] = {}
        drops = {number: found.reason for number, documents in enumerate(rendered) for found in documents if isinstance(found, Drop)}
        truncated = 0
        texts = [(number, found) for number, documents in enumerate(rendered) for found in documents if isinstance(found, Rendered)]
        examples: dict[int, list[_Example]] = {}
        for (number, _), example in zip(texts, self._examples([text for _, text in texts]), strict=True):
            examples.setdefault(number, []).append(example)
        for number, documents in examples.items():
            if number in drops:
                continue
            long = any(len(document.ids) > self._longest * ID_BYTES for document in documents)
            prompt = conversations[number].unanswered
            if long and (prompt or self._overlong is not Overlong.TRUNCATE):  # a prompt's last tokens ask for the answer
                drops[number] = OVERLONG
                continue
            documents = [document.shortened(self._longest) for document in documents] if long else documents
            if not (prompt or all(document.learned for document in documents)):
                drops[number] = "nothing to learn within maxLength" if long else "nothing to learn"
                continue
            if len(documents) > 1 and documents[0].ids == documents[1].ids:
                drops[number] = SAME
                continue
            truncated += long
            kept[number] = documents
        flat = [document for documents in kept.values() for document in documents]
        return Encoded(
            ids=np.frombuffer(b"".join(document.ids for document in flat), np.int32),
            labels=np.frombuffer(b"".join(document.labels for document in flat), np.int32),
            lengths=np.array([sum(len(document.ids) for document in documents) // ID_BYTES for documents in kept.values()], dtype=np.int64),
            chosen=np.array(
                [len(documents[0].ids) // ID_BYTES * (conversations[number].desirable is not False) for number, documents in kept.items()]
                if any(conversation.rejected or conversation.desirable is not None for conversation in conversations)
                else [],
                dtype=np.int64,
            ),
            kept=np.array(list(kept), dtype=np.int64),
            drops=drops,
            truncated=truncated,
            signatures=signatures(["\n".join(conversations[number].texts) for number in kept]) if self._near and kept else None,
        )

    def _examples(self, rendered: Sequence[Rendered]) -> list["_Example"]:
        texts, cuts = [one.text for one in rendered], [one.cuts for one in rendered]
        told = self._told(texts, cuts)
        # All texts go to the tokenizer at once: it works on many in parallel.
        parts = [one.text[:cut] for one, (_, places) in zip(rendered, told, strict=True) if places is None for cut in one.cuts]
        prefixes = iter(tokenize(self._tokenizer, parts) if parts else [])
        return [
            _example(one, *self._compared(one, ids, [as_bytes(next(prefixes)) for _ in one.cuts]))
            if places is None
            else _example(one, ids, places)
            for one, (ids, places) in zip(rendered, told, strict=True)
        ]

    def _told(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Told]:
        """By the first teller that told the truth of the texts whose tokens and beginnings were compared."""
        told = self._tellers[0].told(texts, cuts)
        compared = range(min(self._unchecked, len(texts)))
        if len(self._tellers) > 1 and not all(self._is_true(texts[number], cuts[number], told[number]) for number in compared):
            del self._tellers[0]
            self._unchecked = CHECKED
            return self._told(texts, cuts)
        self._unchecked -= len(compared)
        return told

    def _is_true(self, text: str, cuts: Sequence[int], told: Told) -> bool:
        ids, places = told
        whole, *beginnings = map(as_bytes, tokenize(self._tokenizer, [text, *(text[:cut] for cut in cuts)]))
        return ids == whole and (places is None or [ids[: places[cut] * ID_BYTES] for cut in cuts] == beginnings)

    def _compared(self, rendered: Rendered, whole: bytes, prefixes: Sequence[bytes]) -> tuple[bytes, Mapping[int, int]]:
        """Ids and places from the tokens of the whole text and of the beginnings up to each cut."""
        if all(map(whole.startswith, prefixes)):
            return whole, {cut: len(prefix) // ID_BYTES for cut, prefix in zip(rendered.cuts, prefixes, strict=True)}
        return self._piecewise(rendered, prefixes)

    def _piecewise(self, rendered: Rendered, prefixes: Sequence[bytes]) -> tuple[bytes, dict[int, int]]:
        """Ids where a token would reach over a cut: the text goes on from the prompt's own ids wherever these go on from what is there."""
        starts = {start for start, _ in rendered.spans}
        ids = b""
        places = {}
        done = 0
        for cut, prefix in zip(rendered.cuts, prefixes, strict=True):
            if cut in starts and prefix.startswith(ids):
                ids = prefix
            else:
                ids += as_bytes(tokenize(self._tokenizer, [rendered.text[done:cut]])[0])
            places[cut], done = len(ids) // ID_BYTES, cut
        ids += as_bytes(tokenize(self._tokenizer, [rendered.text[done:]])[0])
        return ids, places


class _Plain:
    """Tells of any tokenizer what it makes of the whole text, and nothing of its beginnings."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def told(self, texts: Sequence[str], _cuts: Sequence[Sequence[int]]) -> list[Told]:
        return [(as_bytes(ids), None) for ids in tokenize(self._tokenizer, texts)]


@dataclass(frozen=True, slots=True)
class _Example:
    """A text's ids, and from where to where they are learned, in tokens."""

    ids: bytes
    learned: Sequence[tuple[int, int]]

    def shortened(self, longest: int) -> "_Example":
        """The first `longest` tokens."""
        learned = [(start, min(end, longest)) for start, end in self.learned if start < longest]
        return _Example(self.ids[: longest * ID_BYTES], learned)

    @property
    def labels(self) -> bytes:
        labels = bytearray(_NOTHING * (len(self.ids) // ID_BYTES))
        for start, end in self.learned:
            labels[start * ID_BYTES : end * ID_BYTES] = self.ids[start * ID_BYTES : end * ID_BYTES]
        return bytes(labels)


_NOTHING: Final = as_bytes([IGNORED])


def _example(rendered: Rendered, ids: bytes, places: Mapping[int, int]) -> _Example:
    """`places` says how many tokens lie before each cut."""
    ends = {0: 0, **places, len(rendered.text): len(ids) // ID_BYTES}
    # Nothing predicts the first token.
    learned = [(max(ends[start], 1), ends[end]) for start, end in rendered.spans]
    return _Example(ids, [(start, end) for start, end in learned if start < end])
