"""How an answer ends: the tokens and texts that a chat template puts after it."""

import functools
from dataclasses import dataclass
from typing import Any

from tunewright_trainer.prepare.template import render_text


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
    question = [{"role": "user", "content": "a"}]
    answered = render_text(tokenizer, [*question, {"role": "assistant", "content": _ANSWER}], template)
    end = answered.rpartition(_ANSWER)[2].strip()
    if not end:
        return End(stop_ids(tokenizer), ())
    tokens = tokenizer(end, add_special_tokens=False).input_ids
    if len(tokens) == 1:
        return End(stop_ids(tokenizer) | {tokens[0]}, ())
    return End(stop_ids(tokenizer), (end,))


_ANSWER = "tunewright-answer"
