"""How many tokens the beginning of a text has, told from the tokens of the whole text.

A tokenizer first cuts a text at its special tokens, and what lies between two of them does not depend on the rest. So the beginning's tokens are
those of the whole text up to the beginning's last special token, and the tokens of what follows that, which is nearly always the same few characters
(`assistant` and a line feed). This halves the work of preparing; where it cannot be told, the beginning is tokenised by itself.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tunewright_trainer.prepare.template import as_bytes, tokenize

_LONGEST_TAIL: Final = 64
_MOST_TAILS: Final = 4096


class Boundaries:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Tokens that take spaces around them with them, or that are found in a changed text only, are left to be tokenised.
        special = {
            number: token.content
            for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        }
        self._ids = frozenset(special)
        self._mark = next(iter(special.values()), "")
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._tails: dict[str, list[int]] = {}

    def told(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[tuple[bytes, Mapping[int, int] | None]]:
        """See `tunewright_trainer.prepare.encode.Teller`."""
        wholes = tokenize(self._tokenizer, texts)
        return [(as_bytes(ids), self._places(text, some, ids)) for text, some, ids in zip(texts, cuts, wholes, strict=True)]

    def _places(self, text: str, cuts: Sequence[int], ids: Sequence[int]) -> Mapping[int, int] | None:
        """By cut of `text`, whose tokens are `ids`, the number of tokens before it; None where that cannot be told."""
        if self._pattern is None:
            return None
        found = [match.end() for match in self._pattern.finditer(text)]
        at = [number for number, token in enumerate(ids) if token in self._ids]
        if len(found) != len(at):
            return None
        places = {}
        for cut in cuts:
            before = bisect_right(found, cut)
            if not before:
                return None
            tail = self._tail(text[found[before - 1] : cut])
            start = at[before - 1] + 1
            if tail is None or list(ids[start : start + len(tail)]) != tail:
                return None
            places[cut] = start + len(tail)
        return places

    def _tail(self, text: str) -> list[int] | None:
        """Tokens of a few characters behind a special token."""
        if not text:
            return []
        if text not in self._tails:
            if len(text) > _LONGEST_TAIL or len(self._tails) >= _MOST_TAILS:
                return None
            # Behind a token of its kind, since some tokenizers treat the beginning of a text in a way of its own.
            self._tails[text] = tokenize(self._tokenizer, [self._mark + text])[0][1:]
        return self._tails[text]
