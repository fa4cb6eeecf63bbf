"""What was left out, and why: counted by reason, and every one of it by file and line."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import orjson

from tunewright_trainer.prepare.sources import OpenSource, Read

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
        file = self._names[read.source][read.file]
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES_TOLD:
            places.append(f"{file}:{read.line}")
        self._file.write(orjson.dumps({"reason": reason, "source": read.source, "file": file, "line": read.line}) + b"\n")

    def close(self) -> None:
        self._file.close()
