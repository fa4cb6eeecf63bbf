"""Tokens of a text word by word: what texts have in common is tokenised once.

A byte-level tokenizer cuts a text at its added tokens, then into words by a regular expression, and makes each word tokens by itself. Where the
expression is one of `WORDS`, Python can cut a text into the same words or runs of them, nearly all of which have been seen before: a fifth of the work.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from tunewright_trainer.prepare.template import ID_BYTES, as_bytes, tokenize

_MOST: Final = 2**15  # entries of a table, some 7 MB: behind the frequent words come those that are hardly seen twice
_LONGEST: Final = 64  # characters of an entry

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS: Final = {
    _GPT2: r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    _LLAMA3: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen's
    _LLAMA3.replace("{1,3}", ""): (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Expressions that cut a text into words, and what they come to in ASCII text.

In all of them a space is a word's first character or among white space, and no word but white space depends on what follows it. So a text may be cut
before every space that does not follow white space.
"""
_RUNS: Final = tuple(f"{sign} " for sign in " \n\r\t\v\f")  # in ASCII text; looked for in a quarter of the expression's time
_RUN: Final = re.compile(r"\s ")


class _Table(dict[str, bytes]):
    """Ids by text, made where they are missing."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, text: str) -> bytes:
        ids = self._make(text)
        if len(self) < _MOST and len(text) <= _LONGEST:
            self[text] = ids
        return ids


class Words:
    """Of one tokenizer, which must be one that `words` finds an expression for."""

    def __init__(self, tokenizer: Any, expression: str) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.backend_tokenizer.model
        self._word = re.compile(expression, re.ASCII)
        self._added = {token.content: as_bytes([number]) for number, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)")
        self._words = _Table(self._word_ids)
        self._begins = _Table(self._cut)
        self._spaced = _Table(lambda text: self._cut(f" {text}"))

    def told(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[tuple[bytes, Mapping[int, int] | None]]:
        """See `tunewright_trainer.prepare.encode.Teller`."""
        told = []
        for text, some in zip(texts, cuts, strict=True):
            parts = self._pattern.split(text)  # every other part is an added token
            found = [self._added[part] if number % 2 else self._ids(part) for number, part in enumerate(parts)]
            told.append((b"".join(found), self._places(text, some, parts, found)))
        return told

    def _places(self, text: str, cuts: Sequence[int], parts: Sequence[str], found: Sequence[bytes]) -> Mapping[int, int] | None:
        ends = list(accumulate(map(len, parts)))
        sizes = list(accumulate(map(len, found), initial=0))
        places = {}
        for cut in cuts:
            whole = bisect_right(ends, cut)
            start = ends[whole - 1] if whole else 0
            rest = b""
            if start < cut:
                rest = (
                    self._ids(text[start:cut]) if text[start:cut].isascii() else as_bytes(tokenize(self._tokenizer, [text[start:cut]])[0])
                )
                if whole % 2 or not found[whole].startswith(rest):  # inside an added token, or of a word
                    return None
            places[cut] = (sizes[whole] + len(rest)) // ID_BYTES
        return places

    def _ids(self, text: str) -> bytes:
        """Of a text without added tokens."""
        if any(run in text for run in _RUNS) if text.isascii() else _RUN.search(text):
            return self._cut(text)
        first, *rest = text.split(" ")
        return self._begins[first] + b"".join(map(self._spaced.__getitem__, rest))

    def _cut(self, text: str) -> bytes:
        if not text.isascii():
            return as_bytes(tokenize(self._tokenizer, [text])[0])
        return b"".join(map(self._words.__getitem__, self._word.findall(text)))

    def _word_ids(self, word: str) -> bytes:
        return as_bytes([token.id for token in self._model.tokenize(word.translate(_BYTES))])


_BYTES: Final = {byte: 256 + byte for byte in range(33)} | {127: 256 + 33}
"""How byte-level tokenizers write the ASCII characters that cannot be seen."""


def words(tokenizer: Any) -> Words | None:
    """The words of a tokenizer; None where nothing is known of how it cuts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return None
    added = list(tokenizer.added_tokens_decoder.values())
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    # Composing characters changes no ASCII; but added tokens must all be found in the text as it is.
    normalizer = _state(backend.normalizer)
    changed = {token.normalized for token in added}
    if normalizer not in (None, {"type": "NFC"}) or len(changed) > 1 or (normalizer and True in changed):
        return None
    expression = _expression(_state(backend.pre_tokenizer) or {})
    return Words(tokenizer, WORDS[expression]) if expression in WORDS else None


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _expression(cutting: Mapping[str, Any]) -> str | None:
    """The regular expression by which a text is cut, if that and bytes is all there is to it."""
    match cutting:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return expression
    return None
