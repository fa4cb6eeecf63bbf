"""Training: from prepared data and a base model to a published artefact.

outcome = train.run(config, attempt=1, dataset_digest=digest, halvings=0, work=Path("/scratch"), store=store)
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import dataset_key
from tunewright_trainer.storage import Store, fetch_folder, read_manifest
from tunewright_trainer.train.base import fetch_base
from tunewright_trainer.train.fit import check_fit
from tunewright_trainer.train.lineage import commit_of


def run(config: PodConfig, *, attempt: int, dataset_digest: str, halvings: int = 0, work: Path, store: Store) -> Outcome:
    """Train to the end, going on from the job's newest checkpoint, and publish.

    ``work`` is a local folder for the model, the data and checkpoints on their way. Raises `Stopped` with the outcome after SIGTERM, once a
    checkpoint lies in storage; `Refusal` or what went wrong otherwise, with the outcome attached (`process.telling`).
    """
    if config.spec.method.options:
        from tunewright_trainer.train import options

        options.checked(config.spec.method)
    with ThreadPoolExecutor(2) as pool:
        # Both arrive while the libraries are being imported, which takes seconds.
        fetching_data = pool.submit(_fetch_data, config, dataset_digest, work / "data", store)
        fetching_model = pool.submit(_fetch_base, config, dataset_digest, work / "model", store)
        from tunewright_trainer.train.recipe import train
    model, manifest = fetching_model.result(), fetching_data.result()
    check_fit(manifest, model, config.spec.model)
    return train(
        _pinned(config, commit_of(config, manifest)),
        attempt=attempt,
        dataset_digest=dataset_digest,
        halvings=halvings,
        data=work / "data",
        model=model,
        work=work,
        store=store,
    )


def _fetch_base(config: PodConfig, digest: str, folder: Path, store: Store) -> Path:
    """A branch of the hub may have moved on since the data was prepared: what is trained is the commit that was looked at then."""
    manifest = None
    if config.spec.model.uri.startswith("hf://"):
        manifest = read_manifest(store, dataset_key(config.job.namespace, digest))
    return fetch_base(config, folder, commit=commit_of(config, manifest or {}))


def _pinned(config: PodConfig, commit: str) -> PodConfig:
    """The config with the model at that commit, as it is named by whatever is made of it."""
    if not commit:
        return config
    model = config.spec.model.model_copy(update={"uri": re.sub("@[^/]+", f"@{commit}", config.spec.model.uri, count=1)})
    return config.model_copy(update={"spec": config.spec.model_copy(update={"model": model})})


def _fetch_data(config: PodConfig, digest: str, folder: Path, store: Store) -> dict[str, Any]:
    """The manifest of the prepared data, whose files come into the folder."""
    key = dataset_key(config.job.namespace, digest)
    manifest = fetch_folder(store, key, folder)
    if manifest is None:
        raise Refusal(
            FailureCode.STORAGE_NOT_FOUND, f"there is no prepared data at {store.uri(key)}; it was deleted since", param=store.uri(key)
        )
    return manifest
