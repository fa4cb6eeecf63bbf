"""The models that are compared: the base, and what was published."""

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tunewright_crds.job import JobSpec
from tunewright_crds.method import Tuner
from tunewright_crds.tuned_model import Kind
from tunewright_trainer.train.model import Tuned, load_untuned

BASE, TUNED = "base", "tuned"


def subjects(spec: JobSpec, kind: Kind, *, base: Path, tuned: Path, with_base: bool) -> Iterator[tuple[str, Tuned]]:
    """(name, model) of each, one in memory at a time: an adapter goes onto the base once that was measured."""
    model = None
    if with_base or kind is Kind.ADAPTER:
        model = load_untuned(base, spec)
    if with_base and model:
        yield BASE, model
    if kind is Kind.ADAPTER and model:
        yield TUNED, with_adapter(model, tuned)
        return
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield TUNED, load_untuned(tuned, _plain(spec))


def with_adapter(model: Tuned, folder: Path) -> Tuned:
    """The model with a published adapter. Its weights stay in fp32, as they were trained."""
    from peft import PeftModel

    return replace(model, peft=PeftModel.from_pretrained(model.network, folder).eval())


def _plain(spec: JobSpec) -> JobSpec:
    """A merged model is loaded as it was published, never in 4 bits."""
    if spec.method.tuner is not Tuner.QLORA:
        return spec
    plain = copy.copy(spec)
    plain.method = spec.method.model_copy(update={"tuner": Tuner.LORA})
    return plain
