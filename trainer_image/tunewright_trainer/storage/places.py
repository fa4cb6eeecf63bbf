"""Opening what a job names: the platform's own storage, its sources and its base model."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fsspec.utils import glob_translate

from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig, StorageSettings
from tunewright_trainer.storage.folders import join
from tunewright_trainer.storage.local import LocalStore, VolumeStore
from tunewright_trainer.storage.s3 import S3Store
from tunewright_trainer.storage.store import ObjectInfo, ObjectMissing, Store

_KEY_FILES: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "HF_TOKEN",
    "HF_ENDPOINT",
)
_OWNED_FOLDERS: Final = ("datasets", "jobs", "models")
_WILDCARD: Final = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Place:
    """A file or folder that somebody named, `key` in `store`; or with `pattern` the objects whose keys match it, below the folder `key`.

    `guard` raises `Refusal` for the key of an object that may not be read.
    """

    store: Store
    key: str
    pattern: str = ""
    guard: Callable[[str], None] = lambda key: None

    @property
    def uri(self) -> str:
        return self.store.uri(self.pattern or self.key)

    @property
    def local(self) -> Path | None:
        """Where it lies on this machine, if it does."""
        return self.store.path(self.key) if isinstance(self.store, LocalStore) else None

    def files(self) -> list[ObjectInfo]:
        """The object of exactly this key, or else every object that matches, or that is in the folder of this key.

        Raises `ObjectMissing` where there is none, and what `guard` raises.
        """
        found = self._files()
        for info in found:
            self.guard(info.key)
        if not found:
            what = f"nothing matches {self.uri}" if self.pattern else f"{self.uri} does not exist, or holds nothing"
            raise ObjectMissing(self.store.missing, what, param=self.store.param)
        return found

    def find(self, name: str) -> ObjectInfo | None:
        """The object of this name in the folder itself, if there is one."""
        key = join(self.key.rstrip("/"), name)
        return next((info for info in self.store.list(key) if info.key == key), None)

    def _files(self) -> list[ObjectInfo]:
        key = self.pattern or self.key
        if key.rstrip("/") and not key.endswith("/") and self.store.exists(key):
            return [info for info in self.store.list(key) if info.key == key]
        folder = self.key.rstrip("/")
        if not self.pattern:
            found = self.store.list(f"{folder}/" if folder else "")
            return [info for info in found if not info.key.endswith("/")]
        matches = _matcher(self.pattern, self.store.param)
        start = _WILDCARD.split(self.pattern, maxsplit=1)[0]
        return [info for info in self.store.list(start) if not info.key.endswith("/") and matches.match(info.key)]


def _matcher(pattern: str, param: str) -> re.Pattern[str]:
    """What matches the keys that a pattern means; one that ends in `/` means all files below the folders that match."""
    try:
        return re.compile(glob_translate(f"{pattern}**" if pattern.endswith("/") else pattern))
    except (ValueError, re.error) as error:
        what = "`**` stands for whole folders only, as in a/**/b.jsonl" if "**" in pattern else "it is no pattern"
        raise Refusal(FailureCode.CONFIG_INVALID, f"{pattern}: {what}", param=param) from error


def _folder_of(pattern: str) -> str:
    """The folder before the first wildcard."""
    return _WILDCARD.split(pattern, maxsplit=1)[0].rpartition("/")[0]


def open_store(settings: StorageSettings, credentials_folder: str | Path = names.STORAGE_CREDENTIALS) -> Store:
    """The platform's own storage. Keys are read from the files of a folder, else from the client's default chain (environment, workload identity)."""
    return S3Store(
        settings.bucket,
        settings.prefix,
        endpoint=settings.endpoint,
        region=settings.region,
        keys=read_keys(credentials_folder),
        missing=FailureCode.STORAGE_NOT_FOUND,
    )


def open_source(config: PodConfig, uri: str, *, param: str) -> Place:
    """A file, folder or pattern of the job's data, which the field `param` names."""
    return _open(
        config,
        uri,
        secret=config.spec.dataset.credentials_secret,
        folder=names.DATASET_CREDENTIALS,
        missing=FailureCode.DATA_NOT_FOUND,
        param=param,
        patterns=True,
    )


def open_model(config: PodConfig, *, commit: str = "") -> Place:
    """The folder of the job's base model; of the hub's, at this commit if one is given instead of what its revision is now."""
    return _open(
        config,
        config.spec.model.uri,
        secret=config.spec.model.credentials_secret,
        folder=names.MODEL_CREDENTIALS,
        missing=FailureCode.MODEL_NOT_FOUND,
        param="spec.model.uri",
        commit=commit,
    )


def open_reward_model(config: PodConfig) -> Place:
    """The folder of the job's reward model, read with the keys of its base model; what the platform itself published with the platform's."""
    uri = config.spec.method.reward_model
    return _open(
        config,
        uri,
        secret="" if uri.startswith(f"s3://{config.storage.bucket}/") else config.spec.model.credentials_secret,
        folder=names.MODEL_CREDENTIALS,
        missing=FailureCode.MODEL_NOT_FOUND,
        param="spec.method.rewardModel",
    )


def open_task(config: PodConfig, uri: str, *, param: str) -> Place:
    """The folder of a task to evaluate with, which the field `param` names; read with the keys of the job's data."""
    secret = config.spec.dataset.credentials_secret
    return _open(config, uri, secret=secret, folder=names.DATASET_CREDENTIALS, missing=FailureCode.DATA_NOT_FOUND, param=param)


def open_hub(uri: str, keys: dict[str, str], *, missing: FailureCode, param: str, patterns: bool = False, commit: str = "") -> Place:
    """What an `hf://` address names. `keys` may hold HF_TOKEN and HF_ENDPOINT; `commit` goes before the address's own revision."""
    # The library is imported by the jobs that need it.
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    from tunewright_trainer.storage.hub import HubStore

    try:
        named = parse_hf_uri(uri)
    except HfUriError as error:
        raise Refusal(FailureCode.CONFIG_INVALID, str(error), param=param) from error
    if named.type not in ("model", "dataset") or named.revision is None:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{uri} names no revision of a model or data set", param=param)

    def guard(key: str) -> None:
        _refuse_relative(key, store.uri(key), param)

    store = HubStore(
        named.id,
        commit or named.revision,
        repo_type="dataset" if named.type == "dataset" else "model",
        token=keys.get("HF_TOKEN", ""),
        endpoint=keys.get("HF_ENDPOINT", ""),
        missing=missing,
        param=param,
    )
    key = f"{named.path_in_repo}/" if named.path_in_repo and uri.endswith("/") else named.path_in_repo
    guard(key)
    return _place(store, key, guard) if patterns else Place(store, key, guard=guard)


def open_volume(uri: str, *, missing: FailureCode, param: str, patterns: bool = False) -> Place:
    """What a `pvc://` address names, below where the volume is mounted."""
    claim, _, key = uri.removeprefix("pvc://").partition("/")
    store = VolumeStore(claim, Path(names.volume_path(claim)), missing=missing, param=param)

    def guard(key: str) -> None:
        _refuse_relative(key, store.uri(key), param)

    guard(key)
    return _place(store, key, guard) if patterns else Place(store, key, guard=guard)


def read_keys(folder: str | Path) -> dict[str, str]:
    """The keys that a mounted Secret holds; empty where nothing is mounted."""
    return read_files(folder, _KEY_FILES)


def read_files(folder: str | Path, names_of_files: Iterable[str]) -> dict[str, str]:
    """The text of those of these files that a mounted Secret holds."""
    found = {}
    for name in names_of_files:
        path = Path(folder) / name
        if path.is_file():
            found[name] = path.read_text(encoding="utf-8").strip()
    return found


def _open(
    config: PodConfig,
    uri: str,
    *,
    secret: str,
    folder: str,
    missing: FailureCode,
    param: str,
    patterns: bool = False,
    commit: str = "",
) -> Place:
    """`patterns`: whether `*`, `?`, `[...]` and `**` stand for names."""
    if uri.startswith("hf://"):
        return open_hub(uri, read_keys(folder) if secret else {}, missing=missing, param=param, patterns=patterns, commit=commit)
    if uri.startswith("pvc://"):
        return open_volume(uri, missing=missing, param=param, patterns=patterns)
    if not uri.startswith("s3://"):
        return _on_this_machine(uri, missing=missing, param=param, patterns=patterns)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    own_keys = not secret

    def guard(key: str) -> None:
        _refuse_relative(key, store.uri(key), param)
        if own_keys and bucket == config.storage.bucket:
            _refuse_other_namespace(config, key, uri, param)

    store = S3Store(
        bucket,
        endpoint=config.storage.endpoint,
        region=config.storage.region,
        keys=read_keys(names.STORAGE_CREDENTIALS if own_keys else folder),
        missing=missing,
        param=param,
    )
    guard(key)
    return _place(store, key, guard) if patterns else Place(store, key, guard=guard)


def _place(store: Store, key: str, guard: Callable[[str], None]) -> Place:
    return Place(store, _folder_of(key), key, guard) if _WILDCARD.search(key) else Place(store, key, guard=guard)


def _on_this_machine(uri: str, *, missing: FailureCode, param: str, patterns: bool) -> Place:
    path = Path(uri).absolute()
    if not patterns or not _WILDCARD.search(uri) or path.exists():
        return Place(LocalStore(path.parent, missing=missing, param=param), path.name)
    pattern = f"{path}/" if uri.endswith("/") else str(path)
    root = _folder_of(pattern)
    return Place(LocalStore(Path(root or "/"), missing=missing, param=param), "", pattern.removeprefix(f"{root}/"))


def _refuse_relative(key: str, uri: str, param: str) -> None:
    """Some servers and clients resolve such parts, and then read another object than the one that was named."""
    if any(part in (".", "..") for part in key.split("/")):
        raise Refusal(
            FailureCode.CONFIG_INVALID, f"{uri} has a part `.` or `..`, which is not followed; name the object itself", param=param
        )


def _refuse_other_namespace(config: PodConfig, key: str, uri: str, param: str) -> None:
    """The platform's keys may open every namespace's folders; a job gets no further than its own."""
    prefix = config.storage.prefix.strip("/")
    inner = key.removeprefix(f"{prefix}/") if prefix else key
    owner, _, rest = inner.partition("/")
    if rest.partition("/")[0] in _OWNED_FOLDERS and owner != config.job.namespace:
        raise Refusal(FailureCode.ACCESS_DENIED, f"{uri} holds what belongs to other namespaces than {config.job.namespace}", param=param)
