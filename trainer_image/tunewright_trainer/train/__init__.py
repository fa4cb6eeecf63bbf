"""Training: from prepared data and a base model to a published artefact.

outcome = train.run(config, attempt=1, dataset_digest=digest, halvings=0, work=Path("/scratch"), store=store)
"""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.status import MemoryStatus
from tunewright_crds.storage import MANIFEST, dataset_key
from tunewright_trainer import launch
from tunewright_trainer.config import is_local
from tunewright_trainer.evaluate.task_files import fetch_tasks
from tunewright_trainer.exports import check_forms
from tunewright_trainer.lean import import_lean
from tunewright_trainer.plan import measured, parse_config, plan, read_shapes, refuse, table
from tunewright_trainer.storage import LocalStore, Place, Store, fetch_folder, read_manifest
from tunewright_trainer.train.base import fetch_base, fetch_judge
from tunewright_trainer.train.fit import check_fit, check_judge
from tunewright_trainer.train.lineage import commit_of
from tunewright_trainer.train.metrics import peak_memory_bytes

log = logging.getLogger(__name__)


def run(config: PodConfig, *, attempt: int, dataset_digest: str, halvings: int = 0, work: Path, store: Store) -> Outcome:
    """Train to the end, going on from the job's newest checkpoint, and publish.

    ``work`` is a local folder for the model, the data and checkpoints on their way. Raises `Stopped` with the outcome after SIGTERM, once a
    checkpoint lies in storage; `Refusal` or what went wrong otherwise, with the outcome attached (`process.telling`).
    """
    if config.spec.method.options:
        from tunewright_trainer.train import options

        options.checked(config.spec.method)
    with ThreadPoolExecutor(4) as pool:
        # They arrive while the libraries are being imported, which takes seconds. One process of each machine fetches for all of it.
        fetches = launch.local_rank() == 0
        fetching_data = pool.submit(_fetch_data, config, dataset_digest, work / "data", store) if fetches else None
        fetching_model = pool.submit(_fetch_base, config, dataset_digest, work / "model", store) if fetches else None
        fetching_judge = pool.submit(fetch_judge, config, work / "judge") if fetches else None
        fetching_tasks = pool.submit(fetch_tasks, config, work / "tasks") if fetches else None
        import_lean()
        from tunewright_trainer.train.attempt import Attempt
        from tunewright_trainer.train.recipe import train
        from tunewright_trainer.train.rewards import rule
        from tunewright_trainer.train.world import joined
    for number, one in enumerate(config.spec.evaluation.rules):  # a mistake in them shall not be found once all is trained
        rule(one, f"spec.evaluation.rules[{number}]")
    if fetching_tasks:
        fetching_tasks.result()
    if fetching_data:
        fetching_data.result()
    fetched = (fetching_model.result() if fetching_model else Path(), fetching_judge.result() if fetching_judge else None)
    with joined(gpu=bool(config.spec.resources.gpus_per_node)) as world:  # a machine that lacks something says so before others wait for it
        model, judge = world.of_node(fetched)
        manifest = json.loads((work / "data" / MANIFEST).read_bytes())
        check_fit(manifest, model, config.spec.model)
        if judge is not None:
            check_judge(judge, model)
        check_forms(config.spec, model)
        memory = _plan_memory(config, model, manifest)
        outcome = train(
            Attempt(
                _pinned(config, commit_of(config, manifest)),
                number=attempt,
                world=world,
                dataset_digest=dataset_digest,
                halvings=halvings,
                planned_halvings=memory.micro_batch_halvings,
                data=work / "data",
                model=model,
                judge=judge,
                work=work,
                store=store,
            )
        )
        log.info("%s", measured(memory, peak_memory_bytes()))
        return outcome


def _plan_memory(config: PodConfig, folder: Path, manifest: dict[str, Any]) -> MemoryStatus:
    """Tell how much memory training will take. Data of an InstructionDataset was prepared for no job, so that this may be the first to find that it does not fit."""
    place = Place(LocalStore(folder.parent), folder.name)
    memory = plan(config, read_shapes(place), parse_config((folder / "config.json").read_bytes()), manifest)
    log.info("%s", table(memory))
    if not is_local(config):
        refuse(memory, config.spec)
    return memory


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


def _fetch_data(config: PodConfig, digest: str, folder: Path, store: Store) -> None:
    """The files of the prepared data and their manifest come into the folder."""
    key = dataset_key(config.job.namespace, digest)
    if fetch_folder(store, key, folder) is None:
        raise Refusal(
            FailureCode.STORAGE_NOT_FOUND, f"there is no prepared data at {store.uri(key)}; it was deleted since", param=store.uri(key)
        )
