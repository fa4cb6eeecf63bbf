"""Numbers of a fixed form about each example, on local disk, so that memory does not grow with the number of examples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Records = np.ndarray[Any, np.dtype[Any]]


class RecordFile:
    """Records in the order of their examples. Written once, then read any number of times, `chunk` records at once."""

    def __init__(self, path: Path, form: np.dtype[Any], *, chunk: int) -> None:
        self.path = path
        self.count = 0
        self._form = form
        self._chunk = chunk
        self._file = path.open("wb")

    def add(self, some: Records) -> None:
        self._file.write(some.tobytes())
        self.count += len(some)

    def close(self) -> None:
        self._file.close()

    def chunks(self) -> Iterator[tuple[int, Records]]:
        """Pieces with the number of their first example."""
        for start in range(0, self.count, self._chunk):
            yield start, np.fromfile(self.path, self._form, count=self._chunk, offset=start * self._form.itemsize)
