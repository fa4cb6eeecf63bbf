"""Small instruction data for the tests."""

from typing import Any

WORDS = ("red", "green", "blue", "grey", "black", "white", "brown", "pink", "gold", "teal")


def alpaca_rows(count: int) -> list[dict[str, Any]]:
    """``count`` different rows: repeat a colour, the number makes each its own."""
    return [
        {"instruction": f"Say {WORDS[n % len(WORDS)]} {n}.", "input": "", "output": f"{WORDS[n % len(WORDS)]} {n}"} for n in range(count)
    ]
