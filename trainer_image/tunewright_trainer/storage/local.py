"""A store in a folder of this machine, for runs without a cluster."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.storage.folders import join
from tunewright_trainer.storage.store import Changed, ObjectInfo, ObjectMissing

_PART: Final = ".part-"  # files being written; never listed


class LocalStore:
    """Files under `root`. `missing` and `param` are the code and the field that a missing file is reported with."""

    commit = ""
    follows_folders = True
    """Whether links to folders are followed."""

    def __init__(self, root: Path, *, missing: FailureCode = FailureCode.STORAGE_NOT_FOUND, param: str = "") -> None:
        self.root = root.absolute()
        self.missing = missing
        self.param = param

    def path(self, key: str) -> Path:
        """Where a key lies."""
        return self.root / key if key else self.root

    def uri(self, key: str) -> str:
        return str(self.path(key))

    def get_bytes(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except OSError as error:
            raise self._refusal(key, error) from error

    def read_start(self, key: str, length: int) -> bytes:
        try:
            with self.path(key).open("rb") as file:
                return file.read(length)
        except OSError as error:
            raise self._refusal(key, error) from error

    def put_bytes(self, key: str, data: bytes) -> None:
        self._write(key, lambda part: part.write_bytes(data))

    def upload(self, local_path: Path, key: str) -> None:
        self._write(key, lambda part: shutil.copyfile(local_path, part))

    def download(self, key: str, local_path: Path, *, listed: ObjectInfo | None = None) -> None:
        local_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.path(key), local_path)
        except OSError as error:
            raise self._refusal(key, error) from error
        if listed:
            self.check(listed)

    def check(self, listed: ObjectInfo) -> None:
        """Raise `Changed` where a file is not, or no longer, the one that was listed."""
        if self._info(listed.key, self.path(listed.key)).etag != listed.etag:
            raise Changed(self.uri(listed.key), param=self.param)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        start = prefix.rpartition("/")[0]
        top = self.path(start)
        found = []
        for folder, _, names in os.walk(top, followlinks=self.follows_folders):
            for name in names:
                path = Path(folder) / name
                key = join(start, path.relative_to(top).as_posix())
                if key.startswith(prefix) and not name.startswith(_PART):
                    found.append(self._info(key, self.path(key)))
        yield from sorted(found, key=lambda info: info.key)

    def _info(self, key: str, path: Path) -> ObjectInfo:
        try:
            status = path.stat()
        except OSError as error:
            raise self._refusal(key, error) from error
        return ObjectInfo(key=key, size=status.st_size, etag=f"{status.st_size:x}-{status.st_mtime_ns:x}")

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.path(key).unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def fingerprint(self, info: ObjectInfo) -> str:
        with self.path(info.key).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _write(self, key: str, fill: Callable[[Path], object]) -> None:
        target = self.path(key)
        part = target.with_name(f"{_PART}{uuid.uuid4().hex}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fill(part)
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise self._refusal(key, error) from error

    def _refusal(self, key: str, error: OSError) -> Exception:
        uri = self.uri(key)
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return ObjectMissing(self.missing, f"{uri} does not exist", param=self.param)
        if isinstance(error, PermissionError):
            return Refusal(FailureCode.ACCESS_DENIED, f"access to {uri} was denied", param=self.param)
        return error


class VolumeStore(LocalStore):
    """A mounted volume, to read from. Others may write to it, so no link on it leads out of it: a pod has more files than those."""

    follows_folders = False

    def __init__(self, claim: str, root: Path, *, missing: FailureCode, param: str = "") -> None:
        super().__init__(root, missing=missing, param=param)
        self._claim = claim

    def uri(self, key: str) -> str:
        return f"pvc://{self._claim}/{key}"

    def path(self, key: str) -> Path:
        """Where a key lies, with links followed; raises `Refusal` where that is elsewhere."""
        found = Path(os.path.realpath(super().path(key)))
        if not found.is_relative_to(os.path.realpath(self.root)):
            raise Refusal(FailureCode.ACCESS_DENIED, f"{self.uri(key)} is a link that leads out of the volume", param=self.param)
        return found
