"""How an answer ends: the tokens and texts that a chat template puts after it."""

import functools
from dataclasses import dataclass
from typing import Any

from tunewright_trainer.prepare.template import end_of_turn as template_end
from tunewright_trainer.prepare.template import tokenize


@dataclass(frozen=True)
class End:
    """What ends a turn: any of these tokens, or any of these texts."""

    ids: frozenset[int]
    texts: tuple[str, ...]


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text."""
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


@functools.lru_cache(maxsize=256)
def end_of_turn(tokenizer: Any, template: str) -> End:
    """What ``template`` writes after an assistant's words: a token if it is one, else a text to watch for; and the end of text always."""
    ends = stop_ids(tokenizer)
    marker = template_end(tokenizer, template)
    if not marker:
        return End(ends, ())
    tokens = tokenize(tokenizer, [marker])[0]
    return End(ends | {tokens[0]}, ()) if len(tokens) == 1 else End(ends, (marker,))
