"""A row by our keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from tunewright_trainer.prepare.conversation import RowError, as_text
from tunewright_trainer.prepare.rows import Row


class Fields:
    """The values of a row; `columns` maps our keys to the file's, where they differ. What is null is not there."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        self.row = row
        self._columns = columns
        self._values = row | {key: row.get(name) for key, name in columns.items()} if columns else row

    def name(self, key: str) -> str:
        """The file's name of a key of ours."""
        return self._columns.get(key, key)

    def find(self, key: str) -> Any:
        """The value, None where there is none."""
        return self._values.get(key)

    def has(self, *keys: str) -> bool:
        """Whether each of the keys has a value."""
        for key in keys:  # noqa: SIM110  (asked a dozen times of each row: a generator would take thrice the time)
            if self._values.get(key) is None:
                return False
        return True

    def get(self, key: str) -> Any:
        """The value; `RowError` where there is none."""
        value = self._values.get(key)
        if value is None:
            raise RowError(self.name(key), "is missing")
        return value

    def text(self, key: str) -> str:
        """A text that must be there."""
        return as_text(self.get(key), self.name(key))

    def filled(self, key: str) -> str:
        """A text that must say something."""
        text = self.text(key)
        if not text.strip():
            raise RowError(self.name(key), "is empty")
        return text

    def optional(self, *keys: str) -> str:
        """The text of the first of the keys that has one; empty where none has."""
        return next((self.text(key) for key in keys if self.has(key)), "")

    def several(self, key: str) -> list[str]:
        """A text, or a list of texts that are equally right."""
        value = self.get(key)
        if not isinstance(value, list):
            return [as_text(value, self.name(key))]
        if not value:
            raise RowError(self.name(key), "is an empty list")
        return [as_text(one, f"{self.name(key)}[{index}]") for index, one in enumerate(value)]

    def items(self, key: str) -> Iterator[tuple[str, Any]]:
        """The entries of a list that must not be empty, each with its name; one at a time, for there may be millions."""
        value, name = self.get(key), self.name(key)
        if not isinstance(value, list) or not value:
            raise RowError(name, "must be a list, and not empty")
        return ((f"{name}[{index}]", entry) for index, entry in enumerate(value))

    def objects(self, key: str) -> Iterator["Fields"]:
        """The objects of a list that must not be empty; their keys are told with their place."""
        return (within(entry, name) for name, entry in self.items(key))


class _Within(Fields):
    """An object inside a row."""

    def __init__(self, row: Row, place: str) -> None:
        super().__init__(row, {})
        self._place = place

    def name(self, key: str) -> str:
        return f"{self._place}.{key}"


def within(entry: Any, place: str) -> Fields:
    """An object inside a row, by its place in it."""
    if not isinstance(entry, dict):
        raise RowError(place, "must be an object")
    return _Within(entry, place)
