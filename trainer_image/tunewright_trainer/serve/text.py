"""From tokens to text as they come: whole characters only, and nothing beyond a stop."""

from collections.abc import Sequence
from typing import Any, Final

_UNFINISHED: Final = "\ufffd"  # what a decoder gives for the beginning of a character


class TextStream:
    """Text of one generation. `add` gives what may be shown so far; text that could turn out to begin a stop is held back."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=1)
        self._tokens: list[int] = []
        self._begin = 0  # first token of the window that is decoded: as far back as characters and spaces may depend on
        self._decoded = 0  # end of the tokens whose text is in `_pending` or given out
        self._pending = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that this token completes. Sets ``stopped`` when a stop was reached; its text and all after it is dropped."""
        self._tokens.append(token)
        self._pending += self._new_text()
        cut = self._first_stop()
        if cut is not None:
            self.stopped = True
            shown, self._pending = self._pending[:cut], ""
            return shown
        keep = self._possible_stop()
        shown, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._pending + self._new_text(final=True)
        self._pending = ""
        return text

    def _new_text(self, *, final: bool = False) -> str:
        before = self._decode(self._tokens[self._begin : self._decoded])
        now = self._decode(self._tokens[self._begin :])
        if now.endswith(_UNFINISHED) and not final:
            return ""
        self._begin, self._decoded = self._decoded, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)) if tokens else ""

    def _first_stop(self) -> int | None:
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        return min(found, default=None)

    def _possible_stop(self) -> int:
        """Characters at the end that begin some stop."""
        for length in range(min(self._longest - 1, len(self._pending)), 0, -1):
            end = self._pending[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
