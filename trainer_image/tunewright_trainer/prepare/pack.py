"""Packing: several examples in one row, so that no token is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of example numbers, each row of at most `capacity` tokens and each example in one row.

    Longest first, each into the row that it fills best (Johnson 1973); rows and their examples are in the order of the examples' numbers.
    `ValueError` where an example is longer than `capacity`. O(n log n) but for moves within one sorted list.
    """
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens and a row only {capacity}")
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(index)
        if room > length:
            insort(rooms, (room - length, row))
    return sorted(sorted(row) for row in rows)
