"""Object storage: one small protocol, over S3, a local folder, and (to read from) the Hugging Face hub.

    store = open_store(config.storage, STORAGE_CREDENTIALS)
    digest = publish_folder(store, local_folder, key, manifest={...})
    manifest = fetch_folder(store, key, local_folder)  # None: absent

Every call waits out an outage (`patience`) and ends with one `Refusal` that names what was asked for.
"""

from tunewright_trainer.storage.arriving import arriving
from tunewright_trainer.storage.folders import (
    Damaged,
    check_files,
    discard_folder,
    fetch_files,
    fetch_folder,
    publish_folder,
    read_manifest,
)
from tunewright_trainer.storage.local import LocalStore
from tunewright_trainer.storage.places import (
    Place,
    open_hub,
    open_model,
    open_reward_model,
    open_source,
    open_store,
    open_task,
    open_volume,
    read_files,
    read_keys,
)
from tunewright_trainer.storage.s3 import S3Store
from tunewright_trainer.storage.store import Changed, ObjectInfo, ObjectMissing, Store

__all__ = [
    "Changed",
    "Damaged",
    "LocalStore",
    "ObjectInfo",
    "ObjectMissing",
    "Place",
    "S3Store",
    "Store",
    "arriving",
    "check_files",
    "discard_folder",
    "fetch_files",
    "fetch_folder",
    "open_hub",
    "open_model",
    "open_reward_model",
    "open_source",
    "open_store",
    "open_task",
    "open_volume",
    "publish_folder",
    "read_files",
    "read_keys",
    "read_manifest",
]
