"""What the trainer asks of storage."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tunewright_crds.errors import FailureCode, Refusal


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its key under the store's root, its size in bytes, and the store's own tag of its content."""

    key: str
    size: int
    etag: str


class ObjectMissing(Refusal):
    """An object, or the bucket that should hold it, is not there."""


class Changed(Refusal):
    """An object that is another one than was listed."""

    def __init__(self, uri: str, *, param: str = "") -> None:
        super().__init__(FailureCode.DATA_INVALID, f"{uri} changed while it was read; apply the job again when it is whole", param=param)
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.uri, param=self.param), ()


class Store(Protocol):
    """Objects under one root. Keys are relative, with `/` between their parts.

    Every method may raise `Refusal`: `AccessDenied` at once, `StorageUnavailable` after waiting out an outage, and, as `ObjectMissing`,
    the code `missing` for things that are not there. `param` is the field that is reported. `commit` is the version of everything in it; empty where
    objects may change.
    """

    missing: FailureCode
    param: str
    commit: str

    def uri(self, key: str) -> str:
        """The address of a key, as people write it."""

    def get_bytes(self, key: str) -> bytes:
        """The whole content of an object; `ObjectMissing` where there is none."""

    def read_start(self, key: str, length: int) -> bytes:
        """The first so many bytes of an object, or all of a shorter one, without reading the rest; `ObjectMissing` where there is none."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write an object at once: readers see the old content or the new one, never a part."""

    def upload(self, local_path: Path, key: str) -> None:
        """Write a local file as an object, as atomically as `put_bytes`."""

    def download(self, key: str, local_path: Path, *, listed: ObjectInfo | None = None) -> None:
        """Write an object into a local file, whose folder is made; `ObjectMissing` where there is none.

        `Changed` where the object is no longer the one that was `listed`.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with the characters of `prefix`, in order of the keys."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of exactly this key."""

    def fingerprint(self, info: ObjectInfo) -> str:
        """What changes when the object's content changes: the ETag, or for local files the SHA-256."""
