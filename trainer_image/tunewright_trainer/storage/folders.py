"""Whole folders in storage: the manifest, which names every file with its hash, is written last and makes the folder exist."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Final

import orjson

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.storage import MANIFEST
from tunewright_trainer.storage.store import ObjectMissing, Store

PARALLEL_FILES: Final = 8


class Damaged(Refusal):
    """A folder whose files are not those that its manifest names."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__(FailureCode.STORAGE_DAMAGED, f"{uri} is damaged: {what}", param=uri)


def publish_folder(store: Store, local_folder: Path, key: str, *, manifest: dict[str, Any]) -> str:
    """Upload every file of a local folder, then its manifest; returns the SHA-256 of the manifest, which is the folder's digest.

    `manifest` is what the manifest says besides `files` (lineage, options). A `manifest.json` of the local folder itself is passed over.
    """
    names = sorted(path.relative_to(local_folder).as_posix() for path in local_folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST]
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        files = list(pool.map(lambda name: _publish_file(store, local_folder / name, key, name), names))
    data = orjson.dumps({"files": files, **manifest}, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    store.put_bytes(join(key, MANIFEST), data)
    return hashlib.sha256(data).hexdigest()


def _publish_file(store: Store, path: Path, key: str, name: str) -> dict[str, Any]:
    store.upload(path, join(key, name))
    return {"name": name, "size": path.stat().st_size, "sha256": sha256_of(path)}


def fetch_folder(store: Store, key: str, local_folder: Path, *, needed: tuple[str, ...] = ("",)) -> dict[str, Any] | None:
    """Download a published folder and check every file against its manifest, which is returned; None where the folder is absent.

    ``needed``: only the files whose names begin with one of these.

    Raises `Damaged` where a file is missing or is not what the manifest says. The manifest itself is written beside the files.
    """
    data = _manifest_bytes(store, key)
    if data is None:
        return None
    manifest = _parsed(store, key, data)
    files = [entry for entry in manifest["files"] if entry["name"].startswith(needed)]
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        list(pool.map(lambda entry: _fetch_checked(store, key, entry, local_folder), files))
    local_folder.mkdir(parents=True, exist_ok=True)
    (local_folder / MANIFEST).write_bytes(data)
    return manifest


def _fetch_checked(store: Store, key: str, entry: dict[str, Any], local_folder: Path) -> None:
    name = entry["name"]
    target = local_folder / name
    uri = store.uri(join(key, name))
    try:
        store.download(join(key, name), target)
    except ObjectMissing as error:
        raise Damaged(uri, "it is named by the manifest and is not there") from error
    _check(uri, entry, target)


def _check(uri: str, entry: dict[str, Any], target: Path) -> None:
    size = target.stat().st_size
    if size != entry["size"]:
        raise Damaged(uri, f"it has {size} bytes instead of {entry['size']}")
    if sha256_of(target) != entry["sha256"]:
        raise Damaged(uri, "its SHA-256 is not that of the manifest")


def check_files(store: Store, key: str, local_folder: Path) -> None:
    """Raise `Damaged` where files of a local folder, fetched from a published one with its manifest, are not what that says. A folder without a manifest of
    ours, as others publish them, is passed."""
    try:
        manifest = _parsed(store, key, (local_folder / MANIFEST).read_bytes())
    except (FileNotFoundError, Damaged):
        return
    there = [entry for entry in manifest["files"] if (local_folder / entry["name"]).is_file()]
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        list(pool.map(lambda entry: _check(store.uri(join(key, entry["name"])), entry, local_folder / entry["name"]), there))


def read_manifest(store: Store, key: str) -> dict[str, Any] | None:
    """The manifest of a published folder; None where the folder is absent, `Damaged` where it is no manifest."""
    data = _manifest_bytes(store, key)
    return None if data is None else _parsed(store, key, data)


def discard_folder(store: Store, key: str) -> None:
    """Remove a published folder: its manifest first, so that nobody takes for whole what is going, then everything below it."""
    store.delete([join(key, MANIFEST)])
    store.delete(info.key for info in store.list(f"{key}/"))


def fetch_files(store: Store, keys: Iterable[str], local_folder: Path) -> None:
    """Download objects into a folder under their own last names, several at a time."""
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        list(pool.map(lambda key: store.download(key, local_folder / key.rpartition("/")[2]), keys))


def join(key: str, name: str) -> str:
    """The key of a file in a folder; the empty folder is the store's root."""
    return f"{key}/{name}" if key else name


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_bytes(store: Store, key: str) -> bytes | None:
    manifest = join(key, MANIFEST)
    # Asked by listing: a bucket that is not there is an error, a folder that is not there is an answer.
    return store.get_bytes(manifest) if store.exists(manifest) else None


def _parsed(store: Store, key: str, data: bytes) -> dict[str, Any]:
    uri = store.uri(join(key, MANIFEST))
    try:
        manifest = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Damaged(uri, "it is not JSON") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, list) or not all(_is_entry(entry) for entry in files):
        raise Damaged(uri, "it does not list its files")
    return dict(manifest)


def _is_entry(entry: Any) -> bool:
    """Whether an entry names a file inside the folder, with its size and hash."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and entry["name"] not in ("", ".")
        and not PurePosixPath(entry["name"]).is_absolute()
        and ".." not in PurePosixPath(entry["name"]).parts
    )
