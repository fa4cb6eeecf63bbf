"""The evaluation report as a web page that needs nothing else. Data is only ever text in it."""

from pathlib import Path
from typing import Any

import jinja2


def page(facts: dict[str, Any]) -> bytes:
    """The page of ``facts``, which `report.json` holds as they are."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(facts, verdict=verdict, number=lambda value: f"{value:.4g}").encode()


def verdict(row: dict[str, Any]) -> str:
    """Whether the tuned model is better, as far as the interval of the difference can tell."""
    if "difference" not in row:
        return ""
    low, high = row["difference"]
    if row["lowerIsBetter"]:
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else "too close to tell"
