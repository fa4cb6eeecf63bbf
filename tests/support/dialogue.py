"""Prepared examples of ChatML as lines that a person checks by eye."""

import re

from tests.support.preparing import Told


def lines(told: Told) -> list[str]:
    """A conversation as `role: text`, and `role! text` where the text and its end are learned."""
    learned = list(told.learned)
    found = []
    for role, text in re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", told.text, re.DOTALL):
        is_learned = bool(learned) and role == "assistant" and learned[0] == f"{text}<|im_end|>"
        if is_learned:
            learned.pop(0)
        found.append(f"{role}{'!' if is_learned else ':'} {text}")
    assert not learned, f"learned, but no whole answer: {learned}"
    return found
