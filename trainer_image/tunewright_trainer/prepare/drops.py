"""What was left out, and why: counted by reason, and every one of it by file and line."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from tunewright_trainer.prepare.sources import OpenSource, Read

DROPS: Final = "drops.jsonl"
MAX_PLACES_TOLD: Final = 100  # of each reason in the report; the file beside the data has all


class Drops:
    """Writes a JSON line for each drop as it comes."""

    def __init__(self, path: Path, sources: Sequence[OpenSource]) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self._file = path.open("wb")
        self._names = [[source.name(info) for info in source.files] for source in sources]

    def add(self, reason: str, read: Read) -> None:
        """Note a drop."""
        self._add({"reason": reason, "source": read.source, "file": self._names[read.source][read.file], "line": read.line})

    def take(self, path: Path) -> None:
        """Note the drops of another file of this kind."""
        with path.open("rb") as file:
            for line in file:
                self._add(orjson.loads(line))

    def _add(self, drop: dict[str, Any]) -> None:
        self.counts[drop["reason"]] += 1
        places = self.places.setdefault(drop["reason"], [])
        if len(places) < MAX_PLACES_TOLD:
            places.append(f"{drop['file']}:{drop['line']}")
        self._file.write(orjson.dumps(drop) + b"\n")

    def close(self) -> None:
        self._file.close()
