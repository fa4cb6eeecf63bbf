"""Rows to train on that hold a piece of what is tested with: the same words in a row (as GPT-3's authors looked for them, Brown et al. 2020, appendix C)."""

import re
from typing import Any, Final

import numpy as np

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.prepare.conversation import Conversation

MOST_RUNS: Final = 20_000_000  # of 8 bytes each, and twice that while they are sorted: half a GiB at most
_SORTED_AT_ONCE: Final = 2_000_000
_WORD: Final = re.compile(r"\w+")
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


class HeldOut:
    """The runs of so many words of all rows that are held out, by 64-bit hashes that hold in this process only."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._sorted: Hashes = np.empty(0, np.uint64)
        self._waiting: list[Hashes] = []
        self._count = 0

    def add(self, conversation: Conversation) -> None:
        """Hold a row out; raises `Refusal` where that would take too much memory."""
        runs = self._runs(conversation)
        self._waiting.append(runs)
        self._count += len(runs)
        if self._count >= _SORTED_AT_ONCE:
            self._sort()

    def shares(self, conversation: Conversation) -> bool:
        """Whether a row has a run of words in common with those that are held out."""
        if self._waiting:
            self._sort()
        if not len(self._sorted):
            return False
        runs = self._runs(conversation)
        at = np.searchsorted(self._sorted, runs)
        return bool((self._sorted[np.minimum(at, len(self._sorted) - 1)] == runs).any())

    def _sort(self) -> None:
        self._sorted = np.unique(np.concatenate([self._sorted, *self._waiting]))
        self._waiting, self._count = [], 0
        if len(self._sorted) > MOST_RUNS:
            raise Refusal(
                FailureCode.CONFIG_INVALID,
                f"the rows to compare with have more than {MOST_RUNS:,} different runs of {self._words} words; hold out fewer rows, or name fewer files in against",
                param="spec.dataset.cleaning.decontaminate",
            )

    def _runs(self, conversation: Conversation) -> Hashes:
        """A hash of each run of words, or of all words where they are too few for one. What a system message says is the same in many rows."""
        said = [message["content"] for message in (*conversation.messages, *conversation.rejected) if message["role"] != "system"]
        words = _WORD.findall("\n".join([conversation.text, *said]).lower())
        hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        length = min(self._words, len(words))
        runs = np.zeros(len(words) - length + 1 if words else 0, np.uint64)
        for at in range(length):
            runs = (runs ^ hashes[at : at + len(runs)]) * _MULTIPLIER
            runs ^= runs >> np.uint64(29)
        return runs
