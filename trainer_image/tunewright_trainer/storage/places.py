"""Opening what a job names: the platform's own storage, its sources and its base model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig, StorageSettings
from tunewright_trainer.storage.local import LocalStore
from tunewright_trainer.storage.s3 import S3Store
from tunewright_trainer.storage.store import ObjectInfo, ObjectMissing, Store

_KEY_FILES: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION")
_OWNED_FOLDERS: Final = ("datasets", "jobs", "models")


@dataclass(frozen=True)
class Place:
    """A file or folder that somebody named: `key` in `store`."""

    store: Store
    key: str

    @property
    def uri(self) -> str:
        return self.store.uri(self.key)

    @property
    def local(self) -> Path | None:
        """Where it lies on this machine, if it does."""
        return self.store.path(self.key) if isinstance(self.store, LocalStore) else None

    def files(self) -> list[ObjectInfo]:
        """The object of exactly this key, or else every object in the folder of this key; `ObjectMissing` where there is neither."""
        key = self.key.rstrip("/")
        if key and not self.key.endswith("/") and self.store.exists(key):
            return [info for info in self.store.list(key) if info.key == key]
        found = [info for info in self.store.list(f"{key}/" if key else "") if not info.key.endswith("/")]
        if not found and isinstance(self.store, S3Store | LocalStore):
            raise ObjectMissing(self.store.missing, f"{self.uri} does not exist, or holds nothing", param=self.store.param)
        return found


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


def open_source(config: PodConfig, index: int) -> Place:
    """Source number `index` of the job's data."""
    return _open(
        config,
        config.spec.dataset.sources[index].uri,
        secret=config.spec.dataset.credentials_secret,
        folder=names.DATASET_CREDENTIALS,
        missing=FailureCode.DATA_NOT_FOUND,
        param=f"spec.dataset.sources[{index}].uri",
    )


def open_model(config: PodConfig) -> Place:
    """The folder of the job's base model."""
    return _open(
        config,
        config.spec.model.uri,
        secret=config.spec.model.credentials_secret,
        folder=names.MODEL_CREDENTIALS,
        missing=FailureCode.MODEL_NOT_FOUND,
        param="spec.model.uri",
    )


def read_keys(folder: str | Path) -> dict[str, str]:
    """The keys that a mounted Secret holds; empty where nothing is mounted."""
    found = {}
    for name in _KEY_FILES:
        path = Path(folder) / name
        if path.is_file():
            found[name] = path.read_text(encoding="utf-8").strip()
    return found


def _open(config: PodConfig, uri: str, *, secret: str, folder: str, missing: FailureCode, param: str) -> Place:
    if not uri.startswith("s3://"):
        path = Path(uri).absolute()
        return Place(LocalStore(path.parent, missing=missing, param=param), path.name)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    own_keys = not secret
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
    return Place(store, key)


def _refuse_other_namespace(config: PodConfig, key: str, uri: str, param: str) -> None:
    """The platform's keys may open every namespace's folders; a job gets no further than its own."""
    prefix = config.storage.prefix.strip("/")
    inner = key.removeprefix(f"{prefix}/") if prefix else key
    owner, _, rest = inner.partition("/")
    if rest.partition("/")[0] in _OWNED_FOLDERS and owner != config.job.namespace:
        raise Refusal(FailureCode.ACCESS_DENIED, f"{uri} belongs to namespace {owner}, not to {config.job.namespace}", param=param)
