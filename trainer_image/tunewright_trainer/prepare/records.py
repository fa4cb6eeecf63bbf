"""Numbers of a fixed form about each example, on local disk, so that memory does not grow with the number of examples."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Records = np.ndarray[Any, np.dtype[Any]]


class RecordFile:
    """Records in the order of their examples, after those that the file has already. Written, then read any number of times, `chunk` records at once."""

    def __init__(self, path: Path, form: np.dtype[Any], *, chunk: int) -> None:
        self.path = path
        self._form = form
        self._chunk = chunk
        self._file = path.open("ab")
        self.count = self._file.tell() // form.itemsize

    def add(self, some: Records) -> None:
        self._file.write(some.tobytes())
        self.count += len(some)

    def take(self, other: "RecordFile") -> None:
        """Add the records of another file of this form."""
        with other.path.open("rb") as file:
            shutil.copyfileobj(file, self._file)
        self.count += other.count

    def close(self) -> None:
        self._file.close()

    def chunks(self) -> Iterator[tuple[int, Records]]:
        """Pieces with the number of their first example."""
        for start in range(0, self.count, self._chunk):
            yield start, np.fromfile(self.path, self._form, count=self._chunk, offset=start * self._form.itemsize)


F = TypeVar("F", bound=RecordFile)


def joined(files: Sequence[F]) -> F:
    """One file of several: the records of the others are added to the first."""
    whole = files[0]
    for other in files[1:]:
        whole.take(other)
    for file in files:
        file.close()
    return whole
