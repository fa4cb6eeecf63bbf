"""Files that are needed one after the other: while one is read, the next ones are downloaded."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tunewright_trainer.storage.folders import PARALLEL_FILES
from tunewright_trainer.storage.local import LocalStore
from tunewright_trainer.storage.places import Place
from tunewright_trainer.storage.store import ObjectInfo, Store

AHEAD_FILES: Final = 4 * PARALLEL_FILES
AHEAD_BYTES: Final = 256 * 2**20  # scratch space that files take which are not read yet, besides the first of them


def arriving(place: Place, files: Sequence[ObjectInfo], scratch: Path) -> Generator[Path]:
    """The path of each object's content, until the next one is asked for: downloaded into `scratch` and removed again where it does not lie here.

    Raises `Changed` where it is another one than was listed; of a file that lies here this is known only when it has been read.
    """
    store = place.store
    return _here(store, files) if isinstance(store, LocalStore) else _downloaded(store, files, scratch)


def _here(store: LocalStore, files: Sequence[ObjectInfo]) -> Generator[Path]:
    for info in files:
        try:
            yield store.path(info.key)
        finally:  # a file that is being written is often broken too
            store.check(info)


def _downloaded(store: Store, files: Sequence[ObjectInfo], scratch: Path) -> Generator[Path]:
    scratch.mkdir(parents=True, exist_ok=True)
    waiting: deque[tuple[ObjectInfo, Path, Future[None]]] = deque()
    rest = iter(enumerate(files))
    upcoming = next(rest, None)
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        try:
            while upcoming or waiting:
                while upcoming and (not waiting or _fits(upcoming[1], [info for info, _, _ in waiting])):
                    number, info = upcoming
                    copy = scratch / str(number)
                    waiting.append((info, copy, pool.submit(store.download, info.key, copy, listed=info)))
                    upcoming = next(rest, None)
                _, path, arrived = waiting.popleft()
                arrived.result()
                try:
                    yield path
                finally:
                    path.unlink(missing_ok=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for _, path, _ in waiting:
                path.unlink(missing_ok=True)


def _fits(info: ObjectInfo, waiting: Sequence[ObjectInfo]) -> bool:
    return len(waiting) < AHEAD_FILES and info.size + sum(one.size for one in waiting) <= AHEAD_BYTES
