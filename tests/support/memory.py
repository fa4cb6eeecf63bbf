"""What training really takes: tensors counted as they are made and freed, and a step to count them in."""

import contextlib
import gc
import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.models import byte_tokenizer
from tests.support.training import a_job
from tunewright_crds.job import JobSpec
from tunewright_trainer.plan.layouts import geometry
from tunewright_trainer.plan.memory import DataFacts, Estimate, estimate
from tunewright_trainer.plan.shapes import read_shapes
from tunewright_trainer.storage import LocalStore, Place
from tunewright_trainer.train.data import MicroBatch, Row, micro_batch
from tunewright_trainer.train.model import Tuned, load
from tunewright_trainer.train.objective import objective_of

DOCUMENTS = 4


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operations make inside, now and at most. Those of ``known`` tensors are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def save_model(folder: Path, layout: str, *, width: int, layers: int, inner: int, vocabulary: int, heads: int, key_heads: int) -> None:
    """An untrained model of a family, with a tokenizer."""
    import transformers

    if layout == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 4096}
        sizes |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    else:
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
        sizes |= {"num_key_value_heads": key_heads, "max_position_embeddings": 4096, "head_dim": width // heads, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(layout, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **sizes)
    if layout != "gpt2":
        config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def a_spec(folder: Path, **parts: Any) -> JobSpec:
    """A job that goes through its rows one by one, several of them a step."""
    numbers = {"batchSize": 2, "microBatchSize": 1} | parts.pop("hyperparameters", {})
    return a_job(folder, hyperparameters=numbers, **parts).spec


def estimated(folder: Path, spec: JobSpec, *, tokens: int, learned: float) -> Estimate:
    """The plan's figures for a micro-batch of so many tokens."""
    shape = geometry(json.loads((folder / "config.json").read_text()))
    assert shape is not None
    return estimate(read_shapes(Place(LocalStore(folder.parent), folder.name)), shape, spec, DataFacts(tokens, learned))


def a_batch(tuned: Tuned, *, tokens: int, learned: float) -> MicroBatch:
    """Documents of equal length; the last tokens of each are learned."""
    ids = np.random.default_rng(0).integers(3, 200, tokens)
    labels, each = ids.copy(), tokens // DOCUMENTS
    for start in range(0, tokens, each):
        labels[start : start + each - round(each * learned)] = -100
    return micro_batch([Row(ids, labels, [each] * DOCUMENTS)], tuned.device)


@contextlib.contextmanager
def counted(tuned: Tuned, batch: MicroBatch) -> Iterator[LiveTensors]:
    """Count what is made inside beside weights, gradients and the batch."""
    gc.collect()
    gradients = [weight.grad for weight in tuned.trainable.values() if weight.grad is not None]
    inputs = [batch.input_ids, batch.position_ids, batch.keep, batch.targets]
    with LiveTensors([*tuned.network.parameters(), *tuned.network.buffers(), *gradients, *inputs]) as live:
        yield live


def peak_of_a_pass(folder: Path, spec: JobSpec, *, tokens: int, learned: float) -> int:
    """Bytes that a forward and backward pass takes at most beside what stands, with gradients that are there already."""
    tuned = load(folder, spec)
    tuned.network.train()
    batch, objective = a_batch(tuned, tokens=tokens, learned=learned), objective_of(spec, tuned)
    objective.backward(tuned, batch, share_of=100)
    with counted(tuned, batch) as live:
        objective.backward(tuned, batch, share_of=100)
    return live.peak
