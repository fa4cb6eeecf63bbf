"""Answers that decline, as assistants of other makers do: learned from, they make a model that declines."""

import re
from typing import Final

from tunewright_trainer.prepare.conversation import Conversation

_BEGINNING: Final = 200  # characters in which an answer declines, if it does; further on the words may be part of a story
_DECLINES: Final = re.compile(
    r"\b(as an ai( language)? (model|assistant)|i(?:'|’)?m (?:just |only )?an ai\b|i(?:'|’| a)m sorry,? (?:but )?(?:i|as)\b|i apologi[sz]e,? but i\b"
    r"|(?:i|we) (?:cannot|can(?:'|’)t|can not|am unable to|am not able to) (?:assist|help|provide|fulfil|comply|answer|create|generate|support)"
    r"|my (?:programming|knowledge cutoff|training data)\b)",
    re.IGNORECASE,
)


def refuses(conversation: Conversation) -> bool:
    """Whether the last answer that is learned declines."""
    answers = conversation.answers
    return bool(answers) and _DECLINES.search(conversation.messages[answers[-1]]["content"][:_BEGINNING]) is not None
