"""From a trained model to artefacts in storage."""

import functools
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
from tunewright_crds.tuned_model import FOR_OTHERS, Kind, Servability
from tunewright_trainer.architecture import is_seq2seq
from tunewright_trainer.exports import to_gguf, to_onnx
from tunewright_trainer.prepare.template import chat_template
from tunewright_trainer.publish import files, to_hub, verify
from tunewright_trainer.publish.card import model_card
from tunewright_trainer.publish.servability import verdict
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

    @property
    def asked(self) -> verify.Probe:
        """What the artefacts are asked."""
        return verify.Probe(self.probe, self.tuned.autocast)

    @functools.cached_property
    def whole(self) -> "Whole":
        """The model in one piece. Consumes the adapter."""
        network = files.merged(self.tuned, self.base_folder) if self.tuned.peft is not None else self.tuned.network
        expected = self.asked.logits(network)
        dtype = files.original_dtype(self.base_folder)
        network.config._attn_implementation = "sdpa"  # training's attention is known to no other program
        return Whole(network=files.rounded(network, dtype), expected=expected, dtype=dtype, compute=self.tuned.compute)


@dataclass
class Whole:
    """A model rounded to the precision that its base is published in, and the logits that it gave for the probe before, in the precision of training."""

    network: Any
    expected: torch.Tensor
    dtype: torch.dtype
    compute: torch.dtype

    @property
    def elsewhere(self) -> float:
        """How far another program, which computes in fp32, may be from it."""
        return verify.OTHER_PROGRAM if {self.dtype, self.compute} == {torch.float32} else verify.ROUNDED


def publish(result: Result, store: Store, work: Path, *, before_each: Callable[[], None] = lambda: None) -> Published:
    """Publish every form that the job asks for; returns the one that is registered: the adapter where there is one, of a reward model the whole.

    A complete artefact with the same lineage is taken as done, so that a run killed after publishing may come by again. Raises `Refusal` with
    code Internal where an artefact does not compute what the trained model does; its manifest is then not written. A form for other programs that
    cannot be made is told (the first of them raised) once all others are published.
    """
    published = []
    if OutputForm.LORA in result.config.spec.output.formats:
        before_each()
        published.append(_publish_one(result, Kind.ADAPTER, store, work / OutputForm.LORA.value, converted=True))
    failed: list[Refusal] = []
    for kind in kinds(result.config):
        before_each()
        try:
            published.append(_publish_one(result, kind, store, work / kind.value))
        except Refusal as refusal:
            if kind not in FOR_OTHERS:
                raise
            failed.append(refusal)
    if failed:
        there = ", ".join(one.uri for one in published)
        raise Refusal(failed[0].code, f"{failed[0].message} (published: {there})", param=failed[0].param) from failed[0]
    registered = next((one for one in published if one.kind == Kind.REWARD), published[0])
    registered = registered.model_copy(update={"forms": [form for one in published for form in one.forms]})
    if not result.config.spec.output.hub.repository:
        return registered
    before_each()
    work.mkdir(parents=True, exist_ok=True)
    return registered.model_copy(update={"hub": to_hub.copy(result.config, registered, store, work)})


def kinds(config: PodConfig) -> list[Kind]:
    """What is published: the adapter first, which merging consumes. A reward model is always published whole, for others to ask it without its base."""
    forms = config.spec.output.formats
    if config.spec.method.objective is Objective.REWARD:
        beside = config.spec.method.tuner is not Tuner.FULL and OutputForm.ADAPTER in forms
        return [Kind.ADAPTER, Kind.REWARD] if beside else [Kind.REWARD]
    others = [kind for kind in FOR_OTHERS if OutputForm(kind) in forms]
    if config.spec.method.tuner in WHOLE:
        return [Kind.FULL, *others]
    merged = OutputForm.MERGED in forms
    adapter = OutputForm.ADAPTER in forms or not merged
    return [kind for kind, wanted in ((Kind.ADAPTER, adapter), (Kind.MERGED, merged)) if wanted] + others


def lineage(result: Result, kind: Kind, *, converted: bool = False) -> dict[str, Any]:
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
        **({"converted": config.spec.method.tuner.value} if converted else {}),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _publish_one(result: Result, kind: Kind, store: Store, folder: Path, *, converted: bool = False) -> Published:
    key = model_key(result.config.job.namespace, result.config.model_name, result.config.version, folder.name)
    source = lineage(result, kind, converted=converted)
    done = _done(store, key, source)
    if done is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        servable = write(result, kind, source, folder, converted=converted)
        done = (
            publish_folder(store, folder, key, manifest=source | {"servability": servable.value, "metrics": result.metrics}),
            servable.value,
        )
        shutil.rmtree(folder, ignore_errors=True)
        log.info("published %s %s, servable as %s", kind.value, store.uri(key), servable)
    form = PublishedForm(kind=kind.value, uri=store.uri(key), digest=done[0], servability=done[1])
    return Published(kind=form.kind, uri=form.uri, digest=form.digest, base=source["base"], forms=[form])


def write(result: Result, kind: Kind, source: dict[str, Any], folder: Path, *, converted: bool = False) -> Servability:
    """Write one artefact into ``folder``, and check it; returns who can serve it."""
    difference, tolerance = _write_converted(result, folder) if converted else _WRITERS[kind](result, folder)
    if difference > tolerance:
        raise Refusal(
            FailureCode.INTERNAL, f"the {kind.value}, loaded again, differs from the trained model by {difference:.2g} of its logits"
        )
    if kind is not Kind.GGUF:  # which has them in it
        files.write_tokenizer(result.base_folder, folder, job_template=result.config.spec.model.chat_template)
    if result.config.spec.method.objective is Objective.REWARD:
        files.pad_with(folder, padding_of(result.base_folder)[1])
    servable = _servability(result, kind, folder)
    card = model_card(
        source | {"servability": servable.value},
        result.metrics,
        result.config.spec,
        seq2seq=is_seq2seq(result.base_folder),
        hypernetwork=result.config.spec.method.tuner is Tuner.HINT,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return servable


def _servability(result: Result, kind: Kind, folder: Path) -> Servability:
    if result.config.spec.method.tuner is Tuner.HINT:
        return Servability.UNTOLD  # no engine serves it
    if kind is Kind.ADAPTER and is_seq2seq(result.base_folder):
        return Servability.TRANSFORMERS  # vLLM takes no adapters of encoder-decoders
    if kind is Kind.ADAPTER:
        return verdict(files.adapter_config(folder))
    return Servability.UNTOLD if kind in FOR_OTHERS else Servability.WHOLE


# Each writes its form, and returns how far what is loaded from it is from the trained model, and how far it may be.


def _write_adapter(result: Result, folder: Path) -> tuple[float, float]:
    expected = result.asked.logits(result.tuned.network)
    write_it = files.write_adapter if result.tuned.peft is not None else files.write_hypernetwork
    write_it(result.tuned, folder, base_uri=result.config.spec.model.uri)
    found = verify.adapter_logits(result.tuned, folder, result.asked)
    return verify.difference(expected, found), verify.SAME if result.tuned.compute is torch.float32 else verify.ROUNDED


def _write_converted(result: Result, folder: Path) -> tuple[float, float]:
    expected = result.asked.logits(result.tuned.network)
    files.write_converted(result.tuned, folder, base_uri=result.config.spec.model.uri)
    found = verify.converted_logits(result.base_folder, folder, result.asked, device=result.tuned.device)
    return verify.difference(expected, found), verify.CONVERTED if result.tuned.compute is torch.float32 else verify.ROUNDED


def _write_whole(result: Result, folder: Path) -> tuple[float, float]:
    whole = result.whole
    files.write_whole(whole.network, folder, dtype=whole.dtype)
    found = verify.model_logits(folder, result.asked, like=whole.network)
    return verify.difference(whole.expected, found), (verify.SAME if whole.dtype is torch.float32 else verify.ROUNDED)


def _write_onnx(result: Result, folder: Path) -> tuple[float, float]:
    whole = result.whole
    to_onnx.write(whole.network.float().cpu(), folder)
    files.rounded(whole.network, whole.dtype)
    found = to_onnx.logits(folder, result.asked.ids)
    return verify.difference(whole.expected, found), whole.elsewhere


def _write_gguf(result: Result, folder: Path) -> tuple[float, float]:
    whole = result.whole
    template = chat_template(result.base_folder, result.config.spec.model.chat_template)
    path = folder / to_gguf.FILE
    to_gguf.write(whole.network.cpu(), result.base_folder, path, template=template)
    ids = result.asked.ids[0].tolist()
    return to_gguf.difference(path, result.base_folder, ids, whole.expected), whole.elsewhere


_WRITERS: Final[dict[Kind, Callable[[Result, Path], tuple[float, float]]]] = {
    Kind.ADAPTER: _write_adapter,
    Kind.MERGED: _write_whole,
    Kind.FULL: _write_whole,
    Kind.REWARD: _write_whole,
    Kind.ONNX: _write_onnx,
    Kind.GGUF: _write_gguf,
}


def _done(store: Store, key: str, source: dict[str, Any]) -> tuple[str, str] | None:
    """Hash and servability of a complete artefact of this lineage."""
    manifest = read_manifest(store, key)
    if manifest is None or any(manifest.get(name) != value for name, value in source.items()):
        return None
    return hashlib.sha256(store.get_bytes(f"{key}/{MANIFEST}")).hexdigest(), str(manifest.get("servability", ""))
