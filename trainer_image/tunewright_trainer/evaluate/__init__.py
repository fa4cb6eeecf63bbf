"""Evaluation: base and tuned model answer the same test rows, and a report tells which did better.

outcome = evaluate.run(config, dataset_digest=digest, model_uri=uri, work=Path("/scratch"), store=store)
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import dataset_key
from tunewright_trainer.evaluate.task_files import fetch_tasks
from tunewright_trainer.lean import import_lean
from tunewright_trainer.storage import Store, fetch_folder, read_manifest
from tunewright_trainer.train.base import fetch_base, fetch_judge
from tunewright_trainer.train.lineage import commit_of

TEST, TRAIN = "test", "train"


def run(config: PodConfig, *, dataset_digest: str, model_uri: str, work: Path, store: Store) -> Outcome:
    """Measure the published model at ``model_uri`` on the test rows, beside its base, and write the report.

    A report that is there is taken as it is; parts that an earlier, killed run has measured are not measured again. Raises `Refusal` with
    QualityTooLow where the model misses what the job requires, with the outcome attached (`process.telling`).
    """
    key = _key_of(model_uri, config, store)
    with ThreadPoolExecutor(5) as pool:
        # All arrive while the libraries are being imported, which takes seconds.
        fetching_data = pool.submit(_fetch_data, config, dataset_digest, work / "data", store)
        fetching_base = pool.submit(_fetch_base, config, dataset_digest, work / "model", store)
        fetching_tuned = pool.submit(_fetch, store, key, work / "tuned")
        fetching_judge = pool.submit(fetch_judge, config, work / "judge")
        fetching_tasks = pool.submit(fetch_tasks, config, work / "tasks")
        import_lean()
        from tunewright_trainer.evaluate.recipe import Folders, evaluate
    fetching_data.result()
    manifest = fetching_tuned.result()
    return evaluate(
        config,
        lineage={"dataset": dataset_digest, "model": model_uri, "step": manifest["step"]},
        kind=manifest["kind"],
        folders=Folders(work / "data", base=fetching_base.result(), tuned=work / "tuned", work=work, judge=fetching_judge.result()),
        tasks=fetching_tasks.result(),
        store=store,
    )


def _fetch_base(config: PodConfig, digest: str, folder: Path, store: Store) -> Path:
    manifest = read_manifest(store, dataset_key(config.job.namespace, digest)) if config.spec.model.uri.startswith("hf://") else None
    return fetch_base(config, folder, commit=commit_of(config, manifest or {}))


def _fetch_data(config: PodConfig, digest: str, folder: Path, store: Store) -> None:
    """The rows to test with, and those that examples are taken from, if any are shown."""
    needed = (TEST, TRAIN) if any(config.spec.evaluation.few_shot) else (TEST,)
    _fetch(store, dataset_key(config.job.namespace, digest), folder, needed=tuple(f"{split}/" for split in needed))


def _fetch(store: Store, key: str, folder: Path, *, needed: tuple[str, ...] = ("",)) -> dict[str, str]:
    manifest = fetch_folder(store, key, folder, needed=needed)
    if manifest is None:
        raise Refusal(FailureCode.STORAGE_NOT_FOUND, f"there is nothing at {store.uri(key)}; it was deleted since", param=store.uri(key))
    return manifest


def _key_of(uri: str, config: PodConfig, store: Store) -> str:
    """The store's key for a model of this job's namespace."""
    models = f"{config.job.namespace}/models/"
    root = store.uri(models).rstrip("/") + "/"
    rest = uri.removeprefix(root).rstrip("/")
    if not uri.startswith(root) or not rest or any(part in ("", ".", "..") for part in rest.split("/")):
        raise Refusal(FailureCode.CONFIG_INVALID, f"models are measured from below {root} only", param="--model")
    return models + rest
