"""From a trained model to artefacts in storage."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import OutputForm
from tunewright_crds.method import WHOLE, Objective, Tuner
from tunewright_crds.pod import PodConfig, Published
from tunewright_crds.status import PublishedForm
from tunewright_crds.storage import MANIFEST, model_key
from tunewright_crds.tuned_model import Kind
from tunewright_trainer.publish import files, verify
from tunewright_trainer.publish.card import model_card
from tunewright_trainer.storage import Store, publish_folder, read_manifest
from tunewright_trainer.train.data import Row
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward_model import padding_of

log = logging.getLogger(__name__)

_LIBRARIES: Final = ("torch", "transformers", "peft")


@dataclass
class Result:
    """What was trained. ``licenses`` are those of the data; ``probe`` is a row on which the artefacts are compared with it; ``metrics`` are the last ones."""

    config: PodConfig
    tuned: Tuned
    base_folder: Path
    dataset_digest: str
    licenses: list[str]
    step: int
    metrics: dict[str, float]
    probe: Row


def publish(result: Result, store: Store, work: Path, *, before_each: Callable[[], None] = lambda: None) -> Published:
    """Publish every form that the job asks for; returns the one that is registered: the adapter where there is one, of a reward model the whole.

    A complete artefact with the same lineage is taken as done, so that a run killed after publishing may come by again. Raises `Refusal` with
    code Internal where an artefact does not compute what the trained model does; its manifest is then not written.
    """
    published = []
    for kind in kinds(result.config):
        before_each()
        published.append(_publish_one(result, kind, store, work / kind.value))
    registered = next((one for one in published if one.kind == Kind.REWARD), published[0])
    return registered.model_copy(update={"forms": [form for one in published for form in one.forms]})


def kinds(config: PodConfig) -> list[Kind]:
    """What is published: the adapter first, which merging consumes. A reward model is always published whole, for others to ask it without its base."""
    forms = config.spec.output.formats
    if config.spec.method.objective is Objective.REWARD:
        beside = config.spec.method.tuner is not Tuner.FULL and OutputForm.ADAPTER in forms
        return [Kind.ADAPTER, Kind.REWARD] if beside else [Kind.REWARD]
    if config.spec.method.tuner in WHOLE:
        return [Kind.FULL]
    return [kind for form, kind in ((OutputForm.ADAPTER, Kind.ADAPTER), (OutputForm.MERGED, Kind.MERGED)) if form in forms]


def lineage(result: Result, kind: Kind) -> dict[str, Any]:
    """Where an artefact comes from, as its manifest tells."""
    config = result.config
    return {
        "kind": kind.value,
        "model": config.model_name,
        "version": config.version,
        "base": config.spec.model.uri,
        "objective": config.spec.method.objective.value,
        "job": {"namespace": config.job.namespace, "name": config.job.name, "uid": config.job.uid},
        "step": result.step,
        "dataset": result.dataset_digest,
        "licenses": result.licenses,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _publish_one(result: Result, kind: Kind, store: Store, folder: Path) -> Published:
    key = model_key(result.config.job.namespace, result.config.model_name, result.config.version, kind.value)
    source = lineage(result, kind)
    digest = _digest_if_done(store, key, source)
    if digest is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(result, kind, source, folder)
        digest = publish_folder(store, folder, key, manifest=source | {"metrics": result.metrics})
        shutil.rmtree(folder, ignore_errors=True)
        log.info("published %s %s", kind.value, store.uri(key))
    form = PublishedForm(kind=kind.value, uri=store.uri(key), digest=digest)
    return Published(**form.model_dump(), base=source["base"], forms=[form])


def write(result: Result, kind: Kind, source: dict[str, Any], folder: Path) -> None:
    """Write one artefact into ``folder``, and check it."""
    probe = verify.Probe(result.probe, result.tuned.autocast)
    if kind is Kind.ADAPTER:
        expected = probe.logits(result.tuned.network)
        files.write_adapter(result.tuned, folder, base_uri=source["base"])
        found = verify.adapter_logits(result.tuned, folder, probe)
        tolerance = verify.SAME if result.tuned.compute is torch.float32 else verify.ROUNDED
    else:
        network = files.merged(result.tuned, result.base_folder) if result.tuned.peft is not None else result.tuned.network
        expected = probe.logits(network)
        dtype = files.original_dtype(result.base_folder)
        files.write_whole(network, folder, dtype=dtype)
        found = verify.model_logits(folder, probe, like=network)
        tolerance = verify.SAME if dtype is torch.float32 else verify.ROUNDED
    difference = verify.difference(expected, found)
    if difference > tolerance:
        raise Refusal(
            FailureCode.INTERNAL, f"the {kind.value}, loaded again, differs from the trained model by {difference:.2g} of its logits"
        )
    files.write_tokenizer(result.base_folder, folder, job_template=result.config.spec.model.chat_template)
    if result.config.spec.method.objective is Objective.REWARD:
        files.pad_with(folder, padding_of(result.base_folder)[1])
    (folder / "README.md").write_text(model_card(source, result.metrics), encoding="utf-8")


def _digest_if_done(store: Store, key: str, source: dict[str, Any]) -> str | None:
    manifest = read_manifest(store, key)
    if manifest is None or any(manifest.get(name) != value for name, value in source.items()):
        return None
    return hashlib.sha256(store.get_bytes(f"{key}/{MANIFEST}")).hexdigest()
