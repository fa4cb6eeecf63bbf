"""Every family of models that we name goes the whole way: it is loaded, learns, and what is published computes what was trained."""

import json
from pathlib import Path

import pytest

from tests.support.models import Layout, tiny_model
from tests.support.training import a_job, documents, history, packed, publish_data, train_here
from tunewright_trainer.storage import LocalStore

CAUSAL: list[Layout] = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "phi3"]
SEQ2SEQ: list[Layout] = ["t5", "bart"]


@pytest.mark.parametrize("layout", CAUSAL + SEQ2SEQ)
def test_a_family_is_loaded_learns_and_is_published(tmp_path: Path, layout: Layout) -> None:
    """Publishing loads the files again and compares their logits with the trained model's: adapter and merged."""
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=packed(documents(4), 1 if layout in SEQ2SEQ else 2) * 2)
    wanted = {"maxSteps": 3, "batchSize": 4, "learningRate": 0.02, "warmupRatio": 0, "scheduler": "constant"}
    job = a_job(tiny_model(layout), hyperparameters=wanted, output={"formats": ["adapter", "merged"]})
    artifact = train_here(job, store, tmp_path).artifact
    assert artifact is not None
    losses = [line["loss"] for line in history(store)]
    assert losses[-1] < losses[0]
    merged = json.loads((Path(artifact.uri).with_name("merged") / "config.json").read_text())
    assert merged["model_type"] == layout
