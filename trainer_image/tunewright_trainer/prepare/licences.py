"""Licences of the sources: as the job names them, else as the data card beside the files does."""

import re
from fnmatch import fnmatchcase
from typing import Any, Final

import yaml

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.storage import ObjectInfo, Place

UNKNOWN: Final = "unknown"
CARD: Final = "README.md"
_MAX_CARD_BYTES: Final = 2**20
_FRONT_MATTER: Final = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)


def of_card(place: Place, card: ObjectInfo | None) -> str:
    """The licence that a data card in the manner of the Hugging Face hub names at its beginning; empty where it names none."""
    if card is None or card.size > _MAX_CARD_BYTES:
        return ""
    found = _FRONT_MATTER.match(place.store.get_bytes(card.key).decode("utf-8", errors="replace"))
    try:
        facts: Any = yaml.safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, RecursionError):
        return ""
    named = facts.get("license") if isinstance(facts, dict) else None
    several = named if isinstance(named, list) else [named]
    return ", ".join(one for one in several if isinstance(one, str))[:128]


def check(licence: str, forbidden: list[str], *, uri: str, param: str) -> None:
    """Raise `Refusal` where the job forbids a source's licence."""
    for one in (licence or UNKNOWN).split(", "):
        for pattern in forbidden:
            if fnmatchcase(one.lower(), pattern.lower()):
                told = f"has licence {one}" if licence else "names no licence"
                raise Refusal(
                    FailureCode.LICENSE_FORBIDDEN, f"{uri} {told}, which dataset.forbiddenLicenses rules out by {pattern!r}", param=param
                )
